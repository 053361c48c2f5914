"""Inner loops over codes: C++ for tensors on the CPU, plain torch (`reference`) for any other device and for float64.

The C++ is built for several instruction sets and the best one is chosen at run time; all of them and the reference give
the same bits, whatever the number of threads. Products with packed weights are the exception: away from the CPU, and in
float64, they multiply in floating point; see `products`.
"""

from mezzotint.kernels._dispatch import available_levels, multiplies_bfloat16
from mezzotint.kernels.affine import affine_decode, affine_encode, min_max
from mezzotint.kernels.descend import descend_block_
from mezzotint.kernels.gptq import gptq_block_
from mezzotint.kernels.hadamard import hadamard, hadamard_block
from mezzotint.kernels.packing import pack_bits, unpack_bits
from mezzotint.kernels.products import LevelTable, packed_matmul, product_levels, table_matmul, trellis_matmul
from mezzotint.kernels.ranges import POWERS, min_max_range, search_range
from mezzotint.kernels.refit import refit_group_
from mezzotint.kernels.trellis import from_tiles, tile_order, to_tiles, trellis_decode, trellis_encode, trellis_values

__all__ = [
    "POWERS",
    "LevelTable",
    "affine_decode",
    "affine_encode",
    "available_levels",
    "descend_block_",
    "from_tiles",
    "gptq_block_",
    "hadamard",
    "hadamard_block",
    "min_max",
    "min_max_range",
    "multiplies_bfloat16",
    "pack_bits",
    "packed_matmul",
    "product_levels",
    "refit_group_",
    "search_range",
    "table_matmul",
    "tile_order",
    "to_tiles",
    "trellis_decode",
    "trellis_encode",
    "trellis_matmul",
    "trellis_values",
    "unpack_bits",
]
