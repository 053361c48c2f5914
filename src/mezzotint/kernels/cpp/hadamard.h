// Blocks of columns times the orthonormal Hadamard matrix, by butterflies of stride 1, 2, 4, ... and one multiplication.
// Every level takes the same sums of the same pairs, so which of them stand in one register does not matter.

// Lanes l and l + stride, for each l without that bit, become their sum and their difference.
#if defined(__AVX512F__) && defined(__AVX512BW__)

template <int stride>
static inline Lanes butterfly(Lanes a) {
    constexpr __mmask16 upper = stride == 1 ? 0xaaaa : stride == 2 ? 0xcccc : stride == 4 ? 0xf0f0 : 0xff00;
    __m512 other;
    if constexpr (stride == 1) other = _mm512_permute_ps(a.v, 0xb1);
    else if constexpr (stride == 2) other = _mm512_permute_ps(a.v, 0x4e);
    else if constexpr (stride == 4) other = _mm512_shuffle_f32x4(a.v, a.v, 0xb1);
    else other = _mm512_shuffle_f32x4(a.v, a.v, 0x4e);
    return {_mm512_mask_sub_ps(_mm512_add_ps(a.v, other), upper, other, a.v)};
}

#elif defined(__AVX2__) && defined(__F16C__)

template <int stride>
static inline __m256 butterfly256(__m256 a) {
    constexpr int upper = stride == 1 ? 0xaa : stride == 2 ? 0xcc : 0xf0;
    __m256 other;
    if constexpr (stride == 1) other = _mm256_permute_ps(a, 0xb1);
    else if constexpr (stride == 2) other = _mm256_permute_ps(a, 0x4e);
    else other = _mm256_permute2f128_ps(a, a, 1);
    return _mm256_blend_ps(_mm256_add_ps(a, other), _mm256_sub_ps(other, a), upper);
}
template <int stride>
static inline Lanes butterfly(Lanes a) {
    if constexpr (stride == 8) return {{_mm256_add_ps(a.v[0], a.v[1]), _mm256_sub_ps(a.v[0], a.v[1])}};
    else return {{butterfly256<stride>(a.v[0]), butterfly256<stride>(a.v[1])}};
}

#else

template <int stride>
static inline Lanes butterfly(Lanes a) {
    float in[16], out[16];
    store(in, a);
    for (int i = 0; i < 16; ++i) out[i] = i & stride ? in[i - stride] - in[i] : in[i] + in[i + stride];
    return load(out);
}

#endif

// The first strides, as far as they reach in `block` columns (at most 128): one block, or all that sixteen lanes hold.
template <int block>
static inline void butterflies(Lanes* x) {
    constexpr int count = block < 16 ? 1 : block / 16;
    for (int i = 0; i < count; ++i) {
        if constexpr (block > 1) x[i] = butterfly<1>(x[i]);
        if constexpr (block > 2) x[i] = butterfly<2>(x[i]);
        if constexpr (block > 4) x[i] = butterfly<4>(x[i]);
        if constexpr (block > 8) x[i] = butterfly<8>(x[i]);
    }
    for (int half = 1; half < count; half *= 2) {
        for (int i = 0; i < count; ++i) {
            if (i & half) continue;
            const Lanes low = x[i], high = x[i + half];
            x[i] = low + high;
            x[i + half] = low - high;
        }
    }
}

// The strides from 128 on, in place; the last one multiplies by the scale.
static inline void wide_butterflies(float* x, std::int64_t block, float scale) {
    for (std::int64_t stride = 128; stride < block; stride *= 2) {
        const Lanes factor = splat(2 * stride == block ? scale : 1.0f);
        for (std::int64_t start = 0; start < block; start += 2 * stride) {
            for (std::int64_t j = start; j < start + stride; j += kLanes) {
                const Lanes low = load(x + j), high = load(x + j + stride);
                store(x + j, (low + high) * factor);
                store(x + j + stride, (low - high) * factor);
            }
        }
    }
}

template <Dtype dtype, int inner>
static void hadamard_rows(const HadamardArgs& a, Rows rows) {
    constexpr int count = inner < 16 ? 1 : inner / 16;
    constexpr std::int64_t step = count * kLanes;
    const Lanes factor = splat(a.block > inner ? 1.0f : a.scale);
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
        const auto* in = static_cast<const typename Element<dtype>::type*>(a.values) + r * a.n;
        float* out = a.out + r * a.n;
        Lanes x[count];
        std::int64_t j = 0;
        for (; j + step <= a.n; j += step) {
            for (int i = 0; i < count; ++i) x[i] = load_as<dtype>(in + j + i * kLanes);
            butterflies<inner>(x);
            for (int i = 0; i < count; ++i) store(out + j + i * kLanes, x[i] * factor);
        }
        if (j < a.n) {  // fewer than sixteen columns, in whole blocks: blocks of sixteen or more divide the row
            float some[kLanes];
            x[0] = load_some<dtype>(in + j, a.n - j, false);
            butterflies<inner>(x);
            store(some, x[0] * factor);
            for (std::int64_t i = 0; j + i < a.n; ++i) out[j + i] = some[i];
        }
        if (a.block > inner)
            for (std::int64_t start = 0; start < a.n; start += a.block) wide_butterflies(out + start, a.block, a.scale);
    }
}

template <Dtype dtype>
static void hadamard_as(const HadamardArgs& a, Rows rows) {
    switch (a.block) {
        case 1: return hadamard_rows<dtype, 1>(a, rows);
        case 2: return hadamard_rows<dtype, 2>(a, rows);
        case 4: return hadamard_rows<dtype, 4>(a, rows);
        case 8: return hadamard_rows<dtype, 8>(a, rows);
        case 16: return hadamard_rows<dtype, 16>(a, rows);
        case 32: return hadamard_rows<dtype, 32>(a, rows);
        case 64: return hadamard_rows<dtype, 64>(a, rows);
        default: return hadamard_rows<dtype, 128>(a, rows);
    }
}

static void hadamard(const HadamardArgs& a, Rows rows) {
    switch (a.dtype) {
        case Dtype::f32: return hadamard_as<Dtype::f32>(a, rows);
        case Dtype::bf16: return hadamard_as<Dtype::bf16>(a, rows);
        case Dtype::f16: return hadamard_as<Dtype::f16>(a, rows);
    }
}
