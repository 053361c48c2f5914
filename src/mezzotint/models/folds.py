"""Parameters that can absorb scales of a group's inputs without changing the model."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mezzotint.core.structure import Block, InputGroup, Matrix, ModelMap, NormEdge, Reader, Role
from mezzotint.models.binding import BoundCheckpoint
from mezzotint.models.rewriting import Scaled


@dataclass(frozen=True, slots=True, kw_only=True)
class Producer:
    """A matrix whose rows make the inputs of another one, times something that does not depend on them.

    Attributes:
        row_of_input: the row that makes each input; heads that share a value share its row.
    """

    matrix: Matrix
    row_of_input: Callable[[], Int[Tensor, " in"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Columns of the readers are multiplied by scales, and the norm or the producer divides by them.

    Attributes:
        expert: the readers are one expert of a stacked parameter.
        exact: known from the structure; else the caller must try whether the block computes the same.
    """

    readers: tuple[Reader, ...]
    norm: NormEdge | None = None
    producer: Producer | None = None
    expert: int | None = None

    @property
    def exact(self) -> bool:
        """A norm's output times a gain; a producer may have anything behind it that is not linear."""
        return self.norm is not None

    def tied(self, values: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
        """The mean over the inputs that one row makes: scales must be one for all of them."""
        if self.producer is None:
            return values
        rows = self.producer.row_of_input().to(values.device)
        sums = values.new_zeros(self.producer.matrix.shape[0]).index_add_(0, rows, values)
        counts = values.new_zeros(self.producer.matrix.shape[0]).index_add_(0, rows, torch.ones_like(values))
        return (sums / counts.clamp_min(1))[rows]


def fold_of(model: ModelMap, block: Block, group: InputGroup, expert: int | None = None) -> Fold | None:
    """Where the scales of a group's inputs can go, or None.

    A norm takes those of everything that reads it. Those of the output projection go into the value projection (with
    grouped heads one scale for all query heads of a group), those of the down projection into the up projection: exact
    where attention has nothing but a mean over tokens between the two, and the activation nothing but a factor.

    Args:
        model: the map.
        block: of the group.
        group: matrices that share the inputs.
        expert: the one whose inputs they are, where ``group.experts`` and no norm serves all of them.
    """
    if group.norm is not None:
        return Fold(readers=group.norm.readers, norm=group.norm)
    members = [model.matrices[name] for name in group.matrices if model.matrices[name].expert == expert]
    if len(members) != 1:
        return None
    reader = members[0]
    kinds = {role.kind for role in block.roles if role.matrix == reader.name}
    producer = None
    if kinds == {"o"}:
        producer = _values(model, block, reader)
    elif kinds == {"down"}:
        producer = _gated(model, block, reader)
    if producer is None:
        return None
    return Fold(readers=(Reader(reader.parameter, reader.transposed),), producer=producer, expert=expert)


def _values(model: ModelMap, block: Block, reader: Matrix) -> Producer | None:
    role = next((role for role in block.roles if role.kind == "v"), None)
    if role is None or not role.head_dim:
        return None
    matrix, width = model.matrices[role.matrix], role.head_dim
    rows = _rows(role, matrix)
    heads, queries = len(rows) // width, reader.shape[1] // width
    if not heads or heads * width != len(rows) or queries * width != reader.shape[1] or queries % heads:
        return None

    def row_of_input() -> Tensor:
        of_heads = _rows(role, matrix).view(heads, 1, width)
        return of_heads.expand(heads, queries // heads, width).reshape(-1)

    return Producer(matrix=matrix, row_of_input=row_of_input)


def _gated(model: ModelMap, block: Block, reader: Matrix) -> Producer | None:
    for role in block.roles:
        matrix = model.matrices[role.matrix]
        beside = _parent(matrix) == _parent(reader) and matrix.expert == reader.expert
        if role.kind == "up" and beside and len(_rows(role, matrix)) == reader.shape[1]:
            return Producer(matrix=matrix, row_of_input=lambda role=role, matrix=matrix: _rows(role, matrix))
    return None


def _parent(matrix: Matrix) -> str:
    """Module around the one that holds the matrix; of experts the one that holds them."""
    owner = matrix.parameter.rpartition(".")[0]
    return owner if matrix.expert is not None else owner.rpartition(".")[0]


def _rows(role: Role, matrix: Matrix) -> Int[Tensor, " rows"]:
    return torch.arange(matrix.shape[0]) if role.rows is None else role.rows()


def apply_fold(
    checkpoint: BoundCheckpoint, fold: Fold, scale: Float[Tensor, " in"], unrounded: Collection[str] = ()
) -> tuple[str, ...]:
    """Add the changes of a fold to the checkpoint's; gives the parameters that they change.

    A norm's gain is stored rounded. The scales that the readers get are those that the rounded gain divides by, so
    that nothing is lost by it.

    Args:
        checkpoint: its ``rewriting`` is added to.
        fold: where the scales go.
        scale: positive; the same for inputs that are tied.
        unrounded: parameters that are quantized from what is read; others are stored in the checkpoint's dtype.
    """
    scale = scale.double().cpu()
    changed: list[str] = []

    def add(parameter: str, factor: Tensor, *, shift: float = 0.0, expert: int | None = None) -> None:
        dtype = None if parameter in unrounded else checkpoint.tensors[checkpoint.sources(parameter)[0]].dtype
        checkpoint.rewriting.add(parameter, Scaled(factor=factor, shift=shift, expert=expert, dtype=dtype))
        changed.append(parameter)

    if fold.norm is not None:
        shift = 1.0 if fold.norm.gain == "1+w" else 0.0
        scale = _divided(checkpoint, fold.norm.parameter, scale, shift)
        add(fold.norm.parameter, 1 / scale, shift=shift)
        if fold.norm.bias is not None:
            add(fold.norm.bias, 1 / scale)
    if fold.producer is not None:
        matrix = fold.producer.matrix
        rows = torch.ones(matrix.shape[0], dtype=torch.float64)
        rows[fold.producer.row_of_input()] = 1 / scale
        add(matrix.parameter, rows if matrix.transposed else rows.unsqueeze(1), expert=matrix.expert)
        if matrix.bias is not None:
            add(matrix.bias, rows, expert=matrix.expert)
    for reader in fold.readers:
        add(reader.parameter, scale.unsqueeze(1) if reader.transposed else scale, expert=fold.expert)
    return tuple(dict.fromkeys(changed))


def _divided(checkpoint: BoundCheckpoint, gain: str, scale: Tensor, shift: float) -> Tensor:
    """What the gain is really divided by when the result is rounded; 1 where it or the result is zero."""
    stored = checkpoint.parameter(gain)
    dtype = checkpoint.tensors[checkpoint.sources(gain)[0]].dtype
    before = stored.double() + shift
    after = (before / scale - shift).to(dtype).double() + shift
    exact = before / after
    return torch.where(torch.isfinite(exact) & (exact > 0), exact, 1.0)
