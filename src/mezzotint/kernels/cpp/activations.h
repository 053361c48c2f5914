// Activations as whole multiples of one unit per row: x ~ unit * q with unit = max|x| / 32639 and |q| <= 32639.
//
// Products of codes and q are then sums of integers, which are exact in any order: every level gives the same bits.
// Per input |x - unit * q| <= 0.506 * unit (half a unit, and three float32 roundings of at most 32639 * 2^-24 units
// each), so that |product - W x| <= 0.506 / 32639 * max|x| * sum|w| < max|x| * sum|w| / 64500.

// Fills q and returns the unit; NaN, with zeros in q, if an input is not finite: then the products are NaN as well.
static double quantize_row(const float* x, std::int64_t n, std::int16_t* q) {
    std::uint32_t top = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        std::uint32_t bits;
        __builtin_memcpy(&bits, x + i, 4);
        bits &= 0x7fffffffu;
        top = bits > top ? bits : top;
    }
    if (top == 0 || top >= 0x7f800000u) {
        for (std::int64_t i = 0; i < n; ++i) q[i] = 0;
        return top == 0 ? 0.0 : static_cast<double>(__builtin_nanf(""));
    }
    float largest;
    __builtin_memcpy(&largest, &top, 4);
    const float lift = largest < 0x1p-60f ? 0x1p90f : 1.0f;  // exact; without it the inverse of a tiny maximum overflows
    const float inverse = static_cast<float>(kInputTop) / (largest * lift);
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds half to even
    for (std::int64_t i = 0; i < n; ++i)
        q[i] = static_cast<std::int16_t>(static_cast<std::int32_t>(((x[i] * lift) * inverse + magic) - magic));
    return static_cast<double>(largest) / kInputTop;
}
