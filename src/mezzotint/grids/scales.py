"""Scales of groups of columns: how wide a group is and in which dtype its scale is stored."""

from collections.abc import Collection
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.errors import ConfigError

GroupSize = int | Literal["auto"] | None
ScaleDtype = Literal["auto", "float16", "bfloat16", "float32"]
# one scale for a group of columns of a row, for a row, or for the matrix: the last two whatever the group size
ScalePer = Literal["group", "row", "matrix"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_AUTO_GROUPS = (128, 64, 32)


def check_group_size(group_size: GroupSize, tile: int = 1) -> None:
    """Refuse groups that are not whole tiles of ``tile`` columns.

    Raises:
        ConfigError: with the value and the limit.
    """
    if isinstance(group_size, int) and (group_size < tile or group_size % tile):
        multiple = f" and a multiple of {tile}" if tile > 1 else ""
        raise ConfigError(
            f"grid.group_size is {group_size}; it must be at least {tile}{multiple}. Use null for one group a row, or "
            "auto."
        )


def importance_for(range_: str, importance: Tensor | None, instead: str) -> Tensor | None:
    """What the fit of a range weighs errors by: None unless it is the weighted one.

    Args:
        range_: the setting ``range``.
        importance: mean square of each input (diag H), if known.
        instead: ranges that need none, for the message.

    Raises:
        ConfigError: the range is weighted and there is no importance.
    """
    if range_ != "weighted":
        return None
    if importance is None:
        raise ConfigError(f"grid.range is 'weighted' but there are no statistics; use {instead} instead.")
    return importance


def resolve_group_size(
    group_size: GroupSize, width: int, widths: Collection[int], scale_per: ScalePer = "group"
) -> int | None:
    """``auto`` decided: the largest of 128, 64, 32 that divides ``widths``, else that divides ``width``, else None.

    Scales of rows and of matrices know no groups: None.
    """
    if scale_per != "group":
        return None
    if group_size != "auto":
        return group_size
    fitting = [g for g in _AUTO_GROUPS if width % g == 0]
    shared = [g for g in fitting if all(other % g == 0 for other in widths)]
    return next(iter(shared or fitting), None)


def resolve_scale_dtype(scale_dtype: ScaleDtype, dtype: torch.dtype) -> ScaleDtype:
    """``auto`` decided: the checkpoint's dtype, float32 for a wider one."""
    if scale_dtype != "auto":
        return scale_dtype
    if dtype == torch.bfloat16:
        return "bfloat16"
    return "float16" if dtype == torch.float16 else "float32"


def columns_per_group(group_size: GroupSize, width: int) -> int:
    """Columns of a full group of a matrix of that width.

    Raises:
        ConfigError: the group size is not decided yet.
    """
    if group_size == "auto":
        raise ConfigError("grid.group_size is still 'auto'; call resolve(shape, dtype) first.")
    return width if group_size is None else min(group_size, width)


def storage_dtype(scale_dtype: ScaleDtype) -> torch.dtype:
    """Dtype of the stored scales.

    Raises:
        ConfigError: it is not decided yet.
    """
    if scale_dtype == "auto":
        raise ConfigError("grid.scale_dtype is still 'auto'; call resolve(shape, dtype) first.")
    return _DTYPES[scale_dtype]


def grouped(values: Float[Tensor, "rows n"], size: int) -> Float[Tensor, "rows groups size"]:
    """The columns of each group; zeros behind the end of a shorter last group."""
    rows, n = values.shape
    groups = -(-n // size)
    return torch.nn.functional.pad(values, (0, groups * size - n)).reshape(rows, groups, size)
