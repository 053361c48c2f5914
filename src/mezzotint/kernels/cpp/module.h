// What the files that bind kernels to Python share: array types and checks.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "levels.h"

namespace nb = nanobind;

namespace mezzotint {

template <typename T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using AnyMatrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The kernels of a level by name; the best that this processor can run if the name is empty.
const Kernels& kernels_of(const std::string& level);

inline void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

template <typename A>
std::int64_t size(const A& array, std::size_t axis) {
    return static_cast<std::int64_t>(array.shape(axis));
}

template <typename A, typename B>
bool same_shape(const A& a, const B& b) {
    return a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1);
}

inline Dtype dtype_of(const AnyMatrix& values) {
    if (values.dtype() == nb::dtype<float>()) return Dtype::f32;
    const nb::dlpack::dtype d = values.dtype();
    require(d.bits == 16 && d.lanes == 1, "values have to be float32, bfloat16 or float16");
    if (d.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat)) return Dtype::bf16;
    require(d.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), "values have to be floating point");
    return Dtype::f16;
}

// Whether this processor runs what is built for x86-64-v3.
inline bool runs_avx2() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
           __builtin_cpu_supports("movbe");
#else
    return false;
#endif
}

// The same for x86-64-v4.
inline bool runs_avx512() {
#if defined(__x86_64__)
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

// Whether it multiplies bfloat16 numbers as such, faster than float32 ones.
inline bool multiplies_bfloat16() {
#if defined(__x86_64__)
    return runs_avx512() && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

void bind_hadamard(nb::module_& m);
void bind_products(nb::module_& m);
void bind_trellis(nb::module_& m);

}  // namespace mezzotint
