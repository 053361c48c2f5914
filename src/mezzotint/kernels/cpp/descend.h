// One block of coordinate descent over codes: sixteen rows in the lanes, each column to its best code in turn.

// Adds what the panel that starts at column `first` changed to the gradient of all columns behind it.
static inline void follow(const DescendArgs& a, std::int64_t first, const float* changes, float* gradient) {
    const float* gram = a.gram + first * a.k;
    Lanes change[kPanel];
    for (int p = 0; p < kPanel; ++p) change[p] = load(changes + (first + p) * kLanes);
    for (std::int64_t c = first + kPanel; c < a.k; ++c) {
        Lanes slope = load(gradient + c * kLanes);
        for (int p = 0; p < kPanel; ++p) slope = slope + change[p] * splat(gram[p * a.k + c]);
        store(gradient + c * kLanes, slope);
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
        if (j + 1 == panel_end && panel_end < k) follow(a, j + 1 - kPanel, change, gradient);
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
