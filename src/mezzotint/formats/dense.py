"""Dequantized weights under their original names. Every engine loads them; they are not smaller."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mezzotint.core.contracts import Grid, Matrix, ModelMap, QuantizedWeight, Transform
from mezzotint.core.plans import Entry, PackedWeight, Plan, Refusal, TensorSpec
from mezzotint.errors import FormatError


class Dense:
    """The values that the codes stand for, in the checkpoint's dtype and orientation.

    A matrix that is a whole tensor of the checkpoint is stored under that tensor's name. One that is not (an expert of
    a stacked parameter, a matrix cut from or joined of several tensors) is keyed by its canonical name instead: the
    caller assembles parameters from these and restores the checkpoint's own tensors.
    """

    name: ClassVar[str] = "dense"
    copies: ClassVar[int] = 1

    def refuses(self, entry: Entry, matrix: Matrix) -> Refusal | None:
        """Nothing: every grid and basis has values."""
        return None

    def refuses_plan(self, plan: Plan, model: ModelMap) -> tuple[Refusal, ...]:
        """Nothing: every matrix is on its own."""
        return ()

    def specs(
        self, matrix: Matrix, grid: Grid, dtype: torch.dtype, transform: Transform | None = None
    ) -> tuple[TensorSpec, ...]:
        """One tensor of the checkpoint's dtype, in the stored orientation."""
        rows, columns = matrix.shape
        return (TensorSpec(_key(matrix), dtype, (columns, rows) if matrix.transposed else (rows, columns)),)

    def tensors(
        self, matrix: Matrix, weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16
    ) -> dict[str, Tensor]:
        """The value ``[out, in]``, or ``[in, out]`` where it is stored so."""
        value = weight.dense(dtype)
        return {_key(matrix): (value.t() if matrix.transposed else value).cpu().contiguous()}

    def weight(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], grid: Grid, transform: Transform | None = None
    ) -> QuantizedWeight:
        """Not possible.

        Raises:
            FormatError: always; values that were rounded to the checkpoint's dtype no longer tell their codes.
        """
        raise FormatError(
            f"{matrix.name} is stored as dense values, which hold no codes. Read them as weights, or quantize again "
            "into a packed format."
        )

    def config(self, plan: Plan, model: ModelMap) -> Mapping[str, object] | None:
        """None: to an engine this is an ordinary model."""
        return None

    def packed(
        self, quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
    ) -> Mapping[str, PackedWeight] | None:
        """None: dense values are no packed ones."""
        return None

    def check_source(self, folder: Path, config: Mapping[str, object], names: list[str]) -> None:
        """Nothing: every model is read."""

    def finish(self, folder: Path, config: Mapping[str, object], plan: Plan, model: ModelMap) -> int:
        """Nothing is left to do; the size of the tensors."""
        return plan.bytes


def _key(matrix: Matrix) -> str:
    whole = len(matrix.sources) == 1 and matrix.expert is None
    return matrix.sources[0] if whole else matrix.name
