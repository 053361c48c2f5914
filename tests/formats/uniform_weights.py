"""Any codes, scales and zero points on uniform grids: formats must not care where they come from."""

import torch
from hypothesis import strategies as st

from mezzotint.core.contracts import QuantizedWeight
from mezzotint.grids.uniform import FittedUniform, UniformGrid


@st.composite
def uniform_weights(
    draw,
    bits: st.SearchStrategy[int],
    layouts: st.SearchStrategy[tuple[int, int, int | None]],
    dtypes: tuple[str, ...],
) -> QuantizedWeight:
    """A weight of these bits, (rows, columns, group size) and dtypes of scales, with and without zero points."""
    b, (rows, columns, group_size) = draw(bits), draw(layouts)
    groups, symmetric = columns // (group_size or columns), draw(st.booleans())
    dtype = draw(st.sampled_from(dtypes))
    grid = UniformGrid(bits=b, group_size=group_size, symmetric=symmetric, range="minmax", scale_dtype=dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    code = torch.randint(0, 2**b, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, groups, generator=generator).to(grid.storage_dtype).float()
    zero_point = torch.full((rows, groups), 2.0 ** (b - 1))
    if not symmetric:
        zero_point = torch.randint(0, 2**b, (rows, groups), generator=generator).float()
    fitted = FittedUniform(grid=grid, shape=(rows, columns), scale=scale, zero_point=zero_point)
    return QuantizedWeight(shape=(rows, columns), code=code, grid=fitted)
