"""Dense values in the stored orientation, under the names the caller expects."""

import pytest
import torch

from formats.llama import entry_of, nearest
from mezzotint.core.structure import Matrix
from mezzotint.errors import FormatError
from mezzotint.formats.dense import Dense
from mezzotint.grids.uniform import UniformGrid

FORM = Dense()
GRID = UniformGrid(bits=3, group_size=7, symmetric=False, range="minmax", scale_dtype="bfloat16")
BASE = {"name": "b.mlp.up[2]", "parameter": "b.mlp.up", "shape": (6, 10), "fusion": "0.up"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sources": ("stored.up.weight",)}, "stored.up.weight"),
        ({"sources": ("stored.up.weight",), "transposed": True}, "stored.up.weight"),
        ({"sources": ("stored.up.weight",), "expert": 2, "linear": False}, "b.mlp.up[2]"),
        ({"sources": ("stored.up.2.weight", "stored.gate.2.weight"), "linear": False}, "b.mlp.up[2]"),
    ],
)
def test_values_and_specs(dtype: torch.dtype, changes: dict[str, object], key: str):
    matrix = Matrix(**(BASE | changes))
    weight = nearest(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), GRID)
    assert FORM.refuses(entry_of(GRID, matrix), matrix) is None
    ((name, value),) = FORM.tensors(matrix, weight, dtype).items()
    (spec,) = FORM.specs(matrix, GRID, dtype)
    assert (name, value.dtype, tuple(value.shape)) == spec
    assert name == key
    assert value.is_contiguous()
    expected = weight.grid.decode(weight.code).to(dtype)
    torch.testing.assert_close(value.t() if matrix.transposed else value, expected, rtol=0, atol=0)


def test_values_tell_no_codes():
    matrix = Matrix(**(BASE | {"sources": ("w",)}))
    with pytest.raises(FormatError, match="hold no codes"):
        FORM.weight(matrix, {"w": torch.zeros(6, 10)}, GRID)
