"""How large a matrix is when it is stored."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch


class Bits(NamedTuple):
    """Exact storage of one matrix in bits: its codes, and everything else (scales, zero points, signs, padding)."""

    code: int
    side: int

    @classmethod
    def of(cls, code: int, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> "Bits":
        """Bits of codes, and the rest of what tensors of these dtypes and shapes take.

        Example:
            >>> Bits.of(40, {"packed": (torch.int32, (2,)), "scale": (torch.float16, (1,))})
            Bits(code=40, side=40)
        """
        total = sum(8 * dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())
        return cls(code, total - code)

    @property
    def total(self) -> int:
        """Codes and side data."""
        return self.code + self.side
