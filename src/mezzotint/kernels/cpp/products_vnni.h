// AVX-512 with VBMI and VNNI: a step decodes the same quad of eight groups of four t, output c = lane + 8 * half.
// Ten instructions for 32 weights: permute, multishift, 3 multiplications, 2 byte sums, 2 additions, 1 product per row.

static constexpr std::int64_t kTilesAhead = 8;  // a third more from memory at 5 and 6 bits than a row of tiles ahead
static constexpr std::int64_t kRun = 256, kLeastRun = 16, kLanesPerStrip = 32;  // strips at a time; 32-bit words for each

struct alignas(64) Windows {
    std::int32_t dword[8][16];    // [step = 2 (t % 4) + half]: the two dwords of each lane, the earlier one on top
    std::uint8_t position[8][64]; // lowest bit of each byte of the four states in their lane
    std::uint16_t third[8];       // which dwords come from the third register
    bool split;                   // some quad needs three dwords: the table serves its two later elements only
};

// A quad's window ends with the dword that holds the last bit of its last element, or of its second one.
static constexpr Windows make_windows(int rate, int last_element) {
    Windows w{};
    for (int step = 0; step < 8; ++step)
        for (int lane = 0; lane < 8; ++lane) {
            const int first = 8 * (4 * lane + step / 2) + 4 * (step % 2);
            const int last_dword = (end_bit(first + last_element, rate) - 1) / 32;
            const int dwords[2] = {last_dword, (last_dword + rate - 1) % rate};
            for (int i = 0; i < 2; ++i) {
                w.dword[step][2 * lane + i] = dwords[i];
                if (dwords[i] >= 32) w.third[step] = static_cast<std::uint16_t>(w.third[step] | 1 << (2 * lane + i));
            }
            for (int m = 0; m < 4; ++m) {
                const int low = 32 * (last_dword + 1) - end_bit(first + m, rate);
                w.split = w.split || (m <= last_element && low + 16 > 64);
                w.position[step][8 * lane + 2 * (3 - m)] = static_cast<std::uint8_t>(low & 63);
                w.position[step][8 * lane + 2 * (3 - m) + 1] = static_cast<std::uint8_t>((low + 8) & 63);
            }
        }
    return w;
}

struct AllWindows {
    Windows whole[kMostRate - kLeastRate + 1];
};
static constexpr AllWindows make_all_windows(int last_element) {
    AllWindows all{};
    for (int rate = kLeastRate; rate <= kMostRate; ++rate) all.whole[rate - kLeastRate] = make_windows(rate, last_element);
    return all;
}
static constexpr AllWindows kWindows = make_all_windows(3);
static constexpr int kFirstSplit = 46;
static constexpr Windows kEarlier[2] = {make_windows(kFirstSplit, 1), make_windows(kFirstSplit + 1, 1)};
static constexpr bool only_these_split() {
    for (int rate = kLeastRate; rate <= kMostRate; ++rate)
        if (kWindows.whole[rate - kLeastRate].split != (rate == kFirstSplit || rate == kFirstSplit + 1)) return false;
    return !kEarlier[0].split && !kEarlier[1].split;
}
static_assert(only_these_split(), "windows of 64 bits do not hold their states");

// `registers` hold a tile; with `split` the earlier two elements of a quad have a window of their own.
template <int registers>
static inline __m512i gather(const __m512i* z, const Windows& w, int step) {
    const __m512i at = _mm512_load_si512(w.dword[step]);
    if constexpr (registers == 1) return _mm512_permutexvar_epi32(at, z[0]);
    const __m512i two = _mm512_permutex2var_epi32(z[0], at, z[1]);
    if constexpr (registers == 2) return two;
    return _mm512_mask_permutexvar_epi32(two, w.third[step], at, z[2]);
}

template <int registers, bool split, int states>
static inline __m512i codes_of_step(const __m512i* z, const Windows& w, const Windows& earlier, int step) {
    __m512i state = _mm512_multishift_epi64_epi8(_mm512_load_si512(w.position[step]), gather<registers>(z, w, step));
    if constexpr (split)
        state = _mm512_mask_multishift_epi64_epi8(state, 0xf0f0f0f0f0f0f0f0u, _mm512_load_si512(earlier.position[step]),
                                                  gather<registers>(z, earlier, step));
    if constexpr (states < 16) state = _mm512_and_si512(state, _mm512_set1_epi16((1 << states) - 1));
    const __m512i low_factor = _mm512_set1_epi16(static_cast<short>(kMultiplier & 0xffffu));
    const __m512i high_factor = _mm512_set1_epi16(static_cast<short>(kMultiplier >> 16));
    const __m512i low = _mm512_mullo_epi16(state, low_factor);
    const __m512i high = _mm512_add_epi16(_mm512_mulhi_epu16(state, low_factor), _mm512_mullo_epi16(state, high_factor));
    const __m512i ones = _mm512_set1_epi8(1);
    return _mm512_add_epi16(_mm512_maddubs_epi16(low, ones), _mm512_maddubs_epi16(high, ones));
}

template <int registers, bool split, int states, int rows>
static void trellis_tiles(const TrellisProductArgs& a, const Work& work, std::uint32_t* lanes) {
    const Windows& w = kWindows.whole[a.rate - kLeastRate];
    const Windows& earlier = split ? kEarlier[a.rate - kFirstSplit] : w;
    const __mmask16 rest = static_cast<__mmask16>(0xffffu >> (16 * registers - a.rate));
    const std::int64_t next = a.out_tiles * a.rate;
    for (std::int64_t i = work.first_tile; i < work.first_tile + work.tiles; ++i) {
        const std::int16_t* q = a.q + (work.first_row * a.in_tiles + i) * 16;
        const std::uint32_t* tile = a.packed + (i * a.out_tiles + work.first_strip) * a.rate;
        std::uint32_t* sums = lanes;
        for (std::int64_t s = 0; s < work.strips; ++s, tile += a.rate, sums += 32 * rows) {
            __m512i z[3], sum[rows][2];
            for (int r = 0; r < registers; ++r) {
                z[r] = _mm512_maskz_loadu_epi32(r + 1 < registers ? static_cast<__mmask16>(0xffff) : rest, tile + 16 * r);
            }
            // In the order in which tiles are used: behind the last strip of a row comes the first of the next, a stride away.
            const std::uint32_t* ahead = tile + kTilesAhead * a.rate;
            if (s + kTilesAhead >= work.strips) ahead += next - work.strips * a.rate;
            for (int r = 0; r < registers; ++r) _mm_prefetch(reinterpret_cast<const char*>(ahead + 16 * r), _MM_HINT_T0);
            for (int b = 0; b < rows; ++b)
                for (int half = 0; half < 2; ++half) sum[b][half] = _mm512_load_si512(sums + 32 * b + 16 * half);
#pragma GCC unroll 8
            for (int step = 0; step < 8; ++step) {
                const __m512i code = codes_of_step<registers, split, states>(z, w, earlier, step);
#pragma GCC unroll 8
                for (int b = 0; b < rows; ++b) {
                    long long inputs;
                    __builtin_memcpy(&inputs, q + b * a.in_tiles * 16 + step / 2 * 4, 8);
                    sum[b][step % 2] = _mm512_dpwssd_epi32(sum[b][step % 2], code, _mm512_set1_epi64(inputs));
                }
            }
            for (int b = 0; b < rows; ++b)
                for (int half = 0; half < 2; ++half) _mm512_store_si512(sums + 32 * b + 16 * half, sum[b][half]);
        }
    }
}

// Lane 2 c + i of a half has inputs 4 j + 2 i and 4 j + 2 i + 1 of every tile, in fragment order, of output c.
template <int states, int rows>
static void trellis_block(const TrellisProductArgs& a, const Work& work, std::uint32_t* lanes, std::int64_t* total) {
    const std::int64_t blocks = (a.in_tiles + kTilesPerBlock - 1) / kTilesPerBlock;
    for (std::int64_t b = 0; b < rows; ++b) {
        const std::uint32_t* by_pair = a.offset + ((work.first_row + b) * blocks + work.first_tile / kTilesPerBlock) * 8;
        const std::uint32_t even = 0u - by_pair[0] - by_pair[2] - by_pair[4] - by_pair[6];
        const std::uint32_t odd = 0u - by_pair[1] - by_pair[3] - by_pair[5] - by_pair[7];
        const __m512i start = _mm512_set1_epi64(static_cast<long long>(std::uint64_t(odd) << 32 | even));
        for (std::int64_t s = 0; s < work.strips; ++s)
            for (int half = 0; half < 2; ++half) _mm512_store_si512(lanes + (s * rows + b) * 32 + 16 * half, start);
    }
    if (a.rate <= 16) trellis_tiles<1, false, states, rows>(a, work, lanes);
    else if (a.rate <= 32) trellis_tiles<2, false, states, rows>(a, work, lanes);
    else if (!kWindows.whole[a.rate - kLeastRate].split) trellis_tiles<3, false, states, rows>(a, work, lanes);
    else trellis_tiles<3, true, states, rows>(a, work, lanes);
    for (std::int64_t i = 0; i < 2 * work.strips * rows; ++i) {
        const __m512i sums = _mm512_load_si512(lanes + 16 * i);
        const __m512i even = _mm512_srai_epi64(_mm512_slli_epi64(sums, 32), 32), odd = _mm512_srai_epi64(sums, 32);
        std::int64_t* into = total + 8 * i;
        _mm512_storeu_si512(into, _mm512_add_epi64(_mm512_loadu_si512(into), _mm512_add_epi64(even, odd)));
    }
}
