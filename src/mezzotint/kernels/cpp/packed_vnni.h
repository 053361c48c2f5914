// AVX-512 with VBMI and VNNI, pieces of 32, 64 or 128 columns: 64 codes by permute, multishift and mask, then one product
// for each byte of q. Four bits have a shorter way, 128 codes by shift and mask, whose inputs come in another order.

template <int bits>
static constexpr int kCodesPerLoad = bits == 4 ? 128 : 64;

static void ordered_inputs(const PackedArgs& a) {
    if (a.piece == 0) return;
    for (std::int64_t b = 0; b < a.padded; ++b) {
        const std::int16_t* q = a.q + b * a.padded_n;
        std::int8_t *high = a.high + b * a.padded_n, *low = a.low + b * a.padded_n;
        const auto split = [&](std::int64_t to, std::int64_t from) {
            low[to] = static_cast<std::int8_t>(q[from]);
            high[to] = static_cast<std::int8_t>((q[from] - low[to]) >> 8);
        };
        if (a.bits != 4 && a.width == 1)
            for (std::int64_t i = 0; i < a.padded_n; ++i) split(i, i);
        else
            for (std::int64_t i = 0; i < a.padded_n; i += 128)
                for (std::int64_t j = 0; j < 64; ++j) split(i + j, i + 2 * j), split(i + 64 + j, i + 2 * j + 1);
    }
}

static constexpr int kAhead = 1024;  // bytes; a third to a half more from memory than what hardware fetches by itself

struct alignas(64) Spread {
    std::uint8_t byte[64], position[64];
};
template <int bits>
static constexpr Spread make_spread() {
    Spread s{};
    for (int i = 0; i < 64; ++i) {
        s.byte[i] = static_cast<std::uint8_t>(i / 8 * bits + (i % 8 < bits ? i % 8 : 0));
        s.position[i] = static_cast<std::uint8_t>(i % 8 * bits);
    }
    return s;
}
template <int bits>
static constexpr Spread kSpread = make_spread<bits>();

// 64 codes of 8 * bits bytes, in their order.
template <int bits>
static inline __m512i spread_out(__m512i packed) {
    if constexpr (bits == 8) return packed;
    const __m512i lanes = _mm512_permutexvar_epi8(_mm512_load_si512(kSpread<bits>.byte), packed);
    const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_load_si512(kSpread<bits>.position), lanes);
    return _mm512_and_si512(codes, _mm512_set1_epi8((1 << bits) - 1));
}

// The same; but of four bits, those at even (step 0) or odd columns of 128.
template <int bits>
static inline __m512i unpacked(__m512i packed, int step) {
    if constexpr (bits == 4)
        return _mm512_and_si512(step == 0 ? packed : _mm512_srli_epi16(packed, 4), _mm512_set1_epi8(15));
    return spread_out<bits>(packed);
}

static inline __m512i merged(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
// Dword i of each 128 bits: the sum over that quarter of v[i].
static inline __m512i quarters(const __m512i* v) {
    const __m512i low = merged(v[0], v[1]), high = merged(v[2], v[3]);
    return _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
}
static inline __m512i halves_of(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}
// Sums of sixteen pieces from the `quarters` of registers that each hold `pieces` (1, 2 or 4) of them.
static inline __m512i sums_of_quarters(const __m512i* q, int pieces) {
    if (pieces == 1) return halves_of(halves_of(q[0], q[1]), halves_of(q[2], q[3]));
    if (pieces == 2) {
        const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        return _mm512_permutexvar_epi32(order, halves_of(q[0], q[1]));
    }
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), q[0]);
}

// Products of four registers' worth of columns from `at` on, reduced to quarters; `loads` of codes for each register.
template <int bits, int rows, int loads>
static inline void four_registers(const PackedArgs& a, const std::uint8_t* from, std::int64_t first, std::int64_t at,
                                  __m512i* result, std::int64_t stride) {
    constexpr int bytes = kCodesPerLoad<bits> * bits / 8, steps = kCodesPerLoad<bits> / 64;
    const std::int8_t *const high = a.high + first * a.padded_n, *const low = a.low + first * a.padded_n;
    __m512i four[rows][4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
        __m512i sum_high[rows], sum_low[rows];
        for (int b = 0; b < rows; ++b) sum_high[b] = sum_low[b] = _mm512_setzero_si512();
#pragma GCC unroll 2
        for (int i = 0; i < loads; ++i, from += bytes) {
            _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
            const __m512i packed = _mm512_maskz_loadu_epi8(~std::uint64_t(0) >> (64 - bytes), from);
#pragma GCC unroll 2
            for (int step = 0; step < steps; ++step, at += 64) {
                const __m512i codes = unpacked<bits>(packed, step);
#pragma GCC unroll 8
                for (int b = 0; b < rows; ++b) {
                    const std::int64_t column = b * a.padded_n + at;
                    sum_high[b] = _mm512_dpbusd_epi32(sum_high[b], codes, _mm512_loadu_si512(high + column));
                    sum_low[b] = _mm512_dpbusd_epi32(sum_low[b], codes, _mm512_loadu_si512(low + column));
                }
            }
        }
#pragma GCC unroll 8
        for (int b = 0; b < rows; ++b) four[b][v] = _mm512_add_epi32(_mm512_slli_epi32(sum_high[b], 8), sum_low[b]);
    }
#pragma GCC unroll 8
    for (int b = 0; b < rows; ++b) result[b * stride] = quarters(four[b]);
}

// Sums of the sixteen pieces from `piece` on. What is read past the end of a row meets inputs of zero; past the end of
// all rows nothing is read, the rest of the last row is copied instead.
template <int bits, int rows, int loads>
static inline void sums_of_pieces(const PackedArgs& a, const std::uint8_t* row, std::int64_t first, std::int64_t piece,
                                  std::int32_t (*sums)[16]) {
    constexpr std::int64_t columns = 4 * loads * kCodesPerLoad<bits>, bytes = columns * bits / 8;
    const int per_register = kCodesPerLoad<bits> > a.piece ? kCodesPerLoad<bits> / a.piece : 1;
    const std::uint8_t* const end = a.words + a.out_rows * a.row_bytes;
    __m512i reduced[rows][4];
    for (int i = 0; i < 4 / per_register; ++i) {
        const std::int64_t at = piece * a.piece + i * columns;
        if (at >= a.n) {
            for (int b = 0; b < rows; ++b) reduced[b][i] = _mm512_setzero_si512();
            continue;
        }
        const std::uint8_t* from = row + at * bits / 8;
        std::uint8_t rest[bytes];
        if (end - from < bytes) {
            copy_bytes(rest, from, end - from);
            for (std::int64_t j = end - from; j < bytes; ++j) rest[j] = 0;
            from = rest;
        }
        four_registers<bits, rows, loads>(a, from, first, at, &reduced[0][i], 4);
    }
    for (int b = 0; b < rows; ++b) _mm512_storeu_si512(sums[b], sums_of_quarters(reduced[b], per_register));
}

template <int bits, int rows, int loads>
static void packed_loads(const PackedArgs& a, Rows part, std::int64_t first) {
    constexpr int run = rows == 1 ? 1 : 8;  // weight rows that meet inputs of several rows while these are in the cache
    for (std::int64_t r = part.begin; r < part.end; r += run) {
        const int count = part.end - r < run ? static_cast<int>(part.end - r) : run;
        Lanes lanes[run][rows];
        for (int i = 0; i < count; ++i)
            for (int b = 0; b < rows; ++b) lanes[i][b] = splat(0.0f);
        for (std::int64_t p = 0; p < a.piece_count; p += 16)
            for (int i = 0; i < count; ++i) {
                std::int32_t sums[rows][16];
                sums_of_pieces<bits, rows, loads>(a, a.words + (r + i) * a.row_bytes, first, p, sums);
                add_pieces<rows>(a, r + i, first, p, sums, lanes[i]);
            }
        for (int i = 0; i < count; ++i) write_row<rows>(a, r + i, first, lanes[i]);
    }
}

template <int bits, int rows>
static void packed_regular(const PackedArgs& a, Rows part, std::int64_t first) {
    if constexpr (kCodesPerLoad<bits> < kMostPiece)
        if (a.piece == kMostPiece) return packed_loads<bits, rows, 2>(a, part, first);
    packed_loads<bits, rows, 1>(a, part, first);
}

template <int rows>
static void packed_rows(const PackedArgs& a, Rows part, std::int64_t first, float* scratch) {
    if (a.piece == 0) return packed_unpacked<rows>(a, part, first, scratch);
    switch (a.bits) {
        case 2: return packed_regular<2, rows>(a, part, first);
        case 3: return packed_regular<3, rows>(a, part, first);
        case 4: return packed_regular<4, rows>(a, part, first);
        case 5: return packed_regular<5, rows>(a, part, first);
        case 6: return packed_regular<6, rows>(a, part, first);
        case 7: return packed_regular<7, rows>(a, part, first);
        default: return packed_regular<8, rows>(a, part, first);
    }
}
