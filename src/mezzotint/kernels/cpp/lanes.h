// Sixteen floats, whatever the instruction set: one register of AVX-512, two of AVX2, four of 128 bits elsewhere.
// All operations are the IEEE ones and the sum has one fixed tree, so every build gives the same bits.
// No include guard by namespace: kernels.cpp includes this once, inside its level's namespace.

#if defined(__AVX512F__) && defined(__AVX512BW__)

struct Lanes {
    __m512 v;
};
static inline Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
static inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Lanes load_bf16(const std::uint16_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
static inline Lanes load_f16(const std::uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline Lanes load_u8(const std::uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
static inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
static inline void store_u8(std::uint8_t* p, Lanes a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a.v)));
}
static inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline Lanes square_root(Lanes a) { return {_mm512_sqrt_ps(a.v)}; }
static inline __m256 halves(Lanes a, __m256 (*f)(__m256, __m256)) {
    return f(_mm512_castps512_ps256(a.v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
}

#elif defined(__AVX2__) && defined(__F16C__)

struct Lanes {
    __m256 v[2];
};
static inline Lanes splat(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
static inline Lanes load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
static inline __m256 widen_bf16(const std::uint16_t* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline Lanes load_bf16(const std::uint16_t* p) { return {{widen_bf16(p), widen_bf16(p + 8)}}; }
static inline __m256 widen_f16(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline Lanes load_f16(const std::uint16_t* p) { return {{widen_f16(p), widen_f16(p + 8)}}; }
static inline __m256 widen_u8(const std::uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline Lanes load_u8(const std::uint8_t* p) { return {{widen_u8(p), widen_u8(p + 8)}}; }
static inline void store(float* p, Lanes a) {
    _mm256_storeu_ps(p, a.v[0]);
    _mm256_storeu_ps(p + 8, a.v[1]);
}
static inline __m128i narrow(__m256 a) {
    __m256i whole = _mm256_cvttps_epi32(a);
    return _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
}
static inline void store_u8(std::uint8_t* p, Lanes a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(narrow(a.v[0]), narrow(a.v[1])));
}
#define MEZZOTINT_BOTH(name, f) \
    static inline Lanes name(Lanes a, Lanes b) { return {{f(a.v[0], b.v[0]), f(a.v[1], b.v[1])}}; }
MEZZOTINT_BOTH(operator+, _mm256_add_ps)
MEZZOTINT_BOTH(operator-, _mm256_sub_ps)
MEZZOTINT_BOTH(operator*, _mm256_mul_ps)
MEZZOTINT_BOTH(operator/, _mm256_div_ps)
MEZZOTINT_BOTH(max, _mm256_max_ps)
MEZZOTINT_BOTH(min, _mm256_min_ps)
#undef MEZZOTINT_BOTH
static inline Lanes square_root(Lanes a) { return {{_mm256_sqrt_ps(a.v[0]), _mm256_sqrt_ps(a.v[1])}}; }
static inline __m256 halves(Lanes a, __m256 (*f)(__m256, __m256)) { return f(a.v[0], a.v[1]); }

#else

typedef float Quad __attribute__((vector_size(16)));

struct Lanes {
    Quad v[4];
};
static inline Lanes splat(float x) {
    Quad q = {x, x, x, x};
    return {{q, q, q, q}};
}
static inline Lanes load(const float* p) {
    Lanes a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
}
static inline void store(float* p, Lanes a) { __builtin_memcpy(p, &a, sizeof a); }
static inline float widen_f16(std::uint16_t half) {
    // The exponent is moved to its place by an exact multiplication, which also serves subnormal halves.
    std::uint32_t bits = static_cast<std::uint32_t>(half & 0x7fff) << 13;
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude *= 0x1p112f;
    if ((half & 0x7c00) == 0x7c00) magnitude = (half & 0x3ff) ? __builtin_nanf("") : __builtin_inff();
    return (half & 0x8000) ? -magnitude : magnitude;
}
static inline Lanes load_bf16(const std::uint16_t* p) {
    std::uint32_t bits[16];
    for (int i = 0; i < 16; ++i) bits[i] = static_cast<std::uint32_t>(p[i]) << 16;
    Lanes a;
    __builtin_memcpy(&a, bits, sizeof a);
    return a;
}
static inline Lanes load_f16(const std::uint16_t* p) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = widen_f16(p[i]);
    return load(values);
}
static inline Lanes load_u8(const std::uint8_t* p) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(p[i]);
    return load(values);
}
static inline void store_u8(std::uint8_t* p, Lanes a) {
    float values[16];
    store(values, a);
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(values[i]));
}
#define MEZZOTINT_FOUR(name, expression)            \
    static inline Lanes name(Lanes a, Lanes b) {    \
        Lanes r;                                    \
        for (int i = 0; i < 4; ++i) {               \
            const Quad x = a.v[i], y = b.v[i];      \
            r.v[i] = expression;                    \
        }                                           \
        return r;                                   \
    }
MEZZOTINT_FOUR(operator+, x + y)
MEZZOTINT_FOUR(operator-, x - y)
MEZZOTINT_FOUR(operator*, x * y)
MEZZOTINT_FOUR(operator/, x / y)
MEZZOTINT_FOUR(max, x > y ? x : y)
MEZZOTINT_FOUR(min, x < y ? x : y)
#undef MEZZOTINT_FOUR
static inline Lanes square_root(Lanes a) {
    float values[16];
    store(values, a);
    for (float& value : values) value = __builtin_sqrtf(value);
    return load(values);
}

#endif

// Lane l and lane l + 8, then + 4, + 2, + 1.
#if defined(__AVX2__) && defined(__F16C__)

static inline __m256 add256(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
static inline __m256 max256(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
static inline __m256 min256(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
#define MEZZOTINT_REDUCE(name, wide, f)                                                                     \
    static inline float name(Lanes a) {                                                                     \
        const __m256 eight = halves(a, wide);                                                               \
        const __m128 four = f##_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));         \
        const __m128 two = f##_ps(four, _mm_movehl_ps(four, four));                                         \
        return _mm_cvtss_f32(f##_ss(two, _mm_shuffle_ps(two, two, 1)));                                     \
    }
MEZZOTINT_REDUCE(sum, add256, _mm_add)
MEZZOTINT_REDUCE(highest, max256, _mm_max)
MEZZOTINT_REDUCE(lowest, min256, _mm_min)
#undef MEZZOTINT_REDUCE

#else

#define MEZZOTINT_REDUCE(name, expression)                                              \
    static inline float name(Lanes a) {                                                 \
        float v[16];                                                                    \
        store(v, a);                                                                    \
        for (int half = 8; half >= 1; half /= 2) {                                      \
            for (int i = 0; i < half; ++i) {                                            \
                const float x = v[i], y = v[i + half];                                  \
                v[i] = expression;                                                      \
            }                                                                           \
        }                                                                               \
        return v[0];                                                                    \
    }
MEZZOTINT_REDUCE(sum, x + y)
MEZZOTINT_REDUCE(highest, x > y ? x : y)
MEZZOTINT_REDUCE(lowest, x < y ? x : y)
#undef MEZZOTINT_REDUCE

#endif

// Rounds half to even for |x| < 2^22, in the default rounding mode; what is larger stays larger than any code.
static inline Lanes rint(Lanes x) {
    const Lanes magic = splat(12582912.0f);  // 1.5 * 2^23
    return (x + magic) - magic;
}

template <Dtype dtype>
struct Element {
    typedef std::uint16_t type;
};
template <>
struct Element<Dtype::f32> {
    typedef float type;
};
template <Dtype dtype>
static inline Lanes load_as(const typename Element<dtype>::type* p) {
    if constexpr (dtype == Dtype::f32) return load(p);
    else if constexpr (dtype == Dtype::bf16) return load_bf16(p);
    else return load_f16(p);
}

// The last lanes of a run: `count` of them are read, the others get the first element or zero.
template <Dtype dtype>
static inline Lanes load_some(const typename Element<dtype>::type* p, std::int64_t count, bool repeat_first) {
    typename Element<dtype>::type some[16];
    for (int i = 0; i < 16; ++i) some[i] = i < count ? p[i] : (repeat_first ? p[0] : typename Element<dtype>::type(0));
    return load_as<dtype>(some);
}
