"""Dequantized weights under their own names: loads wherever the original does, and is as large."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mezzotint.core.contracts import Grid, QuantizedWeight
from mezzotint.core.files import Entry, Plan, Refusal, TensorSpec
from mezzotint.core.structure import Matrix, ModelMap


class Dense:
    """A plain folder in the checkpoint's dtype; holds every grid on every kind of module."""

    name: ClassVar[str] = "dense"

    def refuses(self, entry: Entry, matrix: Matrix) -> Refusal | None:
        """Nothing is refused."""
        return None

    def refuses_plan(self, plan: Plan, model: ModelMap) -> tuple[Refusal, ...]:
        """Nothing is refused."""
        return ()

    def specs(self, matrix: Matrix, grid: Grid, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        """One tensor, stored as the original was."""
        shape = matrix.shape[::-1] if matrix.transposed else matrix.shape
        return (TensorSpec(matrix.sources[0], dtype, shape),)

    def tensors(self, matrix: Matrix, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """The dequantized matrix; experts and shared tensors are put together by the caller instead."""
        value = weight.dense(dtype)
        return {matrix.sources[0]: (value.t() if matrix.transposed else value).cpu().contiguous()}

    def weight(self, matrix: Matrix, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """Codes are not stored.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a dense folder holds values, not codes; read its tensors directly")

    def config(self, plan: Plan, model: ModelMap) -> Mapping[str, object] | None:
        """Nothing to tell a reader."""
        return None
