// AVX-512 with VBMI and VNNI, pieces of 32, 64 or 128 columns, indices of up to 8 bits: 64 indices at a time, as in
// packed_vnni.h. The table lies in registers as two tables of bytes, level = 256 * high + low - 2^15, each looked up by
// one permute (two and a blend for 7 bits more than one register holds); each meets both bytes of q in a product.

// Of an index that stands for two columns, first those of the first, then those of the second.
struct alignas(64) ByteTables {
    std::uint8_t high[2][256], low[2][256];
};

static inline void fill(const PackedArgs& a, ByteTables* t) {
    for (int c = 0; c < a.width; ++c)
        for (int i = 0; i < 1 << a.bits; ++i) {
            const int level = a.levels[a.width * i + c] + 32768;
            t->high[c][i] = static_cast<std::uint8_t>(level >> 8);
            t->low[c][i] = static_cast<std::uint8_t>(level);
        }
}

template <int bits>
static inline __m512i looked_up(const std::uint8_t* bytes, __m512i index) {
    const __m512i* const t = reinterpret_cast<const __m512i*>(bytes);
    if constexpr (bits <= 6) return _mm512_permutexvar_epi8(index, _mm512_load_si512(t));
    const __m512i first = _mm512_permutex2var_epi8(_mm512_load_si512(t), index, _mm512_load_si512(t + 1));
    if constexpr (bits == 7) return first;
    const __m512i second = _mm512_permutex2var_epi8(_mm512_load_si512(t + 2), index, _mm512_load_si512(t + 3));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), first, second);
}

// Sums of level byte * input byte in the three places that they have in the product.
struct ThreeSums {
    __m512i high, middle, low;
};

// Columns that a load of indices stands for.
template <int bits, int width>
static constexpr int kColumnsPerLoad = width == 2 ? 128 : kCodesPerLoad<bits>;

template <int bits, int width, int rows, int loads>
static inline void four_lookups(const PackedArgs& a, const ByteTables& t, const std::uint8_t* from, std::int64_t first,
                                std::int64_t at, __m512i (*result)[rows][4], int place) {
    constexpr int columns = kColumnsPerLoad<bits, width>, steps = columns / 64, bytes = columns / width * bits / 8;
    const std::int8_t *const high = a.high + first * a.padded_n, *const low = a.low + first * a.padded_n;
    __m512i four[3][rows][4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
        ThreeSums sum[rows];
        for (int b = 0; b < rows; ++b) sum[b].high = sum[b].middle = sum[b].low = _mm512_setzero_si512();
#pragma GCC unroll 2
        for (int i = 0; i < loads; ++i, from += bytes) {
            _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
            const __m512i packed = _mm512_maskz_loadu_epi8(~std::uint64_t(0) >> (64 - bytes), from);
#pragma GCC unroll 2
            for (int step = 0; step < steps; ++step, at += 64) {
                const __m512i index = width == 2 ? spread_out<bits>(packed) : unpacked<bits>(packed, step);
                const int column_of_pair = width == 2 ? step : 0;
                const __m512i level_high = looked_up<bits>(t.high[column_of_pair], index);
                const __m512i level_low = looked_up<bits>(t.low[column_of_pair], index);
#pragma GCC unroll 8
                for (int b = 0; b < rows; ++b) {
                    const __m512i q_high = _mm512_loadu_si512(high + b * a.padded_n + at);
                    const __m512i q_low = _mm512_loadu_si512(low + b * a.padded_n + at);
                    sum[b].high = _mm512_dpbusd_epi32(sum[b].high, level_high, q_high);
                    sum[b].middle = _mm512_dpbusd_epi32(sum[b].middle, level_high, q_low);
                    sum[b].middle = _mm512_dpbusd_epi32(sum[b].middle, level_low, q_high);
                    sum[b].low = _mm512_dpbusd_epi32(sum[b].low, level_low, q_low);
                }
            }
        }
#pragma GCC unroll 8
        for (int b = 0; b < rows; ++b)
            four[0][b][v] = sum[b].high, four[1][b][v] = sum[b].middle, four[2][b][v] = sum[b].low;
    }
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k)
#pragma GCC unroll 8
        for (int b = 0; b < rows; ++b) result[k][b][place] = quarters(four[k][b]);
}

// Sums of the sixteen pieces from `piece` on; what is past the end of a row as in `sums_of_pieces`.
template <int bits, int width, int rows, int loads>
static inline void sums_of_lookups(const PackedArgs& a, const ByteTables& t, const std::uint8_t* row, std::int64_t first,
                                   std::int64_t piece, float (*sums)[16]) {
    constexpr std::int64_t per_load = kColumnsPerLoad<bits, width>, columns = 4 * loads * per_load;
    constexpr std::int64_t bytes = columns / width * bits / 8;
    const int per_register = per_load > a.piece ? static_cast<int>(per_load) / a.piece : 1;
    const std::uint8_t* const end = a.words + a.out_rows * a.row_bytes;
    __m512i reduced[3][rows][4];
    for (int i = 0; i < 4 / per_register; ++i) {
        const std::int64_t at = piece * a.piece + i * columns;
        if (at >= a.n) {
            for (int k = 0; k < 3; ++k)
                for (int b = 0; b < rows; ++b) reduced[k][b][i] = _mm512_setzero_si512();
            continue;
        }
        const std::uint8_t* from = row + at / width * bits / 8;
        std::uint8_t rest[bytes];
        if (end - from < bytes) {
            copy_bytes(rest, from, end - from);
            for (std::int64_t j = end - from; j < bytes; ++j) rest[j] = 0;
            from = rest;
        }
        four_lookups<bits, width, rows, loads>(a, t, from, first, at, reduced, i);
    }
    for (int b = 0; b < rows; ++b) {
        alignas(64) std::int32_t whole[3][16];
        for (int k = 0; k < 3; ++k) _mm512_store_si512(whole[k], sums_of_quarters(reduced[k][b], per_register));
        const float* inputs = a.piece_sum + (first + b) * a.padded_pieces + piece;
        for (int i = 0; i < 16; ++i)
            sums[b][i] = static_cast<float>(65536.0 * whole[0][i] + 256.0 * whole[1][i] + whole[2][i] -
                                            32768.0 * static_cast<double>(inputs[i]));
    }
}

template <int bits, int width, int rows, int loads>
static void table_loads(const PackedArgs& a, Rows part, std::int64_t first) {
    ByteTables t;
    fill(a, &t);
    for (std::int64_t r = part.begin; r < part.end; ++r) {
        Lanes lanes[rows];
        for (int b = 0; b < rows; ++b) lanes[b] = splat(0.0f);
        for (std::int64_t p = 0; p < a.piece_count; p += 16) {
            float sums[rows][16];
            sums_of_lookups<bits, width, rows, loads>(a, t, a.words + r * a.row_bytes, first, p, sums);
            add_sums<rows>(a, r, p, sums, lanes);
        }
        write_row<rows>(a, r, first, lanes);
    }
}

template <int bits, int width, int rows>
static void table_regular(const PackedArgs& a, Rows part, std::int64_t first) {
    if constexpr (kColumnsPerLoad<bits, width> < kMostPiece)
        if (a.piece == kMostPiece) return table_loads<bits, width, rows, 2>(a, part, first);
    table_loads<bits, width, rows, 1>(a, part, first);
}

template <int rows, int width>
static void table_bits(const PackedArgs& a, Rows part, std::int64_t first, float* scratch) {
    if (a.piece != 0) switch (a.bits) {
        case 2: return table_regular<2, width, rows>(a, part, first);
        case 3: return table_regular<3, width, rows>(a, part, first);
        case 4: return table_regular<4, width, rows>(a, part, first);
        case 5: return table_regular<5, width, rows>(a, part, first);
        case 6: return table_regular<6, width, rows>(a, part, first);
        case 7: return table_regular<7, width, rows>(a, part, first);
        case 8: return table_regular<8, width, rows>(a, part, first);
        default: break;
    }
    table_unpacked<rows, width>(a, part, first, scratch);
}

template <int rows>
static void table_rows(const PackedArgs& a, Rows part, std::int64_t first, float* scratch) {
    if (a.width == 2) table_bits<rows, 2>(a, part, first, scratch);
    else table_bits<rows, 1>(a, part, first, scratch);
}
