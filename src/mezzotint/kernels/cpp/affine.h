// Encode, decode and extremes of rows whose columns are cut into groups; the last group may be shorter.

static inline std::int64_t length_of(std::int64_t group, std::int64_t n, std::int64_t group_size) {
    const std::int64_t left = n - group * group_size;
    return left < group_size ? left : group_size;
}

static inline Lanes code_of(Lanes value, Lanes scale, Lanes zero_point, Lanes top) {
    return min(max(rint(value / scale) + zero_point, splat(0.0f)), top);
}

template <Dtype dtype>
static void encode_rows(const AffineArgs& a, Rows rows) {
    typedef typename Element<dtype>::type T;
    const Lanes top = splat(a.top);
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
        for (std::int64_t g = 0; g < a.groups; ++g) {
            const Lanes scale = splat(a.scale[r * a.groups + g]), zero_point = splat(a.zero_point[r * a.groups + g]);
            const std::int64_t count = length_of(g, a.n, a.group_size), start = r * a.n + g * a.group_size;
            const T* in = static_cast<const T*>(a.values) + start;
            std::uint8_t* out = a.code + start;
            std::int64_t j = 0;
            for (; j + kLanes <= count; j += kLanes)
                store_u8(out + j, code_of(load_as<dtype>(in + j), scale, zero_point, top));
            if (j < count) {
                std::uint8_t some[16];
                store_u8(some, code_of(load_some<dtype>(in + j, count - j, false), scale, zero_point, top));
                __builtin_memcpy(out + j, some, static_cast<unsigned long>(count - j));
            }
        }
    }
}

static void encode(const AffineArgs& a, Rows rows) {
    switch (a.dtype) {
        case Dtype::f32: return encode_rows<Dtype::f32>(a, rows);
        case Dtype::bf16: return encode_rows<Dtype::bf16>(a, rows);
        case Dtype::f16: return encode_rows<Dtype::f16>(a, rows);
    }
}

static void decode(const AffineArgs& a, Rows rows) {
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
        for (std::int64_t g = 0; g < a.groups; ++g) {
            const float scale = a.scale[r * a.groups + g], zero_point = a.zero_point[r * a.groups + g];
            const std::int64_t count = length_of(g, a.n, a.group_size), start = r * a.n + g * a.group_size;
            std::int64_t j = 0;
            for (; j + kLanes <= count; j += kLanes)
                store(a.decoded + start + j, splat(scale) * (load_u8(a.code + start + j) - splat(zero_point)));
            for (; j < count; ++j)
                a.decoded[start + j] = scale * (static_cast<float>(a.code[start + j]) - zero_point);
        }
    }
}

template <Dtype dtype>
static void min_max_rows(const MinMaxArgs& a, Rows rows) {
    typedef typename Element<dtype>::type T;
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
        for (std::int64_t g = 0; g < a.groups; ++g) {
            const std::int64_t count = length_of(g, a.n, a.group_size);
            const T* in = static_cast<const T*>(a.values) + r * a.n + g * a.group_size;
            Lanes low = load_some<dtype>(in, count, true), high = low;
            std::int64_t j = count < kLanes ? count : kLanes;
            for (; j + kLanes <= count; j += kLanes) {
                const Lanes x = load_as<dtype>(in + j);
                low = min(low, x);
                high = max(high, x);
            }
            if (j < count) {
                const Lanes x = load_some<dtype>(in + j, count - j, true);
                low = min(low, x);
                high = max(high, x);
            }
            a.lowest[r * a.groups + g] = lowest(low);
            a.highest[r * a.groups + g] = highest(high);
        }
    }
}

static void min_max(const MinMaxArgs& a, Rows rows) {
    switch (a.dtype) {
        case Dtype::f32: return min_max_rows<Dtype::f32>(a, rows);
        case Dtype::bf16: return min_max_rows<Dtype::bf16>(a, rows);
        case Dtype::f16: return min_max_rows<Dtype::f16>(a, rows);
    }
}
