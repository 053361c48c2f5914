"""The sweep over blocks: two streams in lockstep, statistics, rounding, and what is recorded of each."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mezzotint.core.contracts import (
    Aim,
    Block,
    InputGroup,
    Matrix,
    Quadratic,
    QuantizedWeight,
    Rounded,
)
from mezzotint.core.files import Entry
from mezzotint.core.metrics import h_error
from mezzotint.core.statistics import Accumulator, Statistics
from mezzotint.errors import MezzotintError, NonFiniteError
from mezzotint.models import Source, dematerialize, materialize
from mezzotint.pipeline.capture import BlockRun, stops
from mezzotint.pipeline.residency import check_finite
from mezzotint.pipeline.streams import Streams
from mezzotint.pipeline.tokens import Compared, aligned, normed, token_weights
from mezzotint.targets.qep import quadratic_of

Sink = Callable[[Matrix, QuantizedWeight], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRecord:
    """What was done to one matrix.

    Attributes:
        bits_per_weight: side data included.
        weight_error: ``||V - W||^2 / ||W||^2``.
        h_error: the same in the norm of the inputs it was fitted on; None where there were none.
        h_error_held_out: the same on the held-out windows.
        tokens: that its statistics saw.
    """

    name: str
    bits_per_weight: float
    weight_error: float
    h_error: float | None
    h_error_held_out: float | None
    tokens: float
    seconds: float
    decisions: Mapping[str, float | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecord:
    """What came out of one block.

    Attributes:
        error: mean squared difference of full-precision block on full-precision stream and quantized block on
            quantized stream, on the held-out windows; None when no stream ran.
        relative_error: the same over the mean square of the full-precision output.
    """

    index: int
    error: float | None
    relative_error: float | None
    seconds: float


class Sweep:
    """Quantizes block after block.

    Args:
        source: the original; only one block of it is in memory at a time.
        entries: what is to be done, in running order.
        streams: calibration windows on their way through the model; None if nothing needs statistics.
        sink: takes each finished matrix.
        notify: told of every record.
        device: where blocks and statistics live.
        to_the_end: run the streams through every block, also behind the last that needs statistics.
    """

    def __init__(
        self,
        source: Source,
        entries: Sequence[Entry],
        streams: Streams | None,
        *,
        sink: Sink,
        notify: Callable[[MatrixRecord | BlockRecord], None],
        device: str = "cpu",
        to_the_end: bool = False,
    ) -> None:
        self._source = source
        self._entries = {entry.matrix: entry for entry in entries}
        self._streams = streams
        self._sink = sink
        self._notify = notify
        self._device = device
        needing = [block.index for block in source.map.blocks if self._needs(block)]
        head = source.map.head
        self._head_needs = head in self._entries and bool(self._entries[head].needs)
        self._last_streamed = len(source.map.blocks) - 1 if self._head_needs or to_the_end else max(needing, default=-1)

    def run(self) -> None:
        """All blocks, then the head if it is to be quantized."""
        for block in self._source.map.blocks:
            started = time.perf_counter()
            if self._streams is None or block.index > self._last_streamed:
                for group in block.groups:
                    for name in group.matrices:
                        self._from_checkpoint(name)
                error = None
            else:
                error = self._streamed(block, self._streams)
            relative = None if error is None or error[1] == 0 else error[0] / error[1]
            self._notify(
                BlockRecord(
                    index=block.index,
                    error=None if error is None else error[0],
                    relative_error=relative,
                    seconds=time.perf_counter() - started,
                )
            )
        head = self._source.map.head
        if head in self._entries:
            needs = self._entries[head].needs
            statistics = self._streams.head_statistics(needs) if self._streams and self._head_needs else (None, None)
            self._from_checkpoint(head, *statistics)

    def _needs(self, block: Block) -> bool:
        names = [name for group in block.groups for name in group.matrices]
        return any(self._entries[name].needs for name in names if name in self._entries)

    def _from_checkpoint(self, name: str, fit: Statistics | None = None, held_out: Statistics | None = None) -> None:
        """Quantize a matrix read straight from the checkpoint; no block is run."""
        if name not in self._entries:
            return
        matrix = self._source.map.matrices[name]
        parameter = self._source.checkpoint.parameter(matrix.parameter).to(self._device)
        self._quantize(matrix, matrix.view(parameter), fit, held_out)

    def _streamed(self, block: Block, streams: Streams) -> tuple[float, float]:
        """Run the block on both streams and quantize its groups on the way; gives error and signal."""
        module = self._source.skeleton.get_submodule(block.path)
        materialize(module, block.path, self._source.checkpoint, dtype=streams.dtype, device=self._device)
        for name, parameter in module.named_parameters(block.path):
            check_finite(name, parameter)
        with stops(self._source.skeleton, block, parallel=self._source.map.parallel_residual):
            streams.run_original(block.index, module, self._compared(block))
            runs = streams.quantized_runs(block.index, module)
            for position, group in enumerate(block.groups):
                self._group(group, position, runs, streams)
            error = streams.finish_quantized(runs)
        dematerialize(module)
        return error

    def _group(self, group: InputGroup, position: int, runs: Sequence[BlockRun], streams: Streams) -> None:
        names = [name for name in group.matrices if name in self._entries]
        statistics = self._statistics(group, position, runs, streams) if self._group_needs(names) else {}
        for name in names:
            matrix = self._source.map.matrices[name]
            fit, held_out = statistics.get(matrix.expert, (None, None))
            weight = matrix.view(self._source.skeleton.get_parameter(matrix.parameter).data)
            weight.copy_(self._quantize(matrix, weight, fit, held_out))

    def _group_needs(self, names: Sequence[str]) -> frozenset[str]:
        return frozenset().union(*(self._entries[name].needs for name in names if name in self._entries))

    def _compared(self, block: Block) -> dict[int, frozenset[str]]:
        """Groups of which both streams' inputs are needed, and the statistics they are needed for."""
        both = frozenset({"drift", "residual"})
        needs = {i: self._group_needs(group.matrices) & both for i, group in enumerate(block.groups)}
        return {i: found for i, found in needs.items() if found}

    def _statistics(
        self, group: InputGroup, position: int, runs: Sequence[BlockRun], streams: Streams
    ) -> dict[int | None, tuple[Statistics, Statistics]]:
        """Sums over the fit windows and over the held-out windows, by expert."""
        matrices = [self._source.map.matrices[name] for name in group.matrices]
        widths = {matrix.expert: matrix.shape[1] for matrix in matrices}
        needs = self._group_needs(group.matrices)
        if not group.added_to_residual or group.experts:
            needs -= {"residual"}
        scaling = self._scaling(group) if "residual" in needs else None
        sums = {
            (expert, held): Accumulator(width, needs, rows=matrices[0].shape[0], device=self._device)
            for expert, width in widths.items()
            for held in (False, True)
        }
        for index, (batch, run) in enumerate(zip(streams.batches, runs, strict=True)):
            reached = run.reach(position)
            originals = streams.original_inputs(index, position) if "drift" in needs else {}
            for expert, inputs in reached.items():
                # without a row of the full-precision stream, tokens count as without drift
                original = originals.get(expert, inputs)
                compared = Compared(
                    quantized=inputs.values,
                    original=aligned(original, inputs),
                    stream=inputs.stream,
                    original_stream=original.stream,
                )
                if scaling is not None:
                    compared = scaling(compared)
                sums[expert, batch.held_out].add(
                    compared.quantized,
                    original=compared.original,
                    residual=compared.residual,
                    weights=token_weights(batch.mask, inputs),
                )
        finished = {key: value.finish() for key, value in sums.items()}
        for (expert, _), value in finished.items():
            if not torch.isfinite(value.gram.diagonal()).all():
                name = next(m.name for m in matrices if m.expert == expert)
                raise NonFiniteError(
                    f"the inputs of {name} are not finite (NaN or infinity). The model overflows on this calibration "
                    "text in float32, or an earlier weight is broken; check the original with `mezzotint evaluate`."
                )
        return {expert: (finished[expert, False], finished[expert, True]) for expert in widths}

    def _scaling(self, group: InputGroup) -> Callable[[Compared], Compared] | None:
        """What a target that looks through the next norm does to the tokens of a group."""
        name = next(name for name in group.matrices if name in self._entries)
        kind = self._entries[name].target.norm_scale
        if kind == "none":
            return None
        matrix = self._source.map.matrices[name]
        parameters = self._source.skeleton.get_parameter
        weight = matrix.view(parameters(matrix.parameter).data)
        bias = None if matrix.bias is None else parameters(matrix.bias).data
        return lambda compared: normed(compared, weight, bias, own=kind == "own")

    def _quantize(self, matrix: Matrix, weight: Tensor, fit: Statistics | None, held_out: Statistics | None) -> Tensor:
        """Target, grid, rounding; hands the result on and returns its dense value."""
        started = time.perf_counter()
        entry = self._entries[matrix.name]
        decisions: dict[str, float | str] = {}
        check_finite(matrix.name, weight)
        used = fit
        if fit is not None and fit.tokens < least_tokens(matrix):
            used = Statistics.isotropic(matrix.shape[1], fit.gram)
            if fit.drift is not None:  # and no drift is known either
                used = replace(used, drift=torch.zeros_like(fit.drift))
            decisions["statistics"] = f"isotropic: only {fit.tokens:.0f} tokens, at least {least_tokens(matrix)} needed"
        try:
            aim = entry.target.aim(weight, used, held_out)
            importance = None if used is None else used.importance
            rounded = entry.rounding.round(aim, entry.grid.fit(aim.matrix, importance), used)
            decisions.update(rounded.decisions)
            if entry.refinement is not None and used is not None:
                judge = None
                if held_out is not None and held_out.tokens > 0:
                    judge = quadratic_of(weight.to(aim.matrix.dtype), held_out)
                rounded, decisions["refinement"] = refined(entry, rounded, aim, used, judge)
        except MezzotintError as error:
            error.add_note(f"while quantizing {matrix.name}")
            raise
        result = QuantizedWeight(shape=matrix.shape, code=rounded.code, grid=rounded.grid)
        value = rounded.value
        self._sink(matrix, result)
        original = weight.to(value.dtype)
        self._notify(
            MatrixRecord(
                name=matrix.name,
                bits_per_weight=result.bits().total / weight.numel(),
                weight_error=_energy(value - original) / max(_energy(original), 1e-30),
                h_error=_measured(original, value, fit),
                h_error_held_out=_measured(original, value, held_out),
                tokens=0.0 if fit is None else fit.tokens,
                seconds=time.perf_counter() - started,
                decisions={**decisions, **aim.decisions},
            )
        )
        return value


def refined(entry: Entry, rounded: Rounded, aim: Aim, fit: Statistics, judge: Quadratic | None) -> tuple[Rounded, str]:
    """The refined result if it is better on the held-out windows, else the one it started from, and which it is.

    What is descended is the distance to the aim, with all the restraint of its strength and damping; what judges is the
    loss itself, on other tokens.
    """
    assert entry.refinement is not None
    if judge is None:
        return rounded, "refused: nothing is held out to judge it on"
    cross = aim.matrix @ fit.gram.to(aim.matrix.dtype)
    near = Quadratic(gram=fit.gram, cross=cross, const=(cross * aim.matrix).sum(-1))
    better = entry.refinement.refine(rounded, aim.matrix, near, lambda grid: entry.rounding.round(aim, grid, fit))
    before, after = float(judge.value(rounded.value).sum()), float(judge.value(better.value).sum())
    return (better, "accepted") if after < before else (rounded, "refused: worse on the held-out windows")


def _energy(values: Tensor) -> float:
    """Sum of squares."""
    flat = values.flatten()
    return float(flat @ flat)


def _measured(weight: Tensor, value: Tensor, statistics: Statistics | None) -> float | None:
    """``h_error`` where there were inputs to measure it on."""
    return h_error(weight, value, statistics.gram) if statistics is not None and statistics.tokens > 0 else None


def least_tokens(matrix: Matrix) -> int:
    """Fewer tokens than this say too little about a matrix's inputs: one for every sixteen columns."""
    return max(16, matrix.shape[1] // 16)


def as_json(record: MatrixRecord | BlockRecord) -> dict[str, Any]:
    """A record for the report."""
    return asdict(record)
