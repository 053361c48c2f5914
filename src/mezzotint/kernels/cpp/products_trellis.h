// Products with a trellis: weights as a circular bit string per 16x16 tile, decoded between load and multiplication.
//
// A tile has 256 elements e in a string of 32 * rate bits, the most significant bit of each dword first. The state of e is
// the bits that end at bit end(e) = floor((e + 1) * rate / 8), and its code the sum of the bytes of state * kMultiplier.
// With e = 8 t + m it is the weight of output t / 4 + 8 (m / 4) and input (t % 4) * 2 + {0, 1, 8, 9}[m % 4].
//
// Four elements of one t and one half of m ("quad") share their output and span at most 34 bits, so one 64-bit window
// holds them, and their states become the four 16-bit words of one 64-bit lane, the last element in the lowest word. A
// 16-bit multiplication in three parts and byte sums leave four codes, which meet four inputs in that same order:
// the "fragment order" of inputs within a tile.
//
// Accumulators hold sums of code * q modulo 2^32, codes not centred (0 to 1020). `offset` takes the mean away at the end
// of a block, which is exact as long as the centred sum fits: two products of at most 510 * 32639 a step and four
// steps a tile are 2^31 after 16.1 tiles.
static_assert(kTilesPerBlock * 4 * 2 * 510 * std::int64_t(kInputTop) < (std::int64_t(1) << 31), "accumulators overflow");

static constexpr std::uint32_t kMultiplier = 0x83DCD12Du;
static constexpr int kFragmentOrder[16] = {9, 8, 1, 0, 11, 10, 3, 2, 13, 12, 5, 4, 15, 14, 7, 6};

static constexpr int end_bit(int element, int rate) { return (element + 1) * rate / 8; }

struct Work {
    std::int64_t first_strip, strips, first_row, first_tile, tiles;
};

static void trellis_inputs(const TrellisProductArgs& a) {
    const std::int64_t n = 16 * a.in_tiles, blocks = (a.in_tiles + kTilesPerBlock - 1) / kTilesPerBlock;
    for (std::int64_t b = 0; b < a.padded; ++b) {
        std::int16_t* q = a.q + b * n;
        std::uint32_t* offset = a.offset + b * blocks * 8;
        for (std::int64_t i = 0; i < 8 * blocks; ++i) offset[i] = 0;
        if (b < a.batch) a.unit[b] = quantize_row(a.x + b * n, n, q);
        else
            for (std::int64_t i = 0; i < n; ++i) q[i] = 0;
        for (std::int64_t tile = 0; tile < a.in_tiles; ++tile) {
            std::int16_t natural[16], *const ordered = q + 16 * tile;
            __builtin_memcpy(natural, ordered, sizeof natural);
            for (int i = 0; i < 16; ++i) ordered[i] = natural[kFragmentOrder[i]];
            std::uint32_t* const lanes = offset + tile / kTilesPerBlock * 8;
            for (int i = 0; i < 8; ++i) lanes[i] += static_cast<std::uint32_t>(510 * (ordered[2 * i] + ordered[2 * i + 1]));
        }
    }
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include "products_vnni.h"
#elif defined(__AVX2__)
#include "products_avx2.h"
#else
#include "products_portable.h"
#endif

template <int states, int rows>
static void trellis_rows(const TrellisProductArgs& a, Rows strips, std::int64_t first_row, float* scratch) {
    constexpr std::int64_t run = kRun / rows > kLeastRun ? kRun / rows : kLeastRun;
    static_assert(run * rows * (kLanesPerStrip + 32) <= kTrellisScratch, "scratch memory is too small");
    std::int64_t* total = reinterpret_cast<std::int64_t*>(scratch);  // [run, rows, 16]
    std::uint32_t* lanes = reinterpret_cast<std::uint32_t*>(total + run * rows * 16);
    for (std::int64_t first = strips.begin; first < strips.end; first += run) {
        Work work{first, strips.end - first < run ? strips.end - first : run, first_row, 0, 0};
        for (std::int64_t i = 0; i < work.strips * rows * 16; ++i) total[i] = 0;
        for (; work.first_tile < a.in_tiles; work.first_tile += kTilesPerBlock) {
            const std::int64_t left = a.in_tiles - work.first_tile;
            work.tiles = left < kTilesPerBlock ? left : kTilesPerBlock;
            trellis_block<states, rows>(a, work, lanes, total);
        }
        for (std::int64_t s = 0; s < work.strips; ++s)
            for (std::int64_t b = first_row; b < first_row + rows && b < a.batch; ++b) {
                float* out = a.out + (b * a.out_tiles + first + s) * 16;
                const double unit = a.unit[b] / kCodeStep;
                for (int c = 0; c < 16; ++c)
                    out[c] = static_cast<float>(unit * static_cast<double>(total[(s * rows + b - first_row) * 16 + c]));
            }
    }
}

template <int states>
static void trellis_states(const TrellisProductArgs& a, Rows strips, float* scratch) {
    std::int64_t b = 0;
    for (; a.padded - b >= kMostTrellisRows; b += kMostTrellisRows)
        trellis_rows<states, kMostTrellisRows>(a, strips, b, scratch);
    if (a.padded - b == 4) trellis_rows<states, 4>(a, strips, b, scratch);
    if (a.padded - b == 2) trellis_rows<states, 2>(a, strips, b, scratch);
    if (a.padded - b == 1) trellis_rows<states, 1>(a, strips, b, scratch);
}

static void trellis(const TrellisProductArgs& a, Rows strips, float* scratch) {
    if (a.states == 12) trellis_states<12>(a, strips, scratch);
    else trellis_states<16>(a, strips, scratch);
}
