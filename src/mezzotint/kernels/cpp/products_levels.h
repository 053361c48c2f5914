// What module_products.cpp asks of each build of products.cpp; see levels.h for what may not be emitted there.
#pragma once
#include <cstdint>

#include "levels.h"

namespace mezzotint {

// Inputs are rounded to whole multiples of `unit` = max|x| / kInputTop. The top is 127 * 256 + 127, so that a multiple is
// 256 * high + low with both in a signed byte.
inline constexpr std::int32_t kInputTop = 32639;

// Rows of x that one pass over the weights serves; fewer rows are padded with zeros to the next power of two.
inline constexpr std::int64_t kMostTrellisRows = 8, kMostPackedRows = 4;

inline constexpr int kLeastRate = 8, kMostRate = 48;  // eighths of a bit
inline constexpr double kCodeStep = 147.7;            // byte sums have mean 510 and, over all states, this deviation

// 16-bit sums of products overflow 32 bits after more tiles than this; see products_trellis.h.
inline constexpr std::int64_t kTilesPerBlock = 16;

struct TrellisProductArgs {
    const float* x;               // [batch, 16 * in_tiles]
    const std::uint32_t* packed;  // [in_tiles, out_tiles, rate]
    float* out;                   // [batch, 16 * out_tiles]
    std::int16_t* q;              // [padded batch, 16 * in_tiles], in fragment order
    std::uint32_t* offset;        // [padded batch, blocks, 8]: what the mean of byte sums adds to each lane
    double* unit;                 // [batch]
    std::int64_t batch, padded, in_tiles, out_tiles;
    int rate, states;
};

// Groups are cut into pieces of at most this many columns, whose sums of products fit 32 bits (255 * 32639 * 128 < 2^31).
inline constexpr std::int64_t kMostPiece = 128;

// Inputs are padded with zeros to a multiple of this many columns.
inline constexpr std::int64_t kColumns = 512;

struct PackedArgs {
    const float* x;             // [batch, n]
    const std::uint8_t* words;  // [out, row_bytes], little-endian bit stream
    const float* scale;         // [out, groups]
    const float* zero_point;    // [out, groups]
    float* out;                 // [batch, out_rows]
    const std::int32_t* begin_of_piece;  // [padded_pieces + 1] columns; pieces past the end of a row are empty
    const std::int32_t* group_of_piece;  // [padded_pieces]
    std::int16_t* q;            // [padded batch, padded_n]
    std::int8_t* high;          // [padded batch, padded_n]; q = 256 * high + low, in the order of the level's codes
    std::int8_t* low;           // [padded batch, padded_n]
    float* piece_sum;           // [padded batch, padded_pieces]: sum of q
    double* unit;               // [batch]
    std::int64_t batch, padded, n, padded_n, row_bytes, out_rows, groups, piece_count, padded_pieces;
    const std::int16_t* levels;  // [2^bits, width] of the table, or null: codes are numbers
    double step;                 // of the levels; 1 for numbers
    int width;                   // columns that a code stands for: 1, or 2 with a table
    int bits;                    // of a code: 2 to 8, or to 12 with a table
    int piece;                  // columns of every piece but the last: 32, 64 or 128; 0 when they differ
    bool piece_is_group;
};

// Floats of scratch memory each thread has to bring, aligned to 64 bytes.
inline constexpr std::int64_t kTrellisScratch = 24 * 1024;

struct ProductKernels {
    void (*trellis_inputs)(const TrellisProductArgs&);              // fills q, offset and unit
    void (*trellis)(const TrellisProductArgs&, Rows strips, float* scratch);  // strips of 16 outputs
    void (*packed_inputs)(const PackedArgs&);                // fills q, high, low, piece_sum and unit
    void (*packed)(const PackedArgs&, Rows rows, float* scratch);  // a byte for each column
    void (*table)(const PackedArgs&, Rows rows, float* scratch);   // two bytes for each column
};

namespace portable { ProductKernels product_table(); }
namespace avx2 { ProductKernels product_table(); }
namespace vnni { ProductKernels product_table(); }

}  // namespace mezzotint
