// Products with packed indices into a table: value = scale * table[index], in groups of columns. An index stands for one
// column, or for two neighbours whose table holds points of the plane.
//
// Entries of the table are whole multiples ("levels", 16 bits) of one step, so that a piece's sum of level * q is an
// exact integer of less than 2^38. It is rounded to float32 once, and
//     product = unit * step * sum over pieces of scale * sum
// adds up like the products with integers in packed.h.

template <int rows>
static inline void add_sums(const PackedArgs& a, std::int64_t row, std::int64_t piece, const float (*sums)[16], Lanes* lanes) {
    const Lanes scale = per_piece(a, a.scale + row * a.groups, piece);
    for (int b = 0; b < rows; ++b) lanes[b] = lanes[b] + scale * load(sums[b]);
}

// Levels of a row's columns, eight indices at a time: they end with a byte.
template <int bits, int width>
static void levels_of_row(const PackedArgs& a, const std::uint8_t* row, std::int16_t* level) {
    const std::int64_t count = a.n / width;
    const auto put = [&](const std::uint8_t* from, int i, std::int64_t j) {
        std::uint32_t window;  // at most 7 bits before an index of at most 12
        __builtin_memcpy(&window, from + i * bits / 8, 4);
        const std::uint32_t index = window >> (i * bits % 8) & ((1u << bits) - 1);
        __builtin_memcpy(level + width * j, a.levels + width * index, 2 * width);
    };
    std::int64_t j = 0, at = 0;
    for (; j + 8 <= count && at + bits + 4 <= a.row_bytes; j += 8, at += bits)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) put(row + at, i, j + i);
    for (; j < count; j += 8, at += bits) {
        std::uint8_t rest[bits + 4] = {};
        copy_bytes(rest, row + at, a.row_bytes - at < bits ? a.row_bytes - at : bits);
        for (int i = 0; i < 8 && j + i < count; ++i) put(rest, i, j + i);
    }
}

template <int width>
static void levels_of_bits(const PackedArgs& a, const std::uint8_t* row, std::int16_t* level) {
    switch (a.bits) {
        case 2: return levels_of_row<2, width>(a, row, level);
        case 3: return levels_of_row<3, width>(a, row, level);
        case 4: return levels_of_row<4, width>(a, row, level);
        case 5: return levels_of_row<5, width>(a, row, level);
        case 6: return levels_of_row<6, width>(a, row, level);
        case 7: return levels_of_row<7, width>(a, row, level);
        case 8: return levels_of_row<8, width>(a, row, level);
        case 9: return levels_of_row<9, width>(a, row, level);
        case 10: return levels_of_row<10, width>(a, row, level);
        case 11: return levels_of_row<11, width>(a, row, level);
        default: return levels_of_row<12, width>(a, row, level);
    }
}

// Sum of level * q. Of two products the sum still fits 32 bits, which is what instruction sets have a product for.
static_assert(2 * std::int64_t(32768) * kInputTop < (std::int64_t(1) << 31), "sums of two products overflow");
static inline std::int64_t dot(const std::int16_t* level, const std::int16_t* q, std::int64_t count) {
    std::int64_t sum = 0, j = 0;
#if defined(__AVX2__)
    __m256i wide = _mm256_setzero_si256();
    for (; j + 16 <= count; j += 16) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(level + j));
        const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + j));
        const __m256i pairs = _mm256_madd_epi16(x, y);
        // odd and even places apart, each with its sign
        const __m256i odd = _mm256_shuffle_epi32(pairs, 0xf5);
        const __m256i signs = _mm256_cmpgt_epi32(_mm256_setzero_si256(), pairs);
        wide = _mm256_add_epi64(wide, _mm256_blend_epi32(pairs, _mm256_shuffle_epi32(signs, 0xa0), 0xaa));
        wide = _mm256_add_epi64(wide, _mm256_blend_epi32(odd, signs, 0xaa));
    }
    alignas(32) std::int64_t parts[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts), wide);
    sum = parts[0] + parts[1] + parts[2] + parts[3];
#endif
    for (; j + 2 <= count; j += 2) sum += level[j] * q[j] + level[j + 1] * q[j + 1];
    return j < count ? sum + level[j] * q[j] : sum;
}

template <int rows, int width>
static void table_unpacked(const PackedArgs& a, Rows part, std::int64_t first, float* scratch) {
    std::int16_t* level = reinterpret_cast<std::int16_t*>(scratch);
    for (std::int64_t r = part.begin; r < part.end; ++r) {
        levels_of_bits<width>(a, a.words + r * a.row_bytes, level);
        Lanes lanes[rows];
        for (int b = 0; b < rows; ++b) lanes[b] = splat(0.0f);
        for (std::int64_t p = 0; p < a.piece_count; p += 16) {
            float sums[rows][16];
            for (int b = 0; b < rows; ++b)
                for (int i = 0; i < 16; ++i) {
                    const std::int64_t begin = a.begin_of_piece[p + i], count = a.begin_of_piece[p + i + 1] - begin;
                    const std::int64_t sum = dot(level + begin, a.q + (first + b) * a.padded_n + begin, count);
                    sums[b][i] = static_cast<float>(static_cast<double>(sum));
                }
            add_sums<rows>(a, r, p, sums, lanes);
        }
        write_row<rows>(a, r, first, lanes);
    }
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include "tables_vnni.h"
#else
template <int rows>
static void table_rows(const PackedArgs& a, Rows part, std::int64_t first, float* scratch) {
    if (a.width == 2) table_unpacked<rows, 2>(a, part, first, scratch);
    else table_unpacked<rows, 1>(a, part, first, scratch);
}
#endif

static void table(const PackedArgs& a, Rows part, float* scratch) {
    std::int64_t b = 0;
    for (; a.padded - b >= kMostPackedRows; b += kMostPackedRows) table_rows<kMostPackedRows>(a, part, b, scratch);
    if (a.padded - b == 2) table_rows<2>(a, part, b, scratch);
    if (a.padded - b == 1) table_rows<1>(a, part, b, scratch);
}
