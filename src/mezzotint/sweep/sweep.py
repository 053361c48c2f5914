"""The sweep over blocks: two streams in lockstep, statistics, rounding, and what is recorded of each."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mezzotint.blockwise.stops import BlockRun, stops
from mezzotint.blockwise.streams import Streams, summed
from mezzotint.core.contracts import Block, InputGroup, Matrix
from mezzotint.core.records import BlockRecord
from mezzotint.core.statistics import Accumulator, Statistics
from mezzotint.errors import NonFiniteError
from mezzotint.models import dematerialize, materialize
from mezzotint.planning.needs import drifts_by_output
from mezzotint.planning.parts import active_parts, settings_of
from mezzotint.storage.stores import check_finite
from mezzotint.sweep.adapter import Adapter
from mezzotint.sweep.descent import Descent, Measured
from mezzotint.sweep.folding import Folding
from mezzotint.sweep.job import Job
from mezzotint.sweep.solve import Solver
from mezzotint.sweep.statistics import Compared, aligned, normed, token_weights
from mezzotint.sweep.watcher import Watcher


class Sweep:
    """Quantizes block after block.

    Only one block of the original is in memory at a time.

    Args:
        job: the original, where its blocks run, and statistics of single matrices in the place of streams.
        streams: calibration samples on their way through the model; None if nothing needs statistics.
        solver: quantizes the matrices of an input group; its entries say what is to be done.
        watcher: told of what is finished, and tells what an earlier process has finished.
        adapter: takes the low-rank compensations; what follows in the model sees them.
        to_the_end: run the streams through every block, also behind the last that needs statistics.
    """

    def __init__(
        self,
        job: Job,
        streams: Streams | None,
        solver: Solver,
        watcher: Watcher,
        *,
        adapter: Adapter | None = None,
        to_the_end: bool = False,
    ) -> None:
        self._source = source = job.source
        self._entries = dict(solver.entries)
        self._streams = streams
        self._solver = solver
        self._watcher = watcher
        self._device = job.request.device
        self._folding = Folding(source, self._entries, rewritten=watcher.rewritten, device=self._device)
        self._adapter = adapter
        self._importance = job.planned.importance
        needing = [block.index for block in source.map.blocks if self._needs(block)]
        head = source.map.head
        self._head_needs = head in self._entries and bool(self._entries[head].needs)
        self._last_streamed = len(source.map.blocks) - 1 if self._head_needs or to_the_end else max(needing, default=-1)

    def run(self) -> None:
        """The embedding, all blocks and the head, as far as they are to be quantized."""
        first = self._watcher.first
        if first == 0 and self._source.map.embedding in self._entries:
            self._embedding(self._source.map.matrices[self._source.map.embedding])
        for block in self._source.map.blocks[first:]:
            started = time.perf_counter()
            submodules: Mapping[str, Mapping[str, float]] = {}
            if self._streams is None or block.index > self._last_streamed:
                for position, group in enumerate(block.groups):
                    self._from_checkpoint(group.matrices, _place(block.index, position))
                error = None
            else:
                error, submodules = self._streamed(block, self._streams)
            relative = None if error is None or error[1] == 0 else error[0] / error[1]
            self._watcher.finished(
                BlockRecord(
                    index=block.index,
                    error=None if error is None else error[0],
                    relative_error=relative,
                    seconds=time.perf_counter() - started,
                    submodules=submodules,
                )
            )
            self._watcher.border(block.index + 1, streams=self._head_needs or block.index < self._last_streamed)
        head = self._source.map.head
        if head in self._entries and first <= len(self._source.map.blocks):
            needs = self._entries[head].needs
            statistics: tuple[Statistics | None, Statistics | None] = None, None
            if self._streams is not None and self._head_needs:
                with self._streams.products():
                    statistics = self._streams.head_statistics(needs)
            self._from_checkpoint([head], _place(len(self._source.map.blocks), 0), *statistics)
        self._watcher.border(len(self._source.map.blocks) + 1, streams=False, last=True)

    def _embedding(self, matrix: Matrix) -> None:
        """Quantize the table that tokens are looked up in; the quantized stream begins with what it holds then."""
        weight = matrix.view(self._source.checkpoint.parameter(matrix.parameter).to(self._device))
        check_finite(matrix.name, weight)
        place = _place(len(self._source.map.blocks), 1)
        for solved in self._solver.solve([(matrix, weight)], None, None, place=place):
            self._solver.deliver(solved)
            if self._streams is not None:
                self._streams.embed(matrix, solved.value)

    def _needs(self, block: Block) -> bool:
        names = [name for group in block.groups for name in group.matrices]
        return any(self._entries[name].needs for name in names if name in self._entries)

    def _from_checkpoint(
        self, names: Sequence[str], place: int, fit: Statistics | None = None, held_out: Statistics | None = None
    ) -> None:
        """Quantize a group's matrices read straight from the checkpoint; no block is run."""
        matrices = [self._source.map.matrices[name] for name in names if name in self._entries]
        # one at a time where nothing is fitted together, for memory
        together = any(self._entries[matrix.name].basis is not None for matrix in matrices)
        for members in [matrices] if together else [[matrix] for matrix in matrices]:
            weights = []
            for matrix in members:
                parameter = self._source.checkpoint.parameter(matrix.parameter).to(self._device)
                weight = matrix.view(parameter)
                check_finite(matrix.name, weight)
                weights.append((matrix, weight))
            if self._importance is not None:
                fit = self._importance.statistics(members[0], self._device)
            for solved in self._solver.solve(weights, fit, held_out, place=place):
                self._solver.deliver(solved)

    def _streamed(
        self, block: Block, streams: Streams
    ) -> tuple[tuple[float, float], Mapping[str, Mapping[str, float]]]:
        """Run the block on both streams and quantize its groups on the way; gives error and signal, and losses."""
        module = self._source.skeleton.get_submodule(block.path)
        materialize(module, block.path, self._source.checkpoint, dtype=streams.dtype, device=self._device)
        for name, parameter in module.named_parameters(block.path):
            check_finite(name, parameter)
        self._solver.notes |= self._folding.fold(block, module, streams)
        runs = streams.quantized_runs(block.index, module)
        descent = self._descent(block, runs, streams)
        noted = () if descent is None else descent.observed
        known = self._watcher.values(block.index)
        with stops(self._source.skeleton, block, parallel=self._source.map.parallel_residual, noted=noted):
            compared = {i: needs for i, needs in self._compared(block).items() if i >= len(known)}
            with streams.products():
                streams.run_original(block.index, module, compared)
            for position, group in enumerate(block.groups):
                if position < len(known):
                    for name, weight in self._weights(group):
                        weight.copy_(known[position].read(name))
                    continue
                self._group(
                    block.index, position, group, self._measured(group, position, runs, streams, descent), descent
                )
                if descent is not None:
                    descent.reached(position, runs)
                else:  # what a descent may still change is not finished
                    self._watcher.group(block.index, position + 1, lambda i: self._weights(block.groups[i]))
            if descent is not None:
                descent.finish()
            with streams.products():
                error = streams.finish_quantized(runs)
        dematerialize(module)
        return error, {} if descent is None else descent.losses

    def _descent(self, block: Block, runs: Sequence[BlockRun], streams: Streams) -> Descent | None:
        """What optimises the submodules of a block, if it has any to optimise."""
        settings = settings_of(block, self._entries)
        parts = () if settings is None else tuple(active_parts(block, settings, self._entries, self._source.map))
        if settings is None or not parts:
            return None
        descent = Descent(
            self._source,
            block,
            parts,
            settings,
            entries=self._entries,
            solver=self._solver,
            streams=streams,
            measure=lambda group: self._measured(block.groups[group], group, runs, streams, descent),
            device=self._device,
        )
        return descent

    def _group(
        self, block: int, position: int, group: InputGroup, statistics: Measured, descent: Descent | None
    ) -> None:
        by_expert: dict[int | None, list[Matrix]] = {}
        for name in (name for name in group.matrices if name in self._entries):
            matrix = self._source.map.matrices[name]
            by_expert.setdefault(matrix.expert, []).append(matrix)
        for expert, members in by_expert.items():
            weights = [(m, self._weight(m)) for m in members]
            if descent is not None:  # originals must outlive what they are replaced by
                weights = [(m, weight.clone()) for m, weight in weights]
            for solved in self._solver.solve(
                weights, *statistics.get(expert, (None, None)), place=_place(block, position)
            ):
                if descent is None:
                    self._solver.deliver(solved)
                else:
                    descent.keep(solved)
                matrix, value = solved.matrix, solved.value
                if self._adapter is not None and self._entries[matrix.name].compensation is not None:
                    value = self._adapter.compensated(solved)
                self._weight(matrix).copy_(value)

    def _measured(
        self, group: InputGroup, position: int, runs: Sequence[BlockRun], streams: Streams, descent: Descent | None
    ) -> Measured:
        """Statistics of a group's inputs, if anything needs them."""
        if not self._group_needs(group.matrices):
            return {}
        with streams.products():
            return self._statistics(group, position, runs, streams, descent)

    def _weights(self, group: InputGroup) -> Iterator[tuple[str, Tensor]]:
        """Names and weights, as they are now, of the matrices of a group that are quantized."""
        for name in group.matrices:
            if name in self._entries:
                yield name, self._weight(self._source.map.matrices[name])

    def _weight(self, matrix: Matrix) -> Tensor:
        return matrix.view(self._source.skeleton.get_parameter(matrix.parameter).data)

    def _group_needs(self, names: Sequence[str]) -> frozenset[str]:
        return frozenset().union(*(self._entries[name].needs for name in names if name in self._entries))

    def _compared(self, block: Block) -> dict[int, frozenset[str]]:
        """Groups of which both streams' inputs are needed, and the statistics they are needed for."""
        both = frozenset({"drift", "residual"})
        needs = {i: self._group_needs(group.matrices) & both for i, group in enumerate(block.groups)}
        return {i: found for i, found in needs.items() if found}

    def _statistics(
        self, group: InputGroup, position: int, runs: Sequence[BlockRun], streams: Streams, descent: Descent | None
    ) -> Measured:
        """Sums over the fit windows and over the held-out windows, by expert."""
        matrices = [self._source.map.matrices[name] for name in group.matrices]
        widths = {matrix.expert: matrix.shape[1] for matrix in matrices}
        needs = self._group_needs(group.matrices)
        if not group.sees_residual:
            needs -= {"residual"}
        scaling = self._scaling(group) if "residual" in needs else None
        members = [self._entries[name] for name in group.matrices if name in self._entries]
        judged = needs & frozenset().union(*(entry.judges for entry in members))
        narrow = drifts_by_output(members, self._source.map.matrices, filed=streams.storage is not None)
        weights = {m.expert: self._weight(m) for m in matrices if narrow and m.name in self._entries}
        sums = {
            (expert, held): Accumulator(
                width,
                judged if held else needs,
                rows=matrices[0].shape[0],
                weight=weights.get(expert),
                device=self._device,
                storage=streams.storage,
                factors=streams.factors,
            )
            for expert, width in widths.items()
            for held in (False, True)
        }
        for index, (batch, run) in enumerate(zip(streams.batches, runs, strict=True)):
            reached = run.reach(position)
            # a descent asks again
            last = descent is None
            originals = streams.original_inputs(index, position, last=last) if "drift" in needs else {}
            for expert, inputs in reached.items():
                if descent is not None:
                    descent.see(index, position, inputs)
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
        finished = {key: summed(streams.ranks, value) for key, value in sums.items()}
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


def _place(block: int, position: int) -> int:
    """A number for each input group of a model."""
    return block * 1009 + position
