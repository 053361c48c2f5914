// Products with packed integers: value = scale * (code - zero_point), in groups of columns.
//
// A row is cut into pieces that do not cross groups. For each the sum N of code * q is an exact integer, and
//     product = unit * sum over pieces of scale * (N - zero_point * Q),   Q = sum of q,
// in float32: sixteen accumulators, one for each piece modulo sixteen, and the tree of `sum(Lanes)` at the end.

static inline Lanes lanes_of(const std::int32_t* whole) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(whole[i]);
    return load(values);
}

// Of sixteen pieces, from a row of groups; zero for what is past the last piece.
static inline Lanes per_piece(const PackedArgs& a, const float* of_group, std::int64_t first) {
    const std::int64_t count = a.piece_count - first < 16 ? a.piece_count - first : 16;
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const __mmask16 mask = static_cast<__mmask16>(0xffff >> (16 - count));
    if (a.piece_is_group) return {_mm512_maskz_loadu_ps(mask, of_group + first)};
    if (a.groups == 1) return {_mm512_maskz_broadcastss_ps(mask, _mm_set_ss(of_group[0]))};
    const __m512i group = _mm512_loadu_si512(a.group_of_piece + first);
    return {_mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, group, of_group, 4)};
#else
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = i < count ? of_group[a.group_of_piece[first + i]] : 0.0f;
    return load(values);
#endif
}

template <int rows>
static inline void add_pieces(const PackedArgs& a, std::int64_t row, std::int64_t first, std::int64_t piece,
                              const std::int32_t (*sums)[16], Lanes* lanes) {
    const Lanes scale = per_piece(a, a.scale + row * a.groups, piece);
    const Lanes zero_point = per_piece(a, a.zero_point + row * a.groups, piece);
    for (int b = 0; b < rows; ++b) {
        const Lanes inputs = load(a.piece_sum + (first + b) * a.padded_pieces + piece);
        lanes[b] = lanes[b] + scale * (lanes_of(sums[b]) - zero_point * inputs);
    }
}

template <int rows>
static inline void write_row(const PackedArgs& a, std::int64_t row, std::int64_t first, const Lanes* lanes) {
    for (int b = 0; b < rows && first + b < a.batch; ++b)
        a.out[(first + b) * a.out_rows + row] = static_cast<float>(a.unit[first + b] * a.step * static_cast<double>(sum(lanes[b])));
}

// Sixteen pieces of a row whose codes have been unpacked.
static void sums_of_codes(const PackedArgs& a, const std::uint8_t* code, const std::int16_t* q, std::int64_t piece,
                          std::int32_t* sums) {
    for (int i = 0; i < 16; ++i) {
        std::int32_t sum = 0;
        for (std::int32_t j = a.begin_of_piece[piece + i]; j < a.begin_of_piece[piece + i + 1]; ++j)
            sum += static_cast<std::int16_t>(code[j]) * q[j];
        sums[i] = sum;
    }
}

static void unpack_codes(const PackedArgs& a, const std::uint8_t* row, std::uint8_t* code) {
    switch (a.bits) {
        case 2: return unpack_row<2>(row, code, a.n, a.row_bytes);
        case 3: return unpack_row<3>(row, code, a.n, a.row_bytes);
        case 4: return unpack_row<4>(row, code, a.n, a.row_bytes);
        case 5: return unpack_row<5>(row, code, a.n, a.row_bytes);
        case 6: return unpack_row<6>(row, code, a.n, a.row_bytes);
        case 7: return unpack_row<7>(row, code, a.n, a.row_bytes);
        default: return copy_bytes(code, row, a.n);
    }
}

template <int rows>
static void packed_unpacked(const PackedArgs& a, Rows part, std::int64_t first, float* scratch) {
    std::uint8_t* code = reinterpret_cast<std::uint8_t*>(scratch);
    for (std::int64_t r = part.begin; r < part.end; ++r) {
        unpack_codes(a, a.words + r * a.row_bytes, code);
        Lanes lanes[rows];
        for (int b = 0; b < rows; ++b) lanes[b] = splat(0.0f);
        for (std::int64_t p = 0; p < a.piece_count; p += 16) {
            std::int32_t sums[rows][16];
            for (int b = 0; b < rows; ++b) sums_of_codes(a, code, a.q + (first + b) * a.padded_n, p, sums[b]);
            add_pieces<rows>(a, r, first, p, sums, lanes);
        }
        write_row<rows>(a, r, first, lanes);
    }
}

static void packed_inputs(const PackedArgs& a) {
    for (std::int64_t b = 0; b < a.padded; ++b) {
        std::int16_t* q = a.q + b * a.padded_n;
        for (std::int64_t i = b < a.batch ? a.n : 0; i < a.padded_n; ++i) q[i] = 0;
        if (b < a.batch) a.unit[b] = quantize_row(a.x + b * a.n, a.n, q);
        for (std::int64_t p = 0; p < a.padded_pieces; ++p) {
            std::int32_t sum = 0;
            for (std::int32_t j = a.begin_of_piece[p]; j < a.begin_of_piece[p + 1]; ++j) sum += q[j];
            a.piece_sum[b * a.padded_pieces + p] = static_cast<float>(sum);
        }
    }
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include "packed_vnni.h"
#else
static void ordered_inputs(const PackedArgs&) {}
template <int rows>
static void packed_rows(const PackedArgs& a, Rows part, std::int64_t first, float* scratch) {
    packed_unpacked<rows>(a, part, first, scratch);
}
#endif

static void packed(const PackedArgs& a, Rows part, float* scratch) {
    std::int64_t b = 0;
    for (; a.padded - b >= kMostPackedRows; b += kMostPackedRows) packed_rows<kMostPackedRows>(a, part, b, scratch);
    if (a.padded - b == 2) packed_rows<2>(a, part, b, scratch);
    if (a.padded - b == 1) packed_rows<1>(a, part, b, scratch);
}
