// One element after the other.

static constexpr std::int64_t kRun = 16, kLeastRun = 16, kLanesPerStrip = 16;  // strips at a time; 32-bit words for each

// Centred codes of a tile by output and input, inputs in fragment order.
template <int states>
static void decode_tile(const std::uint32_t* tile, int rate, std::int16_t (*code)[16]) {
    for (int e = 0; e < 256; ++e) {
        const int last = (end_bit(e, rate) - 1) / 32, shift = 32 * (last + 1) - end_bit(e, rate);
        const std::uint64_t window = std::uint64_t(tile[last == 0 ? rate - 1 : last - 1]) << 32 | tile[last];
        const std::uint32_t bits = static_cast<std::uint32_t>(window >> shift) & ((1u << states) - 1);
        const std::uint32_t hashed = bits * kMultiplier;
        const std::uint32_t pairs = (hashed & 0xff00ffu) + (hashed >> 8 & 0xff00ffu);
        const int t = e / 8, m = e % 8;
        code[t / 4 + 8 * (m / 4)][t % 4 * 4 + 3 - m % 4] = static_cast<std::int16_t>((pairs & 0xffffu) + (pairs >> 16)) - 510;
    }
}

template <int states, int rows>
static void trellis_block(const TrellisProductArgs& a, const Work& work, std::uint32_t*, std::int64_t* total) {
    for (std::int64_t i = work.first_tile; i < work.first_tile + work.tiles; ++i)
        for (std::int64_t s = 0; s < work.strips; ++s) {
            std::int16_t code[16][16];
            decode_tile<states>(a.packed + (i * a.out_tiles + work.first_strip + s) * a.rate, a.rate, code);
            for (int b = 0; b < rows; ++b) {
                const std::int16_t* q = a.q + ((work.first_row + b) * a.in_tiles + i) * 16;
                for (int c = 0; c < 16; ++c) {
                    std::int32_t sum = 0;
                    for (int r = 0; r < 16; ++r) sum += code[c][r] * q[r];
                    total[(s * rows + b) * 16 + c] += sum;
                }
            }
        }
}
