"""Coordinate descent over the submodules of one block, while the streams wait inside it.

Queries and keys are relaxed when their group is quantized, values and the output projection when that one's group is,
up and down when down's is. What comes later in the block then sees what was decided: after values or up have changed,
the streams start the block anew, and the closing linear gets statistics of its new inputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mezzotint.blockwise.stops import BlockRun, Call, Inputs
from mezzotint.blockwise.streams import Streams
from mezzotint.core.contracts import Block
from mezzotint.core.plans import Entry
from mezzotint.core.statistics import Statistics
from mezzotint.models import Source
from mezzotint.models.inner import Attended, attended, last_input
from mezzotint.planning.parts import Place, places
from mezzotint.submodules.batches import AttentionBatch, Linear, Linears, MlpBatch, Outer
from mezzotint.submodules.lpcd import MEMBERS, Lpcd, Part
from mezzotint.submodules.qk import QueryKey
from mezzotint.submodules.scores import Pattern
from mezzotint.submodules.updown import UpDown
from mezzotint.submodules.vo import ValueOutput
from mezzotint.sweep.solve import Known, Solved, Solver

Submodule = QueryKey | ValueOutput | UpDown
Batches = Callable[[], Iterator[Any]]
Measured = Mapping[int | None, tuple[Statistics, Statistics]]

# by which group's inputs a part starts from, and which group it waits for
_FIRST: Mapping[Part, str] = {"qk": "q", "vo": "v", "updown": "up"}
_LAST: Mapping[Part, str] = {"qk": "q", "vo": "o", "updown": "down"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A part of the block, with what it is fitted and judged on."""

    part: Part
    submodule: Submodule
    fit: Batches
    held_out: Batches


class Descent:
    """Submodules of one block.

    Args:
        source: the original; the block is materialised.
        block: the block.
        parts: that are optimised in it.
        settings: of the descent.
        entries: what is done to each matrix.
        solver: quantizes a matrix again.
        streams: give batches, and hold what is kept of them.
        measure: gives statistics of a group's inputs as they are now.
        device: where the block is.
    """

    def __init__(
        self,
        source: Source,
        block: Block,
        parts: Sequence[Part],
        settings: Lpcd,
        *,
        entries: Mapping[str, Entry],
        solver: Solver,
        streams: Streams,
        measure: Callable[[int], Measured],
        device: str,
    ) -> None:
        self._source, self._block, self._settings = source, block, settings
        self._solver, self._streams, self._measure = solver, streams, measure
        self._places = places(block, source.map, device)
        self._parts: dict[Part, int] = {part: self._places[_LAST[part]].group for part in parts}
        self._firsts = {self._places[_FIRST[part]].group for part in parts}
        self._lasts = {self._places[_LAST[part]].group for part in parts if part != "qk"}
        around = {self._places[_FIRST[part]].around for part in parts}
        self._observed = tuple(sorted(around - {block.path}))
        # the losses look through the next norm where the target of the closing linear does
        closing = {part: entries[self._places[_LAST[part]].matrix.name].target for part in parts}
        self._normed = {part: target.norm_scale != "none" for part, target in closing.items()}
        self._solved: dict[str, Solved] = {}
        # keys of the tensors that are held: of a batch, by number of the group and what they are
        self._held: list[dict[tuple[int, str], int]] = [{} for _ in streams.batches]
        self._used: dict[Part, dict[int, int]] = {part: self._chosen(part) for part in parts}
        self.losses: dict[str, dict[str, float]] = {}

    @property
    def observed(self) -> tuple[str, ...]:
        """Paths of modules whose calls a run must note."""
        return self._observed

    def see(self, batch: int, group: int, inputs: Inputs) -> None:
        """Hold what the parts need of a group's inputs; seen again after a change, the new ones replace the old."""
        windows = max(used.get(batch, 0) for used in self._used.values())
        tokens = windows * self._streams.batches[batch].tokens.shape[1]
        if tokens:
            self._hold(batch, group, values=inputs.values[:tokens] if group in self._firsts else None)
            stream = inputs.stream if group in self._lasts else None
            self._hold(batch, group, stream=None if stream is None else stream[:tokens])

    def keep(self, solved: Solved) -> None:
        """Take a matrix; what no part will change any more is handed on."""
        self._solved[solved.matrix.name] = solved
        self._deliver()

    def reached(self, group: int, runs: Sequence[BlockRun]) -> None:
        """Optimise the parts whose last group has just been quantized."""
        due: list[Part] = [part for part, last in self._parts.items() if last == group]
        for part in due:
            self._optimise(part, runs)
            del self._parts[part]
        self._deliver()

    def _deliver(self) -> None:
        coming = {self._places[kind].matrix.name for part in self._parts for kind in MEMBERS[part]}
        for name in [name for name in self._solved if name not in coming]:
            self._solver.deliver(self._solved.pop(name))

    def finish(self) -> None:
        """Forget what is held."""
        assert not self._solved
        for held in self._held:
            for key in held.values():
                self._streams.release(key)
            held.clear()
        self._streams.forget_inputs()

    # ---- descent -------------------------------------------------------------------------------------------------

    def _optimise(self, part: Part, runs: Sequence[BlockRun]) -> None:
        first, last = MEMBERS[part]
        known = self._solved[self._places[first].matrix.name].known
        if known.fit is None or known.fit is not known.used:  # too few tokens to say anything
            return
        task = _Task(
            part=part,
            submodule=self._submodule(part),
            fit=self._batches(part, runs, held_out=False),
            held_out=self._batches(part, runs, held_out=True),
        )
        with self._streams.products():
            own = sum((task.submodule.energy(batch) for batch in task.held_out()), 0.0)
            (energy,) = self._streams.ranks.total(own)
        if energy == 0:  # nothing comes out of it: nothing can be better
            return
        before = best = self._loss(task, self._linears())
        for _ in range(self._settings.sweeps):
            for member in (first, last):
                found = self._step(task, member, best)
                if found < best and part != "qk" and member == first:
                    self._renew(self._places[last], runs)
                best = found
        self.losses[part] = {"before": before / energy, "after": best / energy}

    def _submodule(self, part: Part) -> Submodule:
        originals = {kind: self._original(kind) for kind in MEMBERS[part]}
        if part == "qk":
            return QueryKey(originals=originals, metric=self._settings.metric)
        return ValueOutput(originals=originals) if part == "vo" else UpDown(originals=originals)

    def _step(self, task: _Task, member: str, best: float) -> float:
        """Relax, mix, project, judge; gives the new loss, or the old one where the member stays as it is."""
        place = self._places[member]
        before = self._solved[place.matrix.name]
        mixed = self._mixed(task, member, before)
        candidate = self._solver.again(before, place.replaced(before.aim.matrix, mixed))
        loss = self._loss(task, {**self._linears(), member: place.of(candidate.value, self._bias(place))})
        accepted = self._helps(loss, best)
        made = candidate if accepted else before
        told = {name: value for name, value in before.decisions.items() if name.startswith("submodules.")}
        told[f"submodules.{task.part}.{member}"] = (
            f"{'accepted' if accepted else 'refused'}: held-out loss times {loss / best if best else 1.0:.4f}"
        )
        self._solved[place.matrix.name] = replace(made, decisions={**made.decisions, **told})
        if not accepted:
            return best
        place.matrix.view(self._source.skeleton.get_parameter(place.matrix.parameter).data).copy_(candidate.value)
        return loss

    def _mixed(self, task: _Task, member: str, before: Solved) -> Tensor:
        """The member's relaxed rows, mixed with the original ones once."""
        assert before.known.used is not None
        original = task.submodule.originals[member].weight
        start = self._places[member].of(before.aim.matrix, None).weight
        closed = task.part != "qk" and member == MEMBERS[task.part][1]
        # what is solved from sums keeps full precision, as everywhere
        with nullcontext() if closed else self._streams.products():
            relaxed = task.submodule.relax(
                member,
                self._linears(),
                task.fit,
                before.known.used,
                start=start,
                search=self._settings.search(self._streams.ranks),
            )
        return original + self._settings.strength * (relaxed - original)

    def _loss(self, task: _Task, linears: Linears) -> float:
        """Of the submodule on the held-out windows."""
        with self._streams.products():
            own = sum((task.submodule.loss(linears, batch) for batch in task.held_out()), 0.0)
            return self._streams.ranks.total(own)[0]

    @staticmethod
    def _helps(loss: float, best: float) -> bool:
        return loss < best

    def _renew(self, last: Place, runs: Sequence[BlockRun]) -> None:
        """What comes before the last linear has changed: run to it anew, and measure its inputs again."""
        for run in runs:
            run.restart()
        fit, held_out = self._measure(last.group)[None]
        solved = self._solved[last.matrix.name]
        self._solved[last.matrix.name] = replace(solved, known=Known(fit=fit, used=fit, held_out=held_out))

    # ---- tensors of the block ------------------------------------------------------------------------------------

    def _linears(self) -> dict[str, Linear]:
        return {kind: place.current(self._source.skeleton) for kind, place in self._places.items()}

    def _bias(self, place: Place) -> Tensor | None:
        return None if place.matrix.bias is None else self._source.skeleton.get_parameter(place.matrix.bias).data

    def _original(self, kind: str) -> Linear:
        place = self._places[kind]
        return place.of(self._solved[place.matrix.name].weight, self._bias(place))

    # ---- batches -------------------------------------------------------------------------------------------------

    def _chosen(self, part: Part) -> dict[int, int]:
        """How many windows of each batch a part uses; it is fitted and judged on about as many."""
        limit = self._settings.tokens_of(part, self._places[_FIRST[part]].matrix.shape[1])
        found = dict[int, int]()
        for index, batch in enumerate(self._streams.batches):
            windows, seqlen = batch.tokens.shape
            # the first ones of all ranks, whichever has them
            before = batch.first - (self._streams.fitted if batch.held_out else 0)
            left = limit - before * seqlen
            if left > 0:
                found[index] = windows if left >= windows * seqlen else math.ceil(left / seqlen)
        return found

    def _hold(self, batch: int, group: int, **parts: Tensor | None) -> None:
        for name, value in parts.items():
            key = self._held[batch].pop((group, name), None)
            if key is not None:
                self._streams.release(key)
            if value is not None:
                self._held[batch][group, name] = self._streams.hold(value)

    def _get(self, batch: int, group: int, name: str, part: Part) -> Tensor | None:
        key = self._held[batch].get((group, name))
        return None if key is None else self._cut(batch, self._streams.held(key), part)

    def _cut(self, batch: int, value: Tensor, part: Part) -> Tensor:
        """Of what more windows of a batch have, ``[windows * seqlen, any]``, that of those that a part uses."""
        windows, seqlen = self._used[part][batch], self._streams.batches[batch].tokens.shape[1]
        return value[: windows * seqlen].unflatten(0, (windows, seqlen))

    def _batches(self, part: Part, runs: Sequence[BlockRun], *, held_out: bool) -> Batches:
        build = self._mlp if part == "updown" else self._attention
        numbers = [index for index in self._used[part] if self._streams.batches[index].held_out == held_out]
        if len(numbers) == 1:  # made once: no more than this one batch is in memory either way
            only = build(numbers[0], runs[numbers[0]], part)
            return lambda: iter((only,))
        return lambda: (build(index, runs[index], part) for index in numbers)

    def _weights(self, batch: int, like: Tensor) -> Tensor | None:
        mask = self._streams.batches[batch].mask
        return None if mask is None else mask[: len(like)].to(like)

    def _outer(self, batch: int, part: Part, mask: Tensor | None) -> Outer:
        last = self._places[_LAST[part]]
        original = self._streams.original_inputs(batch, last.group, last=False)[None]
        stream, values = self._get(batch, last.group, "stream", part), self._cut(batch, original.values, part)
        if stream is None or original.stream is None:
            return Outer(original=values, mask=mask)
        before = self._cut(batch, original.stream, part)
        return Outer(original=values, original_stream=before, stream=stream, mask=mask, normed=self._normed[part])

    def _attention(self, batch: int, run: BlockRun, part: Part) -> AttentionBatch:
        group = self._places["q"].group
        inputs = self._get(batch, group, "values", part)
        assert inputs is not None
        original = self._cut(batch, self._streams.original_inputs(batch, group, last=False)[None].values, part)
        weights = self._weights(batch, inputs)
        call = run.noted[self._places["q"].around].first(len(inputs), of=len(self._streams.batches[batch].tokens))
        seen = self._attended(call, "q", inputs.new_zeros(*inputs.shape[:2], len(self._rows("q"))))
        return AttentionBatch(
            inputs=inputs,
            original=original,
            query=lambda outputs: self._attended(call, "q", outputs).query,
            key=lambda outputs: self._attended(call, "k", outputs).key,
            value=lambda outputs: self._attended(call, "v", outputs).value,
            pattern=Pattern(
                scaling=seen.scaling, softcap=seen.softcap, visible=seen.visible, weights=weights, sinks=seen.sinks
            ),
            outer=None if part == "qk" else self._outer(batch, part, weights),
            first=self._streams.batches[batch].first,
        )

    def _rows(self, kind: str) -> range:
        place = self._places[kind]
        return range(place.matrix.shape[0] if place.rows is None else len(place.rows))

    def _attended(self, call: Call, kind: str, outputs: Tensor) -> Attended:
        """What attention multiplies when the linear of one kind gives ``outputs`` and the others nothing."""
        module = self._source.skeleton.get_submodule
        others = {place.linear: place for place in (self._places[other] for other in ("q", "k", "v"))}
        given = {
            module(path): outputs.new_zeros(*outputs.shape[:2], place.matrix.shape[0]) for path, place in others.items()
        }
        given[module(self._places[kind].linear)] = self._places[kind].into(outputs)
        around = self._places["q"].around
        hidden = outputs.new_zeros(()).expand(*outputs.shape[:2], self._places["q"].matrix.shape[1])
        return attended(module(around), (hidden, *call.args), call.kwargs, given)

    def _mlp(self, batch: int, run: BlockRun, part: Part) -> MlpBatch:
        up, down, module = self._places["up"], self._places["down"], self._source.skeleton.get_submodule
        inputs = self._get(batch, up.group, "values", part)
        assert inputs is not None
        known = {}
        gate = self._places.get("gate")
        if gate is not None and gate.around == up.around:
            whole = gate.matrix.view(self._source.skeleton.get_parameter(gate.matrix.parameter).data)
            known[gate.linear] = Linear(whole, self._bias(gate))(inputs)

        of = len(self._streams.batches[batch].tokens)
        if up.around == self._block.path:  # what comes before up does not matter: it runs on one window
            call, entering = run.call.first(1, of), inputs[:1]
        else:
            call, entering = run.noted[up.around].first(len(inputs), of), inputs

        def hidden(outputs: Tensor) -> Tensor:
            given = {module(path): value for path, value in known.items()}
            whole = up.into(outputs)
            if up.linear in known:  # gate and up are one matrix
                assert up.rows is not None
                whole = known[up.linear].index_copy(-1, up.rows, outputs)
            given[module(up.linear)] = whole
            return last_input(module(up.around), (entering, *call.args), call.kwargs, given, module(down.linear))

        return MlpBatch(
            inputs=inputs,
            hidden=hidden,
            outer=self._outer(batch, part, self._weights(batch, inputs)),
            first=self._streams.batches[batch].first,
        )
