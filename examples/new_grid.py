"""A grid of one's own: powers of two with a sign, so that a product with a weight is a shift and one sum of exponents.

A code stands for ``scale * (-1)^s 2^-k``. Everything but the values comes from `CodebookGrid`: scales per group, row or
matrix, how they are searched and stored, packing, and the kernels that multiply with packed weights.

    python examples/new_grid.py MODEL CALIBRATION.txt OTHER.txt OUT
"""

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

import mezzotint
from mezzotint.errors import ConfigError
from mezzotint.grids.codebook import CodebookGrid
from mezzotint.registry import GRIDS

# The root mean square of normal numbers whose squared error is least, in units of the largest value, by bits.
DEVIATION = {2: 0.77, 3: 0.46, 4: 0.29}


@dataclass(frozen=True, slots=True, kw_only=True)
class PowersGrid(CodebookGrid):
    """Settings are fields: ``--set grid.bits=4`` reaches this one, ``--set grid.range=error`` an inherited one."""

    kind: ClassVar[str] = "powers"
    bits: int = 3

    def __post_init__(self) -> None:
        if self.bits not in DEVIATION:
            raise ConfigError(f"grid.bits is {self.bits}; the grid of powers takes 2 to 4. Choose one of these.")

    @property
    def tile(self) -> tuple[int, int]:
        """One code for one weight."""
        return (1, 1)

    @property
    def index_bits(self) -> int:
        """Bits of one code."""
        return self.bits

    def codebook(self, dtype: torch.dtype, device: torch.device) -> "Powers":
        """The values, made once."""
        return powers(self.bits, dtype, device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Powers:
    """Increasing values, and the points halfway between them."""

    width: ClassVar[int] = 1  # columns that a code stands for
    code_dtype: ClassVar[torch.dtype] = torch.uint8
    largest: ClassVar[float] = 1.0
    deviation: float
    entries: Tensor
    halfway: Tensor

    def nearest(self, x: Tensor) -> Tensor:
        """Codes of the nearest values; of two at the same distance the lower."""
        return torch.searchsorted(self.halfway, x.contiguous()).to(torch.uint8)

    def values(self, code: Tensor) -> Tensor:
        """What codes stand for."""
        return self.entries[code.int()]


@lru_cache
def powers(bits: int, dtype: torch.dtype, device: torch.device) -> Powers:
    """``-1 .. -2^-k, 2^-k .. 1`` with ``k = 2^(bits-1) - 1``."""
    above = 2.0 ** -torch.arange(2 ** (bits - 1), dtype=dtype, device=device)
    entries = torch.cat((-above, above.flip(0)))
    return Powers(deviation=DEVIATION[bits], entries=entries, halfway=(entries[1:] + entries[:-1]) / 2)


if __name__ == "__main__":
    model, calibration, other, out = sys.argv[1:]
    GRIDS.add("powers", f"{__name__}:PowersGrid")
    for grid in ("powers", "lookup", "uniform"):
        for rounding in ("nearest", "gptq"):
            recipe = mezzotint.Recipe(name=grid, grid={"kind": grid, "range": "error"}, rounding={"kind": rounding})
            folder, options = f"{out}-{grid}-{rounding}", {"calibration": calibration, "samples": 32, "seqlen": 128}
            report = mezzotint.quantize(model, recipe, out=folder, bits=3, format="mezzotint", **options)
            result = mezzotint.evaluate(folder, other, against=model, seqlen=64, windows=8)
            print(f"{grid:8} {rounding:8} {report['bits_per_weight']:.2f} bits  KL {result.kl_nats:.4f}")
