// One block of GPTQ (Alg. 1), sixteen rows in the lanes: rows are independent, columns follow one another.

constexpr std::int64_t kPanel = 4;

// Takes the errors of the panel that starts at column `first` from all columns behind it.
static inline void pass_on(const GptqArgs& a, std::int64_t first, const float* errors, float* work) {
    const float* factor = a.factor + first * a.k;
    Lanes error[kPanel];
    for (int p = 0; p < kPanel; ++p) error[p] = load(errors + (first + p) * kLanes);
    for (std::int64_t c = first + kPanel; c < a.k; ++c) {
        Lanes value = load(work + c * kLanes);
        for (int p = 0; p < kPanel; ++p) value = value - error[p] * splat(factor[p * a.k + c]);
        store(work + c * kLanes, value);
    }
}

static void gptq_sixteen(const GptqArgs& a, std::int64_t first, std::int64_t rows, float* scratch) {
    const std::int64_t k = a.k;
    float *work = scratch, *scale = work + kLanes * k, *zero_point = scale + kLanes * k;  // [k, 16] each
    for (std::int64_t r = 0; r < kLanes; ++r) {
        const bool real = r < rows;
        for (std::int64_t j = 0; j < k; ++j) {
            const std::int64_t from = (first + r) * k + j, to = j * kLanes + r;
            work[to] = real ? a.work[from] : 0.0f;
            scale[to] = real ? a.scale[from] : 1.0f;
            zero_point[to] = real ? a.zero_point[from] : 0.0f;
        }
    }
    const Lanes top = splat(a.top);
    for (std::int64_t j = 0; j < k; ++j) {
        // Columns behind the four of this panel wait until all four errors are known, then take them in order.
        const std::int64_t panel_end = j / kPanel * kPanel + kPanel < k ? j / kPanel * kPanel + kPanel : k;
        const float* factor = a.factor + j * k;
        const Lanes value = load(work + j * kLanes), s = load(scale + j * kLanes), z = load(zero_point + j * kLanes);
        const Lanes code = code_of(value, s, z, top);
        const Lanes error = (value - s * (code - z)) / splat(factor[j]);
        store(scale + j * kLanes, error);  // the column's scale and zero point are spent
        store(zero_point + j * kLanes, code);
        for (std::int64_t c = j + 1; c < panel_end; ++c)
            store(work + c * kLanes, load(work + c * kLanes) - error * splat(factor[c]));
        if (j + 1 == panel_end && panel_end < k) pass_on(a, j + 1 - kPanel, scale, work);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t j = 0; j < k; ++j) {
            const std::int64_t to = (first + r) * k + j, from = j * kLanes + r;
            a.work[to] = work[from];
            a.error[to] = scale[from];
            a.code[to] = static_cast<std::uint8_t>(static_cast<std::int32_t>(zero_point[from]));
        }
    }
}

static void gptq(const GptqArgs& a, Rows rows, float* scratch) {
    for (std::int64_t r = rows.begin; r < rows.end; r += kLanes)
        gptq_sixteen(a, r, rows.end - r < kLanes ? rows.end - r : kLanes, scratch);
}
