"""Rotations of the residual stream and of the heads of values, as changes of parameters."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mezzotint.core.structure import Block, Matrix, NormEdge
from mezzotint.errors import ModelError
from mezzotint.models import Source
from mezzotint.models.folds import fold_of
from mezzotint.models.rewriting import Scaled, Turned

Outlets = frozenset({"o", "down"})


def refuses_stream(source: Source, *, untie: bool) -> str | None:
    """Why the residual stream of a model cannot be rotated, as far as its structure tells; None otherwise.

    A gain in front of the stream scales coordinates that would be rotated away; gains behind it go into what reads
    them. A tied head needs the gain of the final norm, and the embedding must not have it.
    """
    model = source.map
    if model.head is None or model.final_norm is None or not model.final_norm.on_stream:
        return "it has no output head behind a norm of the residual stream"
    if model.matrices[model.head].tied_to is not None and not untie:
        parameter = model.matrices[model.embedding].parameter
        size = source.checkpoint.tensors[source.checkpoint.sources(parameter)[0]].nbytes
        return (
            f"its head is the embedding, and only one of them may take the gain of the final norm: untied, the model "
            f"grows by {size / 2**20:.1f} MiB. Allow that with --untie, or rotate heads only with --residual none"
        )
    for block in model.blocks:
        kinds = {role.matrix: role.kind for role in block.roles}
        for group in block.groups:
            names = ", ".join(group.matrices[:3])
            inner = all(kinds.get(name) in Outlets for name in group.matrices)
            if inner and not (group.added_to_residual or group.experts):
                return f"the output of {names} passes a norm before it is added to the residual stream [post-norm]"
            if not inner and (group.norm is None or not group.norm.on_stream):
                return f"{names} do not read the residual stream through a norm that nothing else reads"
    return None


def rotate_stream(source: Source, rotation: Tensor) -> None:
    """Add the changes that turn the residual stream: hidden states ``h`` become ``h @ rotation``.

    With ``n(h) g + b`` what a norm makes, ``n(h Q) = n(h) Q``: its gain goes into the columns of what reads it, the
    columns are turned, and the bias becomes ``(b / g) Q``.

    Args:
        source: not refused by `refuses_stream`; its checkpoint's rewriting is added to.
        rotation: ``[hidden, hidden]``, orthogonal; it must keep means where a norm subtracts them.

    Raises:
        ModelError: a norm has a bias where its gain is zero.
    """
    model, add = source.map, source.checkpoint.rewriting.add
    assert model.final_norm is not None
    edges = [group.norm for block in model.blocks for group in block.groups if group.norm is not None]
    add(model.matrices[model.embedding].parameter, Turned(matrix=rotation))
    for edge in dict.fromkeys([*edges, model.final_norm]):
        _turn_readers(source, edge, rotation)
    for matrix in _writers(source):
        add(matrix.parameter, Turned(matrix=rotation, axis=-1 if matrix.transposed else -2))
        if matrix.bias is not None:
            add(matrix.bias, Turned(matrix=rotation))


def rotate_heads(source: Source, block: Block, make: Callable[[int], Tensor]) -> str | None:
    """Add the changes that turn the values of every head of a block alike; gives why not, where it is not possible.

    Args:
        source: its checkpoint's rewriting is added to.
        block: attention in it must be linear in the values; the caller tries that.
        make: an orthogonal matrix of a head's width.
    """
    value = next((role for role in block.roles if role.kind == "v"), None)
    for group in block.groups:
        fold = fold_of(source.map, block, group) if group.norm is None else None
        if fold is None or fold.producer is None or value is None or fold.producer.matrix.name != value.matrix:
            continue
        matrix, rotation = fold.producer.matrix, make(value.head_dim or 0)
        rows = torch.arange(matrix.shape[0]) if value.rows is None else value.rows()
        add = source.checkpoint.rewriting.add
        add(matrix.parameter, Turned(matrix=rotation, axis=-1 if matrix.transposed else -2, index=rows))
        if matrix.bias is not None:
            add(matrix.bias, Turned(matrix=rotation, index=rows))
        (reader,) = fold.readers
        add(reader.parameter, Turned(matrix=rotation, axis=-2 if reader.transposed else -1))
        return None
    return "it has no matrices of values and of outputs whose heads are known"


def _turn_readers(source: Source, edge: NormEdge, rotation: Tensor) -> None:
    checkpoint = source.checkpoint
    shift = 1.0 if edge.gain == "1+w" else 0.0
    gain = checkpoint.parameter(edge.parameter).double() + shift
    for reader in edge.readers:
        axis = -2 if reader.transposed else -1
        factor = gain.unsqueeze(1) if reader.transposed else gain
        checkpoint.rewriting.add(reader.parameter, Scaled(factor=factor))
        checkpoint.rewriting.add(reader.parameter, Turned(matrix=rotation, axis=axis))
    checkpoint.rewriting.add(edge.parameter, lambda value: torch.full_like(value, 1.0 - shift))
    if edge.bias is not None:
        lost = (gain == 0) & (checkpoint.parameter(edge.bias) != 0)
        if bool(lost.any()):
            raise ModelError(
                f"{edge.bias} cannot be rotated: it is not zero in {int(lost.sum())} places where the gain "
                f"{edge.parameter} is. Rotate heads only, with --residual none."
            )
        checkpoint.rewriting.add(edge.bias, Scaled(factor=torch.where(gain == 0, 1.0, 1 / gain)))
        checkpoint.rewriting.add(edge.bias, Turned(matrix=rotation))


def _writers(source: Source) -> Iterator[Matrix]:
    """Matrices that write to the residual stream; of stacked experts one that stands for all."""
    seen: set[str] = set()
    for block in source.map.blocks:
        kinds = {role.matrix: role.kind for role in block.roles}
        for name in (name for group in block.groups for name in group.matrices):
            matrix = source.map.matrices[name]
            if kinds.get(name) in Outlets and matrix.parameter not in seen:
                seen.add(matrix.parameter)
                yield matrix
