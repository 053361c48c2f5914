// Matrix products with packed weights for one instruction set. CMake compiles this file once per level; see levels.h for
// what may not be here.
#include "products_levels.h"

#if defined(__x86_64__) && defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed weights are little-endian; this build is for little-endian machines"
#endif

namespace mezzotint {
namespace MEZZOTINT_LEVEL {
namespace {

#include "lanes.h"
#include "unpacking.h"
#include "activations.h"
#include "products_trellis.h"
#include "packed.h"
#include "tables.h"

void all_packed_inputs(const PackedArgs& a) {
    packed_inputs(a);
    ordered_inputs(a);
}

}  // namespace

ProductKernels product_table() {
    return {trellis_inputs, trellis, all_packed_inputs, packed, table};
}

}  // namespace MEZZOTINT_LEVEL
}  // namespace mezzotint
