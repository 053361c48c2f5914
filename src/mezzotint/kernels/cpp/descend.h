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

// The rows of a column move in turn: row i by its slope over curvature[i, i] * spread, and all slopes follow. Leaves values,
// codes in the place of zero points, and in `change` what the steps come to in every row, curvature * steps.
static inline void move_in_turn(const float* curvature, float spread, std::int64_t rows, std::int64_t b, Lanes top,
                                const float* scale, float* slope, float* value, float* zero_point, float* change) {
    alignas(64) float bends[kLanes], moved[kLanes], codes[kLanes];
    for (std::int64_t v = 0; v < b; v += kLanes) store(change + v, splat(0.0f));
    for (std::int64_t v = 0; v < rows; v += kLanes) {
        const std::int64_t end = rows < v + kLanes ? rows : v + kLanes;
        const Lanes old = load(value + v), s = load(scale + v), z = load(zero_point + v);
        for (std::int64_t r = v; r < v + kLanes; ++r) bends[r - v] = (r < end ? curvature[r * b + r] : 1.0f) * spread;
        for (std::int64_t r = v; r < end; ++r) {
            const Lanes ideal = spread > 0.0f ? old - load(slope + v) / load(bends) : old;
            const Lanes code = code_of(ideal, s, z, top);
            store(codes, code);
            store(moved, s * (code - z));
            const Lanes step = splat(moved[r - v] - value[r]);
            value[r] = moved[r - v];
            zero_point[r] = codes[r - v];
            for (std::int64_t u = 0; u < b; u += kLanes) {
                const Lanes given = step * load(curvature + r * b + u);
                store(change + u, load(change + u) + given);
                store(slope + u, load(slope + u) + given * splat(spread));
            }
        }
    }
}

// Inlined for both kinds of rows, so that where they are independent b is a constant.
static inline __attribute__((always_inline)) void descend_rows(const DescendArgs& a, std::int64_t first, std::int64_t b,
                                                               const float* curvature, float* scratch) {
    const std::int64_t k = a.k, rows = a.rows - first < b ? a.rows - first : b, offset = first * k;
    float *gradient = scratch, *value = gradient + b * k, *scale = value + b * k, *zero_point = scale + b * k,
          *change = zero_point + b * k;  // [k, b] each
    as_columns(a.gradient + offset, rows, k, b, 0.0f, gradient);
    as_columns(a.value + offset, rows, k, b, 0.0f, value);
    as_columns(a.scale + offset, rows, k, b, 1.0f, scale);
    as_columns(a.zero_point + offset, rows, k, b, 0.0f, zero_point);
    const Lanes top = splat(a.top);
    for (std::int64_t j = 0; j < k; ++j) {
        const std::int64_t panel_end = j / kPanel * kPanel + kPanel < k ? j / kPanel * kPanel + kPanel : k, at = j * b;
        const float* gram = a.gram + j * k;
        const bool live = gram[j] > 0.0f;  // an input that never fires: nothing to gain, the code stays
        if (curvature)  // nothing reads the gradient of this column any more
            move_in_turn(curvature, gram[j], rows, b, top, scale + at, gradient + at, value + at, zero_point + at, change + at);
        for (std::int64_t v = 0; v < rows; v += kLanes) {
            if (!curvature) {
                const Lanes old = load(value + at + v), s = load(scale + at + v), z = load(zero_point + at + v);
                const Lanes ideal = live ? old - load(gradient + at + v) / splat(gram[j]) : old;
                const Lanes code = code_of(ideal, s, z, top), now = s * (code - z);
                store(zero_point + at + v, code);  // the column's zero point is spent
                store(value + at + v, now);
                store(change + at + v, now - old);
            }
            const Lanes step = load(change + at + v);
            for (std::int64_t c = j + 1; c < panel_end; ++c)
                store(gradient + c * b + v, load(gradient + c * b + v) + step * splat(gram[c]));
            if (j + 1 == panel_end && panel_end < k) follow(a, j + 1 - kPanel, change + v, gradient + v, b);
        }
    }
    as_rows(value, rows, k, b, a.value + offset);
    as_rows(zero_point, rows, k, b, a.code + offset);
}

static void descend(const DescendArgs& a, Rows blocks, float* scratch) {
    for (std::int64_t i = blocks.begin; i < blocks.end; ++i) {
        if (a.curvature) descend_rows(a, i * a.block, a.block, a.curvature + i * a.block * a.block, scratch);
        else descend_rows(a, i * kLanes, kLanes, nullptr, scratch);
    }
}
