// What module.cpp asks of each build of kernels.cpp: plain functions on raw pointers for a run of rows.
//
// kernels.cpp is compiled with wider instruction sets than the rest, so nothing with vague linkage (a template or an
// inline function of the standard library) may be emitted there: the linker would keep one copy for everybody, perhaps
// the one that this processor cannot run. Threads and memory therefore belong to module.cpp.
#pragma once
#include <cstdint>

namespace mezzotint {

enum class Dtype { f32, bf16, f16 };

struct Rows {
    std::int64_t begin, end;
};

struct PackArgs {
    std::uint8_t* code;       // [rows, n]
    std::uint8_t* packed;     // [rows, row_bytes], little-endian bit stream
    std::int64_t n, row_bytes;
    int bits;
};

struct AffineArgs {
    const void* values;       // [rows, n] of dtype (encode)
    Dtype dtype;
    std::uint8_t* code;       // [rows, n]
    float* decoded;           // [rows, n] (decode)
    const float* scale;       // [rows, groups]
    const float* zero_point;  // [rows, groups]
    std::int64_t n, group_size, groups;
    float top;                // 2^bits - 1
};

struct MinMaxArgs {
    const void* values;       // [rows, n] of dtype
    Dtype dtype;
    float* lowest;            // [rows, groups]
    float* highest;           // [rows, groups]
    std::int64_t n, group_size, groups;
};

enum class Power { two, two_and_a_half, three };  // of errors that a range is chosen by

struct ScaleType {
    Dtype dtype;
    float smallest, largest;  // scale
};

struct SearchArgs {
    const void* values;       // [rows, n] of dtype
    Dtype dtype;
    const float* importance;  // [groups, padded], or null; padded = group_size rounded up to 16
    const float* fractions;   // [steps] of the full range; no steps: the range that clips nothing
    const float* midpoints;   // [steps], symmetric only
    float* scale;             // [rows, groups]
    float* zero_point;        // [rows, groups]
    std::int64_t n, group_size, groups, padded, steps;
    int bits, span;
    bool symmetric;
    Power power;
    ScaleType scale_type;
};

struct GptqArgs {
    float* work;              // [rows, k]
    const float* factor;      // [k, k], upper triangular
    const float* scale;       // [rows, k]
    const float* zero_point;  // [rows, k]
    std::uint8_t* code;       // [rows, k]
    float* error;             // [rows, k]
    std::int64_t k;
    float top;
    const float* taken;       // [blocks, block, block]: [., i, l] is what row l takes of the error of row i; or null
    std::int64_t rows, block; // block: a multiple of 16; 16 where rows are independent
};

struct DescendArgs {
    float* value;             // [rows, k], what the codes decode to
    const float* gradient;    // [rows, k], half the slope of the quadratic
    const float* gram;        // [k, k], symmetric
    const float* scale;       // [rows, k]
    const float* zero_point;  // [rows, k]
    std::uint8_t* code;       // [rows, k]
    std::int64_t k;
    float top;
    const float* curvature;   // [blocks, block, block], symmetric; or null
    std::int64_t rows, block; // block: a multiple of 16; 16 where rows are independent
};

struct RefitArgs {
    float* scale;             // [rows], of one group of columns
    float* zero_point;        // [rows]
    float* pull;              // [rows], slope of the quadratic in each scale; follows the steps
    float* lift;              // [rows], the same in what is added to all columns
    const float* own;         // [rows], bend of the quadratic in each scale
    const float* both;        // [rows], in scale and shift
    float flat;               // in the shift
    const float* between;     // [blocks, block, block], what a row's scale does to the slopes of the others
    const float* curvature;   // [blocks, block, block], symmetric
    float* stretch;           // [rows], steps of the scales
    float* shift;             // [rows], of what is added
    std::int64_t rows, block;
    float top;
    bool symmetric;
    ScaleType scale_type;
};

struct HadamardArgs {
    const void* values;       // [rows, n] of dtype
    Dtype dtype;
    float* out;               // [rows, n]
    std::int64_t n, block;    // block: a power of two that divides n
    float scale;              // 1 / sqrt(block)
};

struct TrellisArgs {
    const float* values;         // [tiles, 256] (encode)
    std::int32_t* packed;        // [tiles, rate]
    void* decoded;               // [tiles, 256] of dtype (decode)
    Dtype dtype;
    const std::int32_t* tables;  // of all states' values, for each k; see trellis_tables (encode)
    int states, rate, window;
};

// Floats of scratch memory each thread has to bring, aligned to 64 bytes.
inline constexpr std::int64_t kLanes = 16;

struct Kernels {
    bool (*pack)(const PackArgs&, Rows);  // false: a code does not fit
    void (*unpack)(const PackArgs&, Rows);
    void (*encode)(const AffineArgs&, Rows);
    void (*decode)(const AffineArgs&, Rows);
    void (*min_max)(const MinMaxArgs&, Rows);
    void (*search)(const SearchArgs&, Rows, float* scratch);  // padded + 2 * steps rounded up to 16
    void (*gptq)(const GptqArgs&, Rows blocks, float* scratch);        // (3 * k + 1) * block
    void (*descend)(const DescendArgs&, Rows blocks, float* scratch);  // 5 * k * block
    void (*refit)(const RefitArgs&, Rows blocks);
    void (*hadamard)(const HadamardArgs&, Rows);
    void (*trellis_encode)(const TrellisArgs&, Rows, float* scratch);  // trellis_scratch
    void (*trellis_decode)(const TrellisArgs&, Rows);
};

namespace portable { Kernels table(); }
namespace avx2 { Kernels table(); }
namespace avx512 { Kernels table(); }

}  // namespace mezzotint
