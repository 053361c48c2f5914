"""Peak memory of a run, predicted from shapes phase by phase; checked in tests against what runs take."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mezzotint.blockwise.batches import windows_of_batch
from mezzotint.blockwise.borders import GRADIENT_BYTES
from mezzotint.core import panels as squares
from mezzotint.core.contracts import Block, InputGroup, Matrix
from mezzotint.core.metrics import LOGIT_COPIES
from mezzotint.core.plans import Entry
from mezzotint.models import Source
from mezzotint.planning.needs import drifts_by_output
from mezzotint.submodules.scores import KEPT

BASE_BYTES = 480 * 2**20  # interpreter, torch, transformers and what they load on first use, measured on Linux
_FLOAT = 4
_WAITING = 3  # copies of its hidden states that a batch holds while it waits inside a block, its inputs aside
_FORWARD = 3  # temporaries of a block's forward, in units of its widest activations
_SOLVING = 6  # copies of a matrix: target, work, values, codes, cross term, original
_REFINING = 4  # more of them
_RELAXING = 5  # copies of a matrix while a submodule is optimised: vectors of conjugate gradients
_SLOPES = 16  # of a batch's activations meanwhile, one that is held out included; measured on SmolLM2
_FRAGMENTED = 1.25  # what the allocator holds over what is in use, where it may keep what was freed


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Calibration windows, as far as memory is concerned."""

    total: int
    seqlen: int

    @property
    def batch(self) -> int:
        """Tokens that run together."""
        return min(self.total, windows_of_batch(self.seqlen) * self.seqlen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Bytes of a run's phases, the part that spilling cannot lower and the part that it can.

    Attributes:
        fixed: largest sum of what must be in memory at a time.
        spilled: hidden states and inputs of other batches, which go to a file where there is no room.
        waiting: what all batches hold inside a block while each waits there.
        passing: what one batch holds, where every group starts the block anew for one batch after the other.
    """

    fixed: int
    spilled: int = 0
    waiting: int = 0
    passing: int = 0

    def peak(self, room: int, *, keep_runs: bool) -> int:
        """With that many bytes of hidden states in memory."""
        return self.fixed + min(self.spilled, room) + (self.waiting if keep_runs else self.passing)


def phases(
    source: Source, entries: Sequence[Entry], tokens: Tokens | None, *, panels: bool = False
) -> tuple[Phases, ...]:
    """What is in memory in every phase of every block, the largest of alike blocks once.

    With ``panels`` wide squares of sums lie in files, see `StoredSquare`.
    """
    by_name = {entry.matrix: entry for entry in entries}
    found = {Phases(fixed=BASE_BYTES + _from_checkpoint(source, by_name, tokens))}
    if tokens is not None:
        embedding = _numel(source, source.map.embedding)
        stored = max(t.dtype.itemsize for t in source.checkpoint.tensors.values())
        found.add(Phases(fixed=BASE_BYTES + embedding * (_FLOAT + stored)))
        if any(entry.curvature is not None for entry in entries):
            found.update(_backward(source, entries, tokens, stored))
        for block in source.map.blocks:
            if any(name in by_name and by_name[name].needs for group in block.groups for name in group.matrices):
                found.update(_block(source, block, by_name, tokens, panels=panels))
    return tuple(found)


def _from_checkpoint(source: Source, by_name: Mapping[str, Entry], tokens: Tokens | None) -> int:
    """Matrices that are rounded as they are read, one at a time, and the weights of those that are copied."""
    sizes = [0]
    for block in source.map.blocks:
        names = [name for group in block.groups for name in group.matrices if name in by_name]
        if tokens is None or not any(by_name[name].needs for name in names):
            sizes += [_alone(source, name, by_name, tokens) for name in names]
    for name in (source.map.embedding, source.map.head):
        if name is not None and name in by_name:
            sizes.append(_alone(source, name, by_name, tokens))
    return max(sizes)


def _alone(source: Source, name: str, by_name: Mapping[str, Entry], tokens: Tokens | None) -> int:
    """A matrix, and the sums of its inputs where an importance matrix takes the place of text."""
    width = source.map.matrices[name].shape[1]
    square = width * width if tokens is None and by_name[name].needs else 0
    return (_SOLVING * _numel(source, name) + square) * _FLOAT


def _block(source: Source, block: Block, by_name: Mapping[str, Entry], tokens: Tokens, *, panels: bool) -> set[Phases]:
    matrices = source.map.matrices
    hidden = source.map.stream_width
    names = [name for group in block.groups for name in group.matrices]
    base = BASE_BYTES + sum(_numel(source, name) for name in names) * _FLOAT
    both = any("drift" in entry.needs for entry in by_name.values())
    # one window in eight is held out, and its full-precision stream is carried always
    streams = tokens.total * hidden * _FLOAT * (2.0 if both else 1.125)
    widths = [max(matrices[name].shape[1] for name in group.matrices) for group in block.groups]
    widest = max(max(matrices[name].shape) for name in names)
    forward = _FORWARD * tokens.batch * widest * _FLOAT
    kept = [tokens.total * width * _FLOAT if both else 0 for width in widths]
    found = {Phases(fixed=base + forward, spilled=int(streams + sum(kept)))}
    if any(by_name[name].submodules is not None for name in names if name in by_name):
        # originals, aims and values of all members, the sums of their groups, and what a step takes
        largest = max(_numel(source, name) for name in names) * _FLOAT
        sums = sum(
            _sums(g, by_name, matrices, _Square(w, panels=panels), w * hidden * _FLOAT)
            for g, w in zip(block.groups, widths, strict=True)
        )
        # attention is kept of one batch that is fitted on and of one that is held out
        step = _RELAXING * largest + _SLOPES * tokens.batch * widest * _FLOAT + 2 * KEPT * _FLOAT
        each = (max(widths) + _WAITING * hidden) * _FLOAT
        found.add(
            Phases(
                fixed=base + 2 * (base - BASE_BYTES) + sums + step,
                spilled=int(streams + sum(kept)),
                waiting=tokens.total * each,
                passing=tokens.batch * each,
            )
        )
    for position, group in enumerate(block.groups):
        members = [by_name[name] for name in group.matrices if name in by_name]
        if not any(entry.needs for entry in members):
            continue
        width = widths[position]
        each = (width + _WAITING * hidden) * _FLOAT
        held = {"waiting": tokens.total * each, "passing": tokens.batch * each}
        sharing = Counter(matrices[entry.matrix].expert for entry in members)
        experts = len({matrices[name].expert for name in group.matrices})
        square = _Square(width, panels=panels)
        sums = experts * _sums(group, by_name, matrices, square, width * hidden * _FLOAT)
        measuring = base + sums + forward
        alone = max(sharing.values()) == 1
        solving = (
            base
            + sums
            + max(_solving(entry, _numel(source, entry.matrix) * _FLOAT, square, alone=alone) for entry in members)
        )
        behind = int(streams + sum(kept[position + 1 :]))
        # full-precision inputs are forgotten batch by batch, as the quantized ones come
        here = min(kept[position], tokens.batch * width * _FLOAT)
        found.add(Phases(fixed=measuring, spilled=behind + here, **held))
        found.add(Phases(fixed=solving, spilled=behind, **held))
    return found


def _backward(source: Source, entries: Sequence[Entry], tokens: Tokens, stored: int) -> set[Phases]:
    """The way back through the model, which the curvature in outputs is measured on."""
    matrices, text = source.map.matrices, source.config.get_text_config()
    seen = curvature_tokens(entries, tokens)
    states = (len(source.map.blocks) + 1) * seen * source.map.stream_width * _FLOAT
    logits = 2 * min(GRADIENT_BYTES, LOGIT_COPIES * tokens.seqlen * text.vocab_size * _FLOAT)
    around = [source.map.embedding]
    if source.map.head is not None and matrices[source.map.head].tied_to is None:
        around.append(source.map.head)
    embedding = sum(_numel(source, name) for name in around) * _FLOAT + _numel(source, around[0]) * stored
    found = {Phases(fixed=BASE_BYTES + embedding + logits, spilled=states)}
    sizes = {entry.matrix: entry.curvature.block_size for entry in entries if entry.curvature is not None}
    for block in source.map.blocks:
        names = [name for group in block.groups for name in group.matrices]
        widest = max(max(matrices[name].shape) for name in names)
        sums = sum(matrices[name].shape[0] * sizes[name] for name in names if name in sizes)
        graph = _SLOPES * tokens.seqlen * widest
        weights = sum(_numel(source, name) for name in names)
        found.add(Phases(fixed=BASE_BYTES + (weights + sums + graph) * _FLOAT, spilled=states))
    return found


def curvature_tokens(entries: Sequence[Entry], tokens: Tokens) -> int:
    """That the curvature in outputs is measured on, in whole windows; 0 where nothing asks for it."""
    asked = max((entry.curvature.tokens for entry in entries if entry.curvature is not None), default=0)
    return min(-(-asked // tokens.seqlen) * tokens.seqlen, tokens.total)


class _Square:
    """Bytes of a square of sums."""

    def __init__(self, width: int, *, panels: bool) -> None:
        self.bytes = width * width * _FLOAT
        self.filed = panels and squares.is_wide(width, _FLOAT)

    @property
    def kept(self) -> int:
        """In memory for as long as the group is worked on."""
        return 0 if self.filed else self.bytes


def _sums(
    group: InputGroup, by_name: Mapping[str, Entry], matrices: Mapping[str, Matrix], square: _Square, residual: int
) -> int:
    """Sums over the windows that are fitted on and over those that are held out."""
    members = [by_name[name] for name in group.matrices if name in by_name]
    sizes = {"gram": square.kept, "drift": square.kept, "residual": residual if group.sees_residual else 0}
    if drifts_by_output(members, matrices, filed=square.filed):
        # the sum, and the weights as its factor in half the bytes
        sizes["drift"] = 3 * max(math.prod(matrices[entry.matrix].shape) for entry in members) * _FLOAT // 2
    needs = frozenset().union(*(entry.needs for entry in members))
    judged = needs & frozenset().union(*(entry.judges for entry in members))
    return squares.PANEL_BYTES * square.filed + sum(sizes.get(name, 0) for names in (needs, judged) for name in names)


def _solving(entry: Entry, matrix: int, square: _Square, *, alone: bool) -> int:
    """Factors and copies of one matrix; only where others need it too, the ridge stays while there is a factor."""
    ridge = square.bytes if "drift" in entry.target.needs else 0
    turned = 2 * square.bytes if entry.basis is not None else 0
    factor = square.bytes if "gram" in entry.rounding.needs else 0
    if square.filed and (entry.refinement is not None or "drift" in entry.rounding.needs):
        factor += square.bytes  # these take pieces of a sum again and again, so that it is read as a whole
    factors = max(ridge, turned + factor) if alone else ridge + turned + factor
    return factors + (_SOLVING + _REFINING * (entry.refinement is not None)) * matrix


def unbounded(largest: int) -> int:
    """The peak of a run without a limit, whose allocator keeps what was freed."""
    return BASE_BYTES + int(_FRAGMENTED * (largest - BASE_BYTES))


def _numel(source: Source, name: str) -> int:
    rows, columns = source.map.matrices[name].shape
    return rows * columns
