// The trellis code: which bits of a tile are the state of an element, and what a state stands for. Everything has
// internal linkage, so both the builds of kernels.cpp and the bindings may include it (see levels.h).
#pragma once
#include <cstdint>

namespace mezzotint {

constexpr int kTile = 256;              // weights
constexpr float kTrellisUnit = 147.7f;  // whole numbers to unit variance
constexpr int kLowestRate = 8, kHighestRate = 48;  // bits per eight weights, so dwords per tile too

// 147.7 times the weight that a state stands for: the bytes of a product, summed and centred; -510 ... 510.
static inline std::int32_t trellis_value(std::uint32_t state) {
    const std::uint32_t product = state * 0x83DCD12Du;
    const std::uint32_t pairs = (product & 0x00ff00ffu) + ((product >> 8) & 0x00ff00ffu);
    return static_cast<std::int32_t>((pairs + (pairs >> 16)) & 0xffffu) - 510;
}

// Bits of the tile before element `i`; those of element i end before trellis_bits(i + 1).
static inline int trellis_bits(int i, int rate) { return i * rate / 8; }

// New bits in the state of element `i`, 0 ... 256 (the pattern repeats every eight).
static inline int trellis_shift(int i, int rate) { return trellis_bits(i + 1, rate) - trellis_bits(i, rate); }

}  // namespace mezzotint
