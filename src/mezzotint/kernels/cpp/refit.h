// Scales and zero points of one group of columns, refitted row after row where the rows of a block share a quadratic.

// A step where it lowers step^2 * bend + 2 * step * slope, else none.
static inline float falling(float step, float slope, float bend) {
    return step * (step * bend + 2.0f * slope) < 0.0f ? step : 0.0f;
}

static void refit_rows(const RefitArgs& a, std::int64_t first, const float* between, const float* curvature) {
    const std::int64_t b = a.block, rows = a.rows - first < b ? a.rows - first : b;
    const float tiny = 0x1p-126f;
    float *pull = a.pull + first, *lift = a.lift + first;
    const float* both = a.both + first;
    for (std::int64_t i = 0; i < rows; ++i) {
        const float weight = curvature[i * b + i], old = a.scale[first + i], zero_point = a.zero_point[first + i];
        const float bend = weight * a.own[first + i], ideal = old - pull[i] / (bend > tiny ? bend : tiny);
        const bool near = ideal > 0.5f * old && ideal < 2.0f * old;
        const float step = bend > tiny && near ? stored_scale(ideal, a.scale_type) - old : 0.0f;
        const float stretch = falling(step, pull[i], bend), scale = old + stretch;
        const float slope = lift[i] + stretch * (weight * both[i]), flat = weight * a.flat;
        float wish = rint_scalar(zero_point + slope / (flat > tiny ? flat : tiny) / scale);
        wish = wish > 0.0f ? wish : 0.0f;
        wish = wish < a.top ? wish : a.top;
        const float shift = a.symmetric ? 0.0f : falling(scale * (zero_point - wish), slope, flat);
        a.scale[first + i] = scale;
        a.zero_point[first + i] = shift == 0.0f ? zero_point : wish;
        a.stretch[first + i] = stretch;
        a.shift[first + i] = shift;
        const float turned = stretch * both[i];
        for (std::int64_t r = 0; r < rows; ++r) {
            const float given = curvature[i * b + r] * shift;
            pull[r] += between[i * b + r] * stretch + given * both[r];
            lift[r] += curvature[i * b + r] * turned + given * a.flat;
        }
    }
}

static void refit(const RefitArgs& a, Rows blocks) {
    const std::int64_t square = a.block * a.block;
    for (std::int64_t i = blocks.begin; i < blocks.end; ++i)
        refit_rows(a, i * a.block, a.between + i * square, a.curvature + i * square);
}
