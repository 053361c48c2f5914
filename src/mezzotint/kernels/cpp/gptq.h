// One block of GPTQ (Alg. 1), sixteen rows in the lanes: columns follow one another; rows are independent, or make up for
// the errors of rows before them.

constexpr std::int64_t kPanel = 4;

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
        if (j + 1 == panel_end && panel_end < k) pass_on(a, j + 1 - kPanel, scale, work, kLanes);
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

// A block of a.block rows, whose columns are rounded row by row: with F the errors so far, row i is rounded from
// work_i - sum over l < i of taken[i, l] F_l.
static void gptq_joint_block(const GptqArgs& a, std::int64_t block, float* scratch) {
    const std::int64_t k = a.k, b = a.block, first = block * b, rows = a.rows - first < b ? a.rows - first : b;
    float *work = scratch, *scale = work + b * k, *zero_point = scale + b * k, *before = zero_point + b * k;  // [k, b]
    float* wish = before + b * k;                                                                           // [b]
    const float* taken = a.taken + block * b * b;  // [b, b], of each row what it gives to the others
    for (std::int64_t r = 0; r < b; ++r) {
        const bool real = r < rows;
        for (std::int64_t j = 0; j < k; ++j) {
            const std::int64_t from = (first + r) * k + j, to = j * b + r;
            work[to] = real ? a.work[from] : 0.0f;
            scale[to] = real ? a.scale[from] : 1.0f;
            zero_point[to] = real ? a.zero_point[from] : 0.0f;
        }
    }
    const Lanes top = splat(a.top);
    alignas(64) float errors[kLanes];
    for (std::int64_t j = 0; j < k; ++j) {
        const std::int64_t panel_end = j / kPanel * kPanel + kPanel < k ? j / kPanel * kPanel + kPanel : k;
        const float* factor = a.factor + j * k;
        const Lanes pivot = splat(factor[j]);
        for (std::int64_t r = 0; r < b; r += kLanes) store(wish + r, load(work + j * b + r));
        for (std::int64_t v = 0; v < rows; v += kLanes) {
            const Lanes value = load(work + j * b + v), s = load(scale + j * b + v), z = load(zero_point + j * b + v);
            const std::int64_t end = rows - v < kLanes ? rows - v : kLanes;
            for (std::int64_t r = 0; r < end; ++r) {
                // of all sixteen, since the one that is next costs as much alone
                store(errors, s * (code_of(load(wish + v), s, z, top) - z) - value);
                const Lanes error = splat(errors[r]);
                const float* give = taken + (v + r) * b;
                for (std::int64_t u = v; u < b; u += kLanes) store(wish + u, load(wish + u) - error * load(give + u));
            }
            const Lanes code = code_of(load(wish + v), s, z, top);
            store(scale + j * b + v, (value - s * (code - z)) / pivot);  // the column's scale and zero point are spent
            store(zero_point + j * b + v, code);
            store(before + j * b + v, load(wish + v));
        }
        for (std::int64_t v = 0; v < rows; v += kLanes) {
            const Lanes error = load(scale + j * b + v);
            for (std::int64_t c = j + 1; c < panel_end; ++c)
                store(work + c * b + v, load(work + c * b + v) - error * splat(factor[c]));
            if (j + 1 == panel_end && panel_end < k) pass_on(a, j + 1 - kPanel, scale + v, work + v, b);
        }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t j = 0; j < k; ++j) {
            const std::int64_t to = (first + r) * k + j, from = j * b + r;
            a.work[to] = before[from];
            a.error[to] = scale[from];
            a.code[to] = static_cast<std::uint8_t>(static_cast<std::int32_t>(zero_point[from]));
        }
    }
}

static void gptq_joint(const GptqArgs& a, Rows blocks, float* scratch) {
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block) gptq_joint_block(a, block, scratch);
}
