// Python's view of the trellis kernels.
#include <nanobind/stl/string.h>

#include "module.h"
#include "parallel.h"
#include "trellis_code.h"

namespace mezzotint {
namespace {

TrellisArgs trellis_args(int states, std::int64_t rate) {
    require(states == 12 || states == 16, "states has to be 12 or 16");
    require(rate >= kLowestRate && rate <= kHighestRate, "packed has to have 8 to 48 words a tile");
    TrellisArgs a{};
    a.states = states, a.rate = static_cast<int>(rate);
    return a;
}

// For the k below and the k above rate / 8, if it lies between two: 2^states slopes and as many squares, times 2^s (see
// trellis.h), in the order the search reads them. Node by node in blocks of sixteen, for each `top` sixteen slopes, then
// sixteen squares with `top` in the low bits.
std::vector<std::int32_t> trellis_tables(const TrellisArgs& a) {
    const int scale = (a.rate + 7) / 8;
    std::vector<std::int32_t> tables;
    for (int k = a.rate / 8; k <= scale; ++k)
        for (std::uint32_t block = 0; block < 1u << (a.states - k); block += 16)
            for (std::uint32_t top = 0; top < 1u << k; ++top)
                for (const bool square : {false, true})
                    for (std::uint32_t node = block; node < block + 16; ++node) {
                        const std::int32_t v = trellis_value(top << (a.states - k) | node);
                        tables.push_back(square ? v * v * (1 << scale) + static_cast<std::int32_t>(top) : v * (1 << scale) & 0xffff);
                    }
    return tables;
}

// Floats for four tiles: two sets of costs, survivors of 256 steps as bytes; targets and states of 16 bits.
std::int64_t trellis_scratch(const TrellisArgs& a) {
    const std::int64_t nodes = std::int64_t{1} << (a.states - a.rate / 8);
    return 4 * (2 * nodes + kTile * nodes / 4 + kTile);
}

void trellis_encode(Matrix<const float> values, Matrix<std::int32_t> packed, int states, int window, int threads,
                    const std::string& level) {
    const Kernels& kernels = kernels_of(level);
    TrellisArgs a = trellis_args(states, size(packed, 1));
    require(size(values, 1) == kTile && size(values, 0) == size(packed, 0), "values have to be [tiles, 256]");
    require(window >= 1 && window <= kTile / 2, "window has to be 1 to 128");
    nb::gil_scoped_release release;
    const std::vector<std::int32_t> tables = trellis_tables(a);
    a.values = values.data(), a.packed = packed.data(), a.tables = tables.data(), a.window = window;
    const double cost = 0.1 * static_cast<double>((kTile + 2 * window) << states);
    over_rows(size(packed, 0), threads, cost, [&](Rows part, std::size_t) {
        const Scratch scratch(trellis_scratch(a));
        kernels.trellis_encode(a, part, scratch.get());
    });
}

void trellis_decode(Matrix<const std::int32_t> packed, nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu> decoded,
                    int states, int threads, const std::string& level) {
    const Kernels& kernels = kernels_of(level);
    TrellisArgs a = trellis_args(states, size(packed, 1));
    require(size(decoded, 1) == kTile && size(decoded, 0) == size(packed, 0), "decoded has to be [tiles, 256]");
    const bool wide = decoded.dtype() == nb::dtype<float>();
    require(wide || decoded.dtype().bits == 16, "decoded has to be float32 or bfloat16");
    a.packed = const_cast<std::int32_t*>(packed.data()), a.decoded = decoded.data();
    a.dtype = wide ? Dtype::f32 : Dtype::bf16;
    nb::gil_scoped_release release;
    over_rows(size(packed, 0), threads, 0.5 * kTile, [&](Rows part, std::size_t) { kernels.trellis_decode(a, part); });
}

}  // namespace

void bind_trellis(nb::module_& m) {
    const auto at = [](const char* name) { return nb::arg(name).noconvert(); };
    m.def("trellis_encode", &trellis_encode, at("values"), at("packed"), at("states"), at("window"), at("threads"),
          at("level"));
    m.def("trellis_decode", &trellis_decode, at("packed"), at("decoded"), at("states"), at("threads"), at("level"));
}

}  // namespace mezzotint
