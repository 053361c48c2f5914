// Binding of the block Hadamard transform.
#include <cmath>

#include "module.h"
#include "parallel.h"

namespace mezzotint {
namespace {

void hadamard(AnyMatrix values, Matrix<float> out, std::int64_t block, int threads, const std::string& level) {
    const Kernels& kernels = kernels_of(level);
    require(same_shape(values, out), "values and out have to have one shape");
    const std::int64_t rows = size(values, 0), n = size(values, 1);
    require(block >= 1 && (block & (block - 1)) == 0 && n % block == 0, "block has to be a power of two that divides n");
    const HadamardArgs a{values.data(), dtype_of(values), out.data(), n, block,
                         static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)))};
    nb::gil_scoped_release release;
    over_rows(rows, threads, 0.3 * static_cast<double>(n), [&](Rows part, std::size_t) { kernels.hadamard(a, part); });
}

}  // namespace

void bind_hadamard(nb::module_& m) {
    const auto at = [](const char* name) { return nb::arg(name).noconvert(); };
    m.def("hadamard", &hadamard, at("values"), at("out"), at("block"), at("threads"), at("level"));
}

}  // namespace mezzotint
