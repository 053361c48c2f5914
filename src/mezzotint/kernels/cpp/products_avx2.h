// AVX2: one register holds the same quad of the four t of one output, so its 16 codes meet the 16 inputs of the tile.

static constexpr std::int64_t kRun = 32, kLeastRun = 8, kLanesPerStrip = 128;  // strips at a time; 32-bit words for each

struct alignas(32) Windows {
    std::uint8_t byte[16][32];   // [8 * half + output % 8]: bytes of both 16-byte loads -> windows of the four t
    std::int64_t drop[16][4];    // bits after the last element of the quad in its window
    std::int64_t raise[2][3][4]; // [half]: shifts that bring the elements before it to their words
    std::int32_t dword[16][2];   // first dword of both loads; -1 is the last dword of the tile
};

static constexpr Windows make_windows(int rate) {
    Windows w{};
    for (int at = 0; at < 16; ++at)
        for (int lane = 0; lane < 4; ++lane) {
            const int first = 8 * (4 * (at % 8) + lane) + 4 * (at / 8), last_byte = (end_bit(first + 3, rate) - 1) / 8;
            const int pair = first - 8 * (lane % 2);  // the element whose state starts the load
            const int start = end_bit(pair, rate) - 16, floor = start < 0 ? -1 : start / 32;
            const int dword = floor < rate - 4 ? floor : rate - 4;
            w.dword[at][lane / 2] = dword;
            w.drop[at][lane] = 8 * (last_byte + 1) - end_bit(first + 3, rate);
            for (int i = 0; i < 8; ++i) {
                const int byte = last_byte - i - 4 * dword;  // in the order of the string, from the start of the load
                const int stored = byte / 4 * 4 + 3 - byte % 4;
                w.byte[at][8 * lane + i] = static_cast<std::uint8_t>(byte < 0 ? 0x80 : stored);
            }
            for (int m = 0; m < 3; ++m)
                w.raise[at / 8][m][lane] = 16 * (3 - m) - (end_bit(first + 3, rate) - end_bit(first + m, rate));
        }
    return w;
}

struct AllWindows {
    Windows of[kMostRate - kLeastRate + 1];
};
static constexpr AllWindows make_all_windows() {
    AllWindows all{};
    for (int rate = kLeastRate; rate <= kMostRate; ++rate) all.of[rate - kLeastRate] = make_windows(rate);
    return all;
}
static constexpr AllWindows kWindows = make_all_windows();

static inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

template <int states>
static inline __m256i codes_of_output(__m128i first, __m128i second, const Windows& w, int at) {
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
    const __m256i window = _mm256_srlv_epi64(_mm256_shuffle_epi8(both, load256(w.byte[at])), load256(w.drop[at]));
    const auto raised = [&](int m) { return _mm256_sllv_epi64(window, load256(w.raise[at / 8][m])); };
    __m256i state = _mm256_blend_epi16(_mm256_blend_epi16(window, raised(2), 0x22),
                                       _mm256_blend_epi16(raised(1), raised(0), 0x88), 0xcc);
    if constexpr (states < 16) state = _mm256_and_si256(state, _mm256_set1_epi16((1 << states) - 1));
    const __m256i low_factor = _mm256_set1_epi16(static_cast<short>(kMultiplier & 0xffffu));
    const __m256i high_factor = _mm256_set1_epi16(static_cast<short>(kMultiplier >> 16));
    const __m256i low = _mm256_mullo_epi16(state, low_factor);
    const __m256i high = _mm256_add_epi16(_mm256_mulhi_epu16(state, low_factor), _mm256_mullo_epi16(state, high_factor));
    const __m256i ones = _mm256_set1_epi8(1);
    return _mm256_add_epi16(_mm256_maddubs_epi16(low, ones), _mm256_maddubs_epi16(high, ones));
}

// Lane i of an output has the inputs 2 i and 2 i + 1 of every tile, in fragment order.
template <int states, int rows>
static void trellis_block(const TrellisProductArgs& a, const Work& work, std::uint32_t* lanes, std::int64_t* total) {
    const Windows& w = kWindows.of[a.rate - kLeastRate];
    for (std::int64_t i = 0; i < 128 * work.strips * rows; ++i) lanes[i] = 0;
    for (std::int64_t i = work.first_tile; i < work.first_tile + work.tiles; ++i) {
        const std::uint32_t* tile = a.packed + (i * a.out_tiles + work.first_strip) * a.rate;
        __m256i q[rows];
        for (int b = 0; b < rows; ++b) q[b] = load256(a.q + ((work.first_row + b) * a.in_tiles + i) * 16);
        std::uint32_t* sums = lanes;
        for (std::int64_t s = 0; s < work.strips; ++s, tile += a.rate) {
            const __m128i start = _mm_insert_epi32(_mm_slli_si128(load128(tile), 4), static_cast<int>(tile[a.rate - 1]), 0);
            for (int at = 0; at < 16; ++at, sums += 8 * rows) {
                const std::int32_t* dword = w.dword[at];
                const __m128i first = dword[0] < 0 ? start : load128(tile + dword[0]);
                const __m256i code = codes_of_output<states>(first, load128(tile + dword[1]), w, at);
                for (int b = 0; b < rows; ++b) {
                    __m256i* sum = reinterpret_cast<__m256i*>(sums + 8 * b);
                    _mm256_store_si256(sum, _mm256_add_epi32(_mm256_load_si256(sum), _mm256_madd_epi16(code, q[b])));
                }
            }
        }
    }
    const std::int64_t blocks = (a.in_tiles + kTilesPerBlock - 1) / kTilesPerBlock;
    for (std::int64_t s = 0; s < work.strips; ++s)
        for (int c = 0; c < 16; ++c)
            for (int b = 0; b < rows; ++b) {
                const std::uint32_t* sums = lanes + ((s * 16 + c) * rows + b) * 8;
                const std::uint32_t* offset = a.offset + ((work.first_row + b) * blocks + work.first_tile / kTilesPerBlock) * 8;
                std::int64_t sum = 0;
                for (int i = 0; i < 8; ++i) sum += static_cast<std::int32_t>(sums[i] - offset[i]);
                total[(s * rows + b) * 16 + c] += sum;
            }
}
