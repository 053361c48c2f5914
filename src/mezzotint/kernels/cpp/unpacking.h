// A dense bit stream to codes, eight codes at a time inside one 64-bit word (no special instructions needed).

static inline std::uint64_t every(int period, int ones) {
    std::uint64_t mask = 0;
    for (int at = 0; at < 64; at += period) mask |= ((std::uint64_t(1) << ones) - 1) << at;
    return mask;
}

// 8 * bits adjacent bits -> bytes of `bits` used bits each: halves, quarters, eighths.
template <int bits>
static inline std::uint64_t spread(std::uint64_t x) {
    if constexpr (bits == 8) return x;
    const std::uint64_t low1 = every(16, bits), low2 = every(32, 2 * bits), low3 = (std::uint64_t(1) << (4 * bits)) - 1;
    x = (x & low3) | ((x & (low3 << (4 * bits))) << (32 - 4 * bits));
    x = (x & low2) | ((x & (low2 << (2 * bits))) << (16 - 2 * bits));
    return (x & low1) | ((x & (low1 << bits)) << (8 - bits));
}

static inline void copy_bytes(void* to, const void* from, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) static_cast<char*>(to)[i] = static_cast<const char*>(from)[i];
}

template <int bits>
static void unpack_row(const std::uint8_t* in, std::uint8_t* code, std::int64_t n, std::int64_t row_bytes) {
    std::int64_t j = 0, at = 0;
    for (; j + 8 <= n && at + 8 <= row_bytes; j += 8, at += bits) {
        std::uint64_t x;
        __builtin_memcpy(&x, in + at, 8);
        x = spread<bits>(x);
        __builtin_memcpy(code + j, &x, 8);
    }
    for (; j < n; j += 8, at += bits) {
        std::uint64_t x = 0;
        copy_bytes(&x, in + at, row_bytes - at < bits ? row_bytes - at : bits);
        x = spread<bits>(x);
        copy_bytes(code + j, &x, n - j < 8 ? n - j : 8);
    }
}
