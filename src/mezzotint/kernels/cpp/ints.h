// As many 32-bit whole numbers as a register holds. Included inside a level's namespace, like lanes.h.

#if defined(__AVX512F__) && defined(__AVX512BW__)

constexpr int kIntsLog = 4;
struct Ints {
    __m512i v;
};
static inline Ints splat_int(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline Ints load_ints(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void store_ints(std::int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
static inline void store_bytes(std::uint8_t* p, Ints a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
static inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
static inline Ints min(Ints a, Ints b) { return {_mm512_min_epi32(a.v, b.v)}; }
static inline Ints multiply_short(Ints a, Ints b) { return {_mm512_madd_epi16(a.v, b.v)}; }
static inline std::int32_t lowest(Ints a) { return _mm512_reduce_min_epi32(a.v); }
template <int shift>
static inline Ints spread(const std::int32_t* p) {
    if constexpr (shift == 4) {
        return splat_int(*p);
    } else {
        __m512i few;
        if constexpr (shift == 3) few = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        if constexpr (shift == 2) few = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        if constexpr (shift == 1) few = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return {_mm512_permutexvar_epi32(_mm512_srli_epi32(lane, shift), few)};
    }
}
static inline void pick(std::uint32_t* out, const std::uint32_t* words, const std::int32_t* index) {
    _mm512_storeu_si512(out, _mm512_permutexvar_epi32(_mm512_loadu_si512(index), _mm512_loadu_si512(words)));
}

#elif defined(__AVX2__)

constexpr int kIntsLog = 3;
struct Ints {
    __m256i v;
};
static inline Ints splat_int(std::int32_t x) { return {_mm256_set1_epi32(x)}; }
static inline Ints load_ints(const std::int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
static inline void store_ints(std::int32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
static inline void store_bytes(std::uint8_t* p, Ints a) {
    const __m256i low = _mm256_shuffle_epi8(a.v, _mm256_set1_epi32(0x0c080400));  // four bytes of either half
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
}
static inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
static inline Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.v, b.v)}; }
static inline Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.v, b.v)}; }
static inline Ints min(Ints a, Ints b) { return {_mm256_min_epi32(a.v, b.v)}; }
static inline Ints multiply_short(Ints a, Ints b) { return {_mm256_madd_epi16(a.v, b.v)}; }
static inline std::int32_t lowest(Ints a) {
    const __m128i four = _mm_min_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
    const __m128i two = _mm_min_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_min_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
template <int shift>
static inline Ints spread(const std::int32_t* p) {
    if constexpr (shift == 3) {
        return splat_int(*p);
    } else {
        __m128i few;
        if constexpr (shift == 2) few = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        if constexpr (shift == 1) few = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        const __m256i lane = _mm256_srli_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), shift);
        return {_mm256_permutevar8x32_epi32(_mm256_castsi128_si256(few), lane)};
    }
}
static inline void pick(std::uint32_t* out, const std::uint32_t* words, const std::int32_t* index) {
    const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    for (int i = 0; i < 16; i += 8) {
        const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_permutevar8x32_epi32(from, at));
    }
}

#else

constexpr int kIntsLog = 2;
typedef std::int32_t Four __attribute__((vector_size(16)));
struct Ints {
    Four v;
};
static inline Ints splat_int(std::int32_t x) { return {Four{x, x, x, x}}; }
static inline Ints load_ints(const std::int32_t* p) {
    Ints a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
}
static inline void store_ints(std::int32_t* p, Ints a) { __builtin_memcpy(p, &a, sizeof a); }
static inline void store_bytes(std::uint8_t* p, Ints a) {
    for (int i = 0; i < 4; ++i) p[i] = static_cast<std::uint8_t>(a.v[i]);
}
static inline Ints operator+(Ints a, Ints b) { return {a.v + b.v}; }
static inline Ints operator-(Ints a, Ints b) { return {a.v - b.v}; }
static inline Ints operator&(Ints a, Ints b) { return {a.v & b.v}; }
static inline Ints min(Ints a, Ints b) { return {a.v < b.v ? a.v : b.v}; }
static inline Ints multiply_short(Ints a, Ints b) { return {((a.v << 16) >> 16) * ((b.v << 16) >> 16)}; }
static inline std::int32_t lowest(Ints a) {
    std::int32_t found = a.v[0];
    for (int i = 1; i < 4; ++i) found = a.v[i] < found ? a.v[i] : found;
    return found;
}
template <int shift>
static inline Ints spread(const std::int32_t* p) {
    if constexpr (shift == 2) return splat_int(*p);
    else return {Four{p[0], p[0], p[1], p[1]}};
}
static inline void pick(std::uint32_t* out, const std::uint32_t* words, const std::int32_t* index) {
    for (int i = 0; i < 16; ++i) out[i] = words[index[i]];
}

#endif

// What the functions above have in common:
// store_bytes keeps the low byte of each number; multiply_short is a * b of the low, signed 16 bits of each, whose high
// bits are zero in one of the two; lane l of spread<shift>(p) is p[l >> shift]; pick is sixteen times words[index], index < 8.
constexpr int kInts = 1 << kIntsLog;
