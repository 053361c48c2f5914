// The range of each group with the least error, out of a list of candidates.

// To a scale that can be stored: round to nearest even in the integer picture of the float, which is right because
// the smallest scale is a normal number.
static inline float stored_scale(float x, const ScaleType& type) {
    x = x > type.smallest ? x : type.smallest;
    x = x < type.largest ? x : type.largest;
    if (type.dtype == Dtype::f32) return x;
    const int drop = type.dtype == Dtype::bf16 ? 16 : 13;
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    bits += ((1u << (drop - 1)) - 1) + ((bits >> drop) & 1);
    bits &= ~((1u << drop) - 1);
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

static inline float rint_scalar(float x) {
    const float magic = 12582912.0f;
    return (x + magic) - magic;
}

// |e|^power; a power of 2.5 takes a square root, which is exact to the last bit as products are.
template <Power power>
static inline Lanes raised(Lanes e) {
    const Lanes square = e * e;
    if constexpr (power == Power::two) return square;
    const Lanes size = max(e, splat(0.0f) - e);
    return square * (power == Power::three ? size : square_root(size));
}

// The same of a scale, in double, because the square of a small one is no float any more; where a root would not be
// exact, the square of the error, which orders candidates alike.
template <Power power>
static inline double error_of(float sum, float scale) {
    const double total = static_cast<double>(sum), s = static_cast<double>(scale);
    if constexpr (power == Power::two) return total * (s * s);
    if constexpr (power == Power::three) return total * (s * s * s);
    return (total * (s * s)) * (total * (s * s)) * s;
}

// Sums of importance * |code - zero_point - value * (1 / scale)|^power for `count` zero points: the error over
// scale^power. The reciprocal, half the time of a division, can move a code only where both neighbours are equally near.
template <Power power, bool weighted, int count>
static inline void errors_of(const float* values, const float* importance, std::int64_t padded, float scale,
                                  const float* zero_points, float top, float* sums) {
    const Lanes inv_scale = splat(1.0f / scale);
    Lanes low[count], high[count], total[count];
    for (int z = 0; z < count; ++z) {
        low[z] = splat(0.0f - zero_points[z]);
        high[z] = splat(top - zero_points[z]);
        total[z] = splat(0.0f);
    }
    for (std::int64_t j = 0; j < padded; j += kLanes) {
        const Lanes x = load(values + j) * inv_scale, whole = rint(x);
        for (int z = 0; z < count; ++z) {
            const Lanes e = min(max(whole, low[z]), high[z]) - x;
            Lanes error = raised<power>(e);
            if constexpr (weighted) error = error * load(importance + j);
            total[z] = total[z] + error;
        }
    }
    for (int z = 0; z < count; ++z) sums[z] = sum(total[z]);
}

struct Best {
    double error;
    float scale, zero_point;
};

template <Power power, bool weighted, int count>
static inline void consider(const SearchArgs& a, const float* values, const float* importance, float scale,
                            const float* zero_points, Best& best) {
    float sums[count];
    const float top = static_cast<float>((1 << a.bits) - 1);
    errors_of<power, weighted, count>(values, importance, a.padded, scale, zero_points, top, sums);
    for (int z = 0; z < count; ++z) {
        const double error = error_of<power>(sums[z], scale);
        if (error < best.error) best = {error, scale, zero_points[z]};
    }
}

static inline float clamp_code(float x, float top) {
    x = x > 0.0f ? x : 0.0f;
    return x < top ? x : top;
}

// The smallest range that clips nothing.
static Best full_range(const SearchArgs& a, float low, float high) {
    const float half = static_cast<float>(1 << (a.bits - 1)), top = static_cast<float>((1 << a.bits) - 1);
    if (!a.symmetric) {
        const float scale = stored_scale((high - low) / top, a.scale_type);
        return {0.0, scale, clamp_code(rint_scalar((0.0f - low) / scale), top)};
    }
    const float below = (0.0f - low) / half, above = high / (half - 1.0f);
    return {0.0, stored_scale(below > above ? below : above, a.scale_type), half};
}

template <Power power, bool weighted>
static Best search_asymmetric(const SearchArgs& a, const float* values, const float* importance, float low, float high,
                              float* scales) {
    const float top = static_cast<float>((1 << a.bits) - 1);
    float* centres = scales + a.steps;
    for (std::int64_t i = 0; i < a.steps; ++i) scales[i] = stored_scale(a.fractions[i] * (high - low) / top, a.scale_type);
    for (std::int64_t i = 0; i < a.steps; ++i)
        centres[i] = clamp_code(rint_scalar((0.0f - low) * a.fractions[i] / scales[i]), top);
    Best best = {__builtin_inf(), scales[0], centres[0]};
    for (std::int64_t i = 0; i < a.steps; ++i) {
        const float c = centres[i];
        int d = 1;
        if (a.span == 0) {
            consider<power, weighted, 1>(a, values, importance, scales[i], &c, best);
        } else {
            const float three[3] = {c, clamp_code(c - 1.0f, top), clamp_code(c + 1.0f, top)};
            consider<power, weighted, 3>(a, values, importance, scales[i], three, best);
            d = 2;
        }
        for (; d <= a.span; ++d) {
            const float two[2] = {clamp_code(c - static_cast<float>(d), top), clamp_code(c + static_cast<float>(d), top)};
            consider<power, weighted, 2>(a, values, importance, scales[i], two, best);
        }
    }
    return best;
}

template <Power power, bool weighted>
static Best search_symmetric(const SearchArgs& a, const float* values, const float* importance, float low, float high,
                             float* scales) {
    const float half = static_cast<float>(1 << (a.bits - 1)), extreme = 0.0f - low > high ? 0.0f - low : high;
    float* between = scales + a.steps;
    for (std::int64_t i = 0; i < a.steps; ++i) scales[i] = stored_scale(a.fractions[i] * extreme / half, a.scale_type);
    for (std::int64_t i = 0; i < a.steps; ++i) between[i] = stored_scale(a.midpoints[i] * extreme / (half - 0.5f), a.scale_type);
    Best best = {__builtin_inf(), scales[0], half};
    for (std::int64_t i = 0; i < a.steps; ++i) {
        consider<power, weighted, 1>(a, values, importance, scales[i], &half, best);
        consider<power, weighted, 1>(a, values, importance, between[i], &half, best);
    }
    return best;
}

template <Dtype dtype, Power power>
static void search_rows(const SearchArgs& a, Rows rows, float* scratch) {
    typedef typename Element<dtype>::type T;
    float* values = scratch;  // [padded]: one group as floats; zeros behind its end decode to themselves and cost nothing
    float* scales = scratch + a.padded;
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
        for (std::int64_t g = 0; g < a.groups; ++g) {
            const std::int64_t count = length_of(g, a.n, a.group_size), at = r * a.groups + g;
            const T* in = static_cast<const T*>(a.values) + r * a.n + g * a.group_size;
            Lanes low_lanes = splat(0.0f), high_lanes = splat(0.0f);
            for (std::int64_t j = 0; j < a.padded; j += kLanes) {
                const Lanes x = j + kLanes <= count ? load_as<dtype>(in + j)
                                : j < count         ? load_some<dtype>(in + j, count - j, false)
                                                    : splat(0.0f);
                store(values + j, x);
                low_lanes = min(low_lanes, x);
                high_lanes = max(high_lanes, x);
            }
            const float low = lowest(low_lanes), high = highest(high_lanes);
            const float* importance = a.importance ? a.importance + g * a.padded : nullptr;
            Best best;
            if (low == high) {  // both are zero
                best = {0.0, 1.0f, a.symmetric ? static_cast<float>(1 << (a.bits - 1)) : 0.0f};
            } else if (a.steps == 0) {
                best = full_range(a, low, high);
            } else if (a.symmetric) {
                best = importance ? search_symmetric<power, true>(a, values, importance, low, high, scales)
                                  : search_symmetric<power, false>(a, values, importance, low, high, scales);
            } else {
                best = importance ? search_asymmetric<power, true>(a, values, importance, low, high, scales)
                                  : search_asymmetric<power, false>(a, values, importance, low, high, scales);
            }
            a.scale[at] = best.scale;
            a.zero_point[at] = best.zero_point;
        }
    }
}

template <Power power>
static void search_of(const SearchArgs& a, Rows rows, float* scratch) {
    switch (a.dtype) {
        case Dtype::f32: return search_rows<Dtype::f32, power>(a, rows, scratch);
        case Dtype::bf16: return search_rows<Dtype::bf16, power>(a, rows, scratch);
        case Dtype::f16: return search_rows<Dtype::f16, power>(a, rows, scratch);
    }
}

static void search(const SearchArgs& a, Rows rows, float* scratch) {
    switch (a.power) {
        case Power::two: return search_of<Power::two>(a, rows, scratch);
        case Power::two_and_a_half: return search_of<Power::two_and_a_half>(a, rows, scratch);
        case Power::three: return search_of<Power::three>(a, rows, scratch);
    }
}
