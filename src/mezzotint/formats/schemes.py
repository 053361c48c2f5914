"""Common part of all formats with uniform integers: schemes of matrices, and what these formats cannot store."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mezzotint.core.contracts import Grid, Matrix, ModelMap
from mezzotint.core.plans import Entry, Format, PackedWeight, Plan, Refusal
from mezzotint.errors import FormatError
from mezzotint.formats.targets import refuses_tied
from mezzotint.grids.uniform import UniformGrid

_USUAL_GROUPS = (128, 64, 32)  # sizes that GPU kernels have


class Scheme(NamedTuple):
    """What engines must know of a matrix before they read it."""

    bits: int
    symmetric: bool
    group_size: int | None

    def __str__(self) -> str:
        groups = "per channel" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.bits} bits {'symmetric' if self.symmetric else 'asymmetric'} {groups}"


def schemes_of(plan: Plan, model: ModelMap) -> dict[str, Scheme]:
    """Schemes by matrix name, in the order of the plan, of entries on uniform grids."""
    schemes = {}
    for entry in plan.entries:
        if isinstance(entry.grid, UniformGrid):
            grid = entry.grid.resolve(model.matrices[entry.matrix].shape, torch.float32)
            assert grid.group_size != "auto"
            schemes[entry.matrix] = Scheme(grid.bits, grid.symmetric, grid.group_size)
    return schemes


def resolved(matrix: Matrix, grid: Grid, dtype: torch.dtype) -> UniformGrid:
    """The grid of a matrix that passed `refuses_uniform`, without any ``auto``."""
    assert isinstance(grid, UniformGrid), f"{matrix.name}: `refuses` accepts uniform grids only"
    return grid.resolve(matrix.shape, dtype)


def refuses_uniform(entry: Entry, matrix: Matrix, name: str) -> Refusal | None:
    """The first rule that this entry breaks in a format of uniform integers, or None.

    Rules: ``linear-only``, ``tied``, ``uniform-only``, ``no-transform``, ``matrix-scale``, ``ragged-group``.

    Args:
        entry: of the plan.
        matrix: that it is about.
        name: of the format.
    """
    refusal = refuses_linear(matrix)
    if refusal is not None:
        return refusal
    if not isinstance(entry.grid, UniformGrid):
        return Refusal(
            rule="uniform-only",
            what=f"grid of {matrix.name}",
            value=entry.grid.kind,
            limit=f"{name} stores uniform grids only",
            remedy="Use grid.kind=uniform, or --for dense.",
            nearest=UniformGrid(bits=min(8, max(2, round(entry.grid.bits)))),
        )
    if entry.basis is not None:
        return Refusal(
            rule="no-transform",
            what=f"transform of {matrix.name}",
            value=type(entry.basis).__name__,
            limit="engines multiply by the stored matrix as it is",
            remedy="Use transform.kind=none, or --for dense.",
            nearest=entry.grid,
        )
    return _refuses_group(matrix, entry.grid)


def refuses_linear(matrix: Matrix) -> Refusal | None:
    """Rules ``linear-only`` and ``tied`` of formats whose readers replace the weight of an ``nn.Linear``."""
    if not matrix.linear or matrix.transposed or matrix.expert is not None or len(matrix.sources) != 1:
        return Refusal(
            rule="linear-only",
            what=matrix.name,
            value="not the weight of an nn.Linear",
            limit="engines read packed weights for nn.Linear only",
            remedy="Keep it, or use --for dense.",
        )
    return refuses_tied(matrix)


def _refuses_group(matrix: Matrix, grid: UniformGrid) -> Refusal | None:
    if grid.scale_per == "matrix":
        return Refusal(
            rule="matrix-scale",
            what=f"grid.scale_per of {matrix.name}",
            value=grid.scale_per,
            limit="engines read scales of rows, or of groups of columns",
            remedy="Use grid.scale_per=row, or --for mezzotint.",
            nearest=replace(grid, scale_per="row"),
        )
    width, size = matrix.shape[1], grid.group_size
    if not isinstance(size, int) or width % size == 0:
        return None
    divisors = [d for d in range(8, min(width, 1024) + 1) if width % d == 0]
    usual = [d for d in _USUAL_GROUPS if d <= size and width % d == 0]
    below = [d for d in divisors if d <= size]
    best = usual[0] if usual else below[-1] if below else None
    shown = ", ".join(map(str, divisors)) or "none from 8 to 1024"
    return Refusal(
        rule="ragged-group",
        what=f"grid.group_size of {matrix.name}",
        value=f"{size} does not divide the width {width}",
        limit="engines read whole groups only",
        remedy=f"Sizes that divide it: {shown}; or null for one scale a row.",
        nearest=replace(grid, group_size=best),
    )


def refuses_bits(grid: UniformGrid, matrix: Matrix, known: Sequence[int], *, rule: str, who: str) -> Refusal | None:
    """Bits that a reader does not know, with the nearest that it knows, the more of two.

    Args:
        grid: of the matrix.
        matrix: that it is about.
        known: bits.
        rule: name of it.
        who: subject and verb, for the message.
    """
    if grid.bits in known:
        return None
    best = min(known, key=lambda b: (abs(b - grid.bits), -b))
    return Refusal(
        rule=rule,
        what=f"grid.bits of {matrix.name}",
        value=str(grid.bits),
        limit=f"{who} {listed(known)} bits",
        remedy=f"The nearest is --set grid.bits={best}.",
        nearest=replace(grid, bits=best),
    )


def listed(values: Sequence[int]) -> str:
    """Numbers as a sentence has them.

    Example:
        >>> listed((2, 3, 4)), listed((4,))
        ('2, 3 and 4', '4')
    """
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def check_scale_dtype(matrix: Matrix, grid: UniformGrid, dtype: torch.dtype) -> None:
    """Refuse scales that an engine would round once more when it loads a checkpoint of ``dtype``.

    Raises:
        FormatError: the checkpoint's dtype does not hold them exactly.
    """
    if dtype in (grid.storage_dtype, torch.float32):
        return
    refusal = Refusal(
        rule="scale-dtype",
        what=f"grid.scale_dtype of {matrix.name}",
        value=grid.scale_dtype,
        limit=f"engines round the scales of a {str(dtype).removeprefix('torch.')} checkpoint to that dtype",
        remedy="Use grid.scale_dtype=auto.",
    )
    raise FormatError(str(refusal))


def uniform_grid(scheme: Mapping[str, object], dtype: torch.dtype) -> UniformGrid:
    """The grid that a stored matrix is on.

    Args:
        scheme: ``bits``, ``symmetric`` and ``group_size``.
        dtype: of its scales.
    """
    return UniformGrid(
        range="minmax",  # says how scales were chosen, which no file does
        scale_dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        **scheme,  # type: ignore[arg-type]
    )


def packed_uniform(
    form: Format,
    module: str,
    shape: tuple[int, int],
    parts: tuple[str, ...],
    *,
    grid: UniformGrid,
    read: Callable[[str], Tensor],
) -> PackedWeight:
    """One packed weight of a format of uniform integers.

    Args:
        form: whose `weight` takes the tensors back.
        module: name.
        shape: ``(out, in)``.
        parts: names of its tensors; the first holds the codes.
        grid: that they are on.
        read: gives a tensor by name.
    """
    name = f"{module}.weight"
    matrix = Matrix(name=module, parameter=name, sources=(name,), shape=shape, fusion="")
    return PackedWeight(
        parts=parts,
        dtype=grid.storage_dtype,
        shape=shape,
        grid=grid,
        transform=None,
        weight=lambda: form.weight(matrix, {part: read(part) for part in parts}, grid),
    )


def check_present(parts: Iterable[str], tensors: Mapping[str, object]) -> None:
    """Refuse a folder that lacks parts of a packed weight.

    Raises:
        FormatError: names the first that is missing.
    """
    for part in parts:
        if part not in tensors:
            raise FormatError(f"{part} is missing; the folder is broken. Make or download it again.")
