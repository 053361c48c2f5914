// The kernels of one instruction set. CMake compiles this file once per level; see levels.h for what may not be here.
#include "levels.h"
#include "trellis_code.h"

#if defined(__x86_64__) && defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed codes are little-endian; this build is for little-endian machines"
#endif

namespace mezzotint {
namespace MEZZOTINT_LEVEL {
namespace {

#include "lanes.h"
#include "unpacking.h"
#include "packing.h"
#include "affine.h"
#include "search.h"
#include "gptq.h"
#include "descend.h"
#include "refit.h"
#include "hadamard.h"
#include "ints.h"
#include "trellis.h"

}  // namespace

Kernels table() {
    return {pack, unpack, encode, decode, min_max, search, gptq, descend, refit, hadamard, trellis_encode, trellis_decode};
}

}  // namespace MEZZOTINT_LEVEL
}  // namespace mezzotint
