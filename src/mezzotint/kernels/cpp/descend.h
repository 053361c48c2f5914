// One block of coordinate descent over codes: sixteen rows in the lanes, each column to its best code in turn, and in a
// column all rows at once, or each in turn where they share a quadratic.

// Adds what the panel that starts at column `first` changed to the gradient of all columns behind it; columns are
// `stride` apart.
static inline void follow(const DescendArgs& a, std::int64_t first, const float* changes, float* gradient,
                          std::int64_t stride) {
    const float* gram = a.gram + first * a.k;
    Lanes change[kPanel];
    for (int p = 0; p < kPanel; ++p) change[p] = load(changes + (first + p) * stride);
    for (std::int64_t c = first + kPanel; c < a.k; ++c) {
        Lanes slope = load(gradient + c * stride);
        for (int p = 0; p < kPanel; ++p) slope = slope + change[p] * splat(gram[p * a.k + c]);
        store(gradient + c * stride, slope);
    }
}

static void descend_sixteen(const DescendArgs& a, std::int64_t first, std::int64_t rows, float* scratch) {
    const std::int64_t k = a.k;
    float *gradient = scratch, *value = gradient + kLanes * k, *scale = value + kLanes * k,
          *zero_point = scale + kLanes * k, *change = zero_point + kLanes * k;  // [k, 16] each
    for (std::int64_t r = 0; r < kLanes; ++r) {
        const bool real = r < rows;
        for (std::int64_t j = 0; j < k; ++j) {
            const std::int64_t from = (first + r) * k + j, to = j * kLanes + r;
            gradient[to] = real ? a.gradient[from] : 0.0f;
            value[to] = real ? a.value[from] : 0.0f;
            scale[to] = real ? a.scale[from] : 1.0f;
            zero_point[to] = real ? a.zero_point[from] : 0.0f;
        }
    }
    const Lanes top = splat(a.top);
    for (std::int64_t j = 0; j < k; ++j) {
        const std::int64_t panel_end = j / kPanel * kPanel + kPanel < k ? j / kPanel * kPanel + kPanel : k;
        const float* gram = a.gram + j * k;
        const bool live = gram[j] > 0.0f;  // an input that never fires: nothing to gain, the code stays
        const Lanes old = load(value + j * kLanes), s = load(scale + j * kLanes), z = load(zero_point + j * kLanes);
        const Lanes ideal = live ? old - load(gradient + j * kLanes) / splat(gram[j]) : old;
        const Lanes code = code_of(ideal, s, z, top);
        const Lanes now = s * (code - z), step = now - old;
        store(zero_point + j * kLanes, code);  // the column's zero point is spent
        store(value + j * kLanes, now);
        store(change + j * kLanes, step);
        for (std::int64_t c = j + 1; c < panel_end; ++c)
            store(gradient + c * kLanes, load(gradient + c * kLanes) + step * splat(gram[c]));
        if (j + 1 == panel_end && panel_end < k) follow(a, j + 1 - kPanel, change, gradient, kLanes);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t j = 0; j < k; ++j) {
            const std::int64_t to = (first + r) * k + j, from = j * kLanes + r;
            a.value[to] = value[from];
            a.code[to] = static_cast<std::uint8_t>(static_cast<std::int32_t>(zero_point[from]));
        }
    }
}

static void descend(const DescendArgs& a, Rows rows, float* scratch) {
    for (std::int64_t r = rows.begin; r < rows.end; r += kLanes)
        descend_sixteen(a, r, rows.end - r < kLanes ? rows.end - r : kLanes, scratch);
}

// A block of a.block rows that share a quadratic, with `curvature` A between them: the gradient is A (V G - C).
static void descend_joint_block(const DescendArgs& a, std::int64_t block, float* scratch) {
    const std::int64_t k = a.k, b = a.block, first = block * b, rows = a.rows - first < b ? a.rows - first : b;
    float *gradient = scratch, *value = gradient + b * k, *scale = value + b * k, *zero_point = scale + b * k,
          *change = zero_point + b * k;  // [k, b] each
    float* slope = change + b * k;       // [b]
    const float* curvature = a.curvature + block * b * b;
    for (std::int64_t r = 0; r < b; ++r) {
        const bool real = r < rows;
        for (std::int64_t j = 0; j < k; ++j) {
            const std::int64_t from = (first + r) * k + j, to = j * b + r;
            gradient[to] = real ? a.gradient[from] : 0.0f;
            value[to] = real ? a.value[from] : 0.0f;
            scale[to] = real ? a.scale[from] : 1.0f;
            zero_point[to] = real ? a.zero_point[from] : 0.0f;
            change[to] = 0.0f;
        }
    }
    const Lanes top = splat(a.top);
    alignas(64) float diagonal[kLanes], steps[kLanes];
    for (std::int64_t j = 0; j < k; ++j) {
        const std::int64_t panel_end = j / kPanel * kPanel + kPanel < k ? j / kPanel * kPanel + kPanel : k;
        const float* gram = a.gram + j * k;
        const bool live = gram[j] > 0.0f;  // an input that never fires: nothing to gain, the code stays
        const Lanes spread = splat(gram[j]);
        for (std::int64_t r = 0; r < b; r += kLanes) store(slope + r, load(gradient + j * b + r));
        for (std::int64_t v = 0; v < rows; v += kLanes) {
            const Lanes old = load(value + j * b + v), s = load(scale + j * b + v), z = load(zero_point + j * b + v);
            const std::int64_t end = rows - v < kLanes ? rows - v : kLanes;
            for (std::int64_t r = 0; r < kLanes; ++r) diagonal[r] = r < end ? curvature[(v + r) * b + v + r] : 1.0f;
            const Lanes bend = load(diagonal) * spread;
            for (std::int64_t r = 0; r < end; ++r) {
                const Lanes ideal = live ? old - load(slope + v) / bend : old;
                const Lanes code = code_of(ideal, s, z, top);
                const Lanes now = s * (code - z);
                store(steps, now - old);
                const float step = steps[r];
                store(steps, now);
                value[j * b + v + r] = steps[r];
                store(steps, code);
                zero_point[j * b + v + r] = steps[r];  // spent: `z` holds it
                const Lanes here = splat(step);
                const float* give = curvature + (v + r) * b;
                for (std::int64_t u = 0; u < b; u += kLanes) {
                    const Lanes given = here * load(give + u);
                    store(change + j * b + u, load(change + j * b + u) + given);
                    store(slope + u, load(slope + u) + given * spread);
                }
            }
        }
        for (std::int64_t v = 0; v < rows; v += kLanes) {
            const Lanes step = load(change + j * b + v);
            for (std::int64_t c = j + 1; c < panel_end; ++c)
                store(gradient + c * b + v, load(gradient + c * b + v) + step * splat(gram[c]));
            if (j + 1 == panel_end && panel_end < k) follow(a, j + 1 - kPanel, change + v, gradient + v, b);
        }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t j = 0; j < k; ++j) {
            const std::int64_t to = (first + r) * k + j, from = j * b + r;
            a.value[to] = value[from];
            a.code[to] = static_cast<std::uint8_t>(static_cast<std::int32_t>(zero_point[from]));
        }
    }
}

static void descend_joint(const DescendArgs& a, Rows blocks, float* scratch) {
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block) descend_joint_block(a, block, scratch);
}
