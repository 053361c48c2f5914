// Codes to a dense bit stream and back; see unpacking.h for the way back.

// Bytes of `bits` used bits each -> 8 * bits adjacent bits: pairs, fours, eight.
template <int bits>
static inline std::uint64_t squeeze(std::uint64_t x) {
    if constexpr (bits == 8) return x;
    const std::uint64_t low1 = every(16, bits), low2 = every(32, 2 * bits), low3 = (std::uint64_t(1) << (4 * bits)) - 1;
    x = (x & low1) | ((x >> (8 - bits)) & (low1 << bits));
    x = (x & low2) | ((x >> (16 - 2 * bits)) & (low2 << (2 * bits)));
    return (x & low3) | ((x >> (32 - 4 * bits)) & (low3 << (4 * bits)));
}

template <int bits>
static std::uint64_t pack_row(const std::uint8_t* code, std::uint8_t* out, std::int64_t n, std::int64_t row_bytes) {
    std::uint64_t seen = 0;
    std::int64_t j = 0, at = 0;
    for (; j + 8 <= n && at + 8 <= row_bytes; j += 8, at += bits) {  // writes past its codes, into what comes next
        std::uint64_t x;
        __builtin_memcpy(&x, code + j, 8);
        seen |= x;
        x = squeeze<bits>(x);
        __builtin_memcpy(out + at, &x, 8);
    }
    for (; j < n; j += 8, at += bits) {
        std::uint64_t x = 0;
        copy_bytes(&x, code + j, n - j < 8 ? n - j : 8);
        seen |= x;
        x = squeeze<bits>(x);
        copy_bytes(out + at, &x, row_bytes - at < bits ? row_bytes - at : bits);
    }
    for (; at < row_bytes; ++at) out[at] = 0;
    return seen;
}

template <int bits>
static bool pack_rows(const PackArgs& a, Rows rows) {
    std::uint64_t seen = 0;
    for (std::int64_t r = rows.begin; r < rows.end; ++r)
        seen |= pack_row<bits>(a.code + r * a.n, a.packed + r * a.row_bytes, a.n, a.row_bytes);
    return (seen & ~every(8, bits)) == 0;
}

template <int bits>
static void unpack_rows(const PackArgs& a, Rows rows) {
    for (std::int64_t r = rows.begin; r < rows.end; ++r)
        unpack_row<bits>(a.packed + r * a.row_bytes, a.code + r * a.n, a.n, a.row_bytes);
}

static bool pack(const PackArgs& a, Rows rows) {
    switch (a.bits) {
        case 1: return pack_rows<1>(a, rows);
        case 2: return pack_rows<2>(a, rows);
        case 3: return pack_rows<3>(a, rows);
        case 4: return pack_rows<4>(a, rows);
        case 5: return pack_rows<5>(a, rows);
        case 6: return pack_rows<6>(a, rows);
        case 7: return pack_rows<7>(a, rows);
        default: return pack_rows<8>(a, rows);
    }
}

static void unpack(const PackArgs& a, Rows rows) {
    switch (a.bits) {
        case 1: return unpack_rows<1>(a, rows);
        case 2: return unpack_rows<2>(a, rows);
        case 3: return unpack_rows<3>(a, rows);
        case 4: return unpack_rows<4>(a, rows);
        case 5: return unpack_rows<5>(a, rows);
        case 6: return unpack_rows<6>(a, rows);
        case 7: return unpack_rows<7>(a, rows);
        default: return unpack_rows<8>(a, rows);
    }
}
