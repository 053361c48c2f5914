// One block of GPTQ (Alg. 1), sixteen rows in the lanes: columns follow one another; rows are independent, or make up for
// the errors of rows before them.

constexpr std::int64_t kPanel = 4;

// Rows of k values as columns of b, `fill` behind the last row.
static inline void as_columns(const float* rows, std::int64_t count, std::int64_t k, std::int64_t b, float fill, float* columns) {
    for (std::int64_t r = 0; r < b; ++r)
        for (std::int64_t j = 0; j < k; ++j) columns[j * b + r] = r < count ? rows[r * k + j] : fill;
}

// The inverse.
template <typename T>
static inline void as_rows(const float* columns, std::int64_t count, std::int64_t k, std::int64_t b, T* rows) {
    for (std::int64_t r = 0; r < count; ++r)
        for (std::int64_t j = 0; j < k; ++j) rows[r * k + j] = static_cast<T>(columns[j * b + r]);
}

// Takes the errors of the panel that starts at column `first` from all columns behind it; columns are `stride` apart.
static inline void pass_on(const GptqArgs& a, std::int64_t first, const float* errors, float* work, std::int64_t stride) {
    const float* factor = a.factor + first * a.k;
    Lanes error[kPanel];
    for (int p = 0; p < kPanel; ++p) error[p] = load(errors + (first + p) * stride);
    for (std::int64_t c = first + kPanel; c < a.k; ++c) {
        Lanes value = load(work + c * stride);
        for (int p = 0; p < kPanel; ++p) value = value - error[p] * splat(factor[p * a.k + c]);
        store(work + c * stride, value);
    }
}

// What the rows of a column are rounded from, each in its turn: with F the errors so far, row l from
// value_l - sum over i < l of taken[i, l] F_i.
static inline void make_up(const float* taken, std::int64_t rows, std::int64_t b, Lanes top, const float* value,
                           const float* scale, const float* zero_point, float* wish) {
    alignas(64) float errors[kLanes];
    for (std::int64_t v = 0; v < b; v += kLanes) store(wish + v, load(value + v));
    for (std::int64_t v = 0; v < rows; v += kLanes) {
        const Lanes w = load(value + v), s = load(scale + v), z = load(zero_point + v);
        for (std::int64_t r = v; r < (rows < v + kLanes ? rows : v + kLanes); ++r) {
            // of all sixteen, since the one that is next costs as much alone
            store(errors, s * (code_of(load(wish + v), s, z, top) - z) - w);
            const Lanes error = splat(errors[r - v]);
            for (std::int64_t u = v; u < b; u += kLanes) store(wish + u, load(wish + u) - error * load(taken + r * b + u));
        }
    }
}

// Inlined for both kinds of rows, so that where they are independent b is a constant.
static inline __attribute__((always_inline)) void gptq_rows(const GptqArgs& a, std::int64_t first, std::int64_t b,
                                                            const float* taken, float* scratch) {
    const std::int64_t k = a.k, rows = a.rows - first < b ? a.rows - first : b, offset = first * k;
    float *work = scratch, *scale = work + b * k, *zero_point = scale + b * k, *wish = zero_point + b * k;  // [k, b], [b]
    as_columns(a.work + offset, rows, k, b, 0.0f, work);
    as_columns(a.scale + offset, rows, k, b, 1.0f, scale);
    as_columns(a.zero_point + offset, rows, k, b, 0.0f, zero_point);
    const Lanes top = splat(a.top);
    for (std::int64_t j = 0; j < k; ++j) {
        // Columns behind the four of this panel wait until all four errors are known, then take them in order.
        const std::int64_t panel_end = j / kPanel * kPanel + kPanel < k ? j / kPanel * kPanel + kPanel : k, at = j * b;
        const float* factor = a.factor + j * k;
        if (taken) make_up(taken, rows, b, top, work + at, scale + at, zero_point + at, wish);
        for (std::int64_t v = 0; v < rows; v += kLanes) {
            const Lanes value = load(work + at + v), s = load(scale + at + v), z = load(zero_point + at + v);
            const Lanes before = taken ? load(wish + v) : value, code = code_of(before, s, z, top);
            const Lanes error = (value - s * (code - z)) / splat(factor[j]);
            store(work + at + v, before);
            store(scale + at + v, error);  // the column's scale and zero point are spent
            store(zero_point + at + v, code);
            for (std::int64_t c = j + 1; c < panel_end; ++c)
                store(work + c * b + v, load(work + c * b + v) - error * splat(factor[c]));
            if (j + 1 == panel_end && panel_end < k) pass_on(a, j + 1 - kPanel, scale + v, work + v, b);
        }
    }
    as_rows(work, rows, k, b, a.work + offset);
    as_rows(scale, rows, k, b, a.error + offset);
    as_rows(zero_point, rows, k, b, a.code + offset);
}

static void gptq(const GptqArgs& a, Rows blocks, float* scratch) {
    for (std::int64_t i = blocks.begin; i < blocks.end; ++i) {
        if (a.taken) gptq_rows(a, i * a.block, a.block, a.taken + i * a.block * a.block, scratch);
        else gptq_rows(a, i * kLanes, kLanes, nullptr, scratch);
    }
}
