"""One input group's matrices: target, basis, grid, rounding, refinement, and what is recorded of each."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mezzotint.core.contracts import Aim, Basis, Matrix, Quadratic, QuantizedWeight, Rounded, Transform
from mezzotint.core.curvature import Curvature
from mezzotint.core.metrics import h_energies, relative
from mezzotint.core.plans import Entry
from mezzotint.core.records import MatrixRecord
from mezzotint.core.statistics import Statistics, padded
from mezzotint.errors import MezzotintError
from mezzotint.process.ranks import ALONE, WHOLE, Ranks, Share
from mezzotint.targets.qep import quadratic_of

Sink = Callable[[Matrix, QuantizedWeight], None]
Weights = Sequence[tuple[Matrix, Tensor]]


class _Turned(NamedTuple):
    """An aim, still in the original basis, the basis to round it in, and the statistics there.

    Attributes:
        rows: of the matrix that the aim has.
    """

    aim: Aim
    basis: Basis | None
    statistics: Statistics | None
    rows: slice = WHOLE.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Statistics of a matrix's inputs.

    Attributes:
        fit: as they were summed; None if nothing is known.
        used: what stands for them where they saw too little.
        held_out: of other windows, for decisions.
    """

    fit: Statistics | None
    used: Statistics | None
    held_out: Statistics | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A quantized matrix, with everything that quantizing it again needs.

    Attributes:
        weight: the original, ``[out, in]``; a view of the block's parameter until that is overwritten.
        aim: in the original basis; of the rows that this process worked on, of all of them where submodules are
            optimised.
        value: what the codes stand for.
    """

    matrix: Matrix
    weight: Tensor
    known: Known
    aim: Aim
    basis: Basis | None
    result: QuantizedWeight
    value: Tensor
    seconds: float
    decisions: Mapping[str, float | str]


class Solver:
    """Quantizes matrices that receive the same inputs.

    Each rank rounds some rows of every matrix, and gets the others' results.

    Args:
        entries: of the plan.
        sink: takes each finished matrix.
        notify: told of every record.
        seed: of random bases.
        ranks: that share the rows.
        curvature: gives that of a matrix whose entry wants it, as it was measured.

    Attributes:
        entries: what is to be done, by matrix.
        notes: what was decided before about a matrix, for its record.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        *,
        sink: Sink,
        notify: Callable[[MatrixRecord], None],
        seed: int,
        ranks: Ranks = ALONE,
        curvature: Callable[[Matrix], Curvature] | None = None,
    ) -> None:
        self._ranks = ranks
        self.entries = entries
        self._sink = sink
        self._notify = notify
        self._seed = seed
        self._curvature = curvature
        self.notes: dict[str, Mapping[str, float | str]] = {}

    def solve(
        self, weights: Weights, fit: Statistics | None, held_out: Statistics | None, *, place: int
    ) -> Iterator[Solved]:
        """Quantize matrices with the same statistics, one after the other.

        Args:
            weights: matrices, each with its weight ``[out, in]``.
            fit: of their inputs; None if nothing is known.
            held_out: the same on other windows, for decisions.
            place: number of the input group: it has random numbers of its own.
        """
        used, note = trusted(weights[0][0], fit)
        known = Known(fit=fit, used=used, held_out=held_out)
        turned = self._turned(weights, used, held_out, place)
        last = weights[-1][0]
        for matrix, weight in weights:
            yield self._one(matrix, weight, known, turned.get(matrix.name), note, last=matrix is last)

    def again(self, solved: Solved, aim: Tensor) -> Solved:
        """The same matrix quantized to another aim ``[out, in]``, in the same basis."""
        known, statistics = solved.known, solved.known.used
        if solved.basis is not None and statistics is not None:
            statistics = solved.basis.statistics(self._of_rounding([(solved.matrix, aim)], statistics))
        turned = _Turned(Aim(matrix=aim, corrected=True), solved.basis, statistics)
        found = self._one(solved.matrix, solved.weight, known, turned, {}, last=True)
        return replace(found, seconds=solved.seconds + found.seconds)

    def deliver(self, solved: Solved) -> None:
        """Hand a matrix that will not change any more on, and tell of it."""
        self._sink(solved.matrix, solved.result)
        rows = self._ranks.share(len(solved.value), 1)
        value = solved.value[rows.rows]
        original = solved.weight[rows.rows].to(value.dtype)
        seen = [s if s is not None and s.tokens > 0 else None for s in (solved.known.fit, solved.known.held_out)]
        known = [_of_rows(statistics, rows.rows) for statistics in seen]
        sums = [_energy(value - original), _energy(original)]
        sums += [part for statistics in known for part in _losses(original, value, statistics)]
        sums = rows.ranks.total(*sums)
        fit, held_out = (_errors(s, *sums[i : i + 3]) for s, i in zip(known, (2, 5), strict=True))
        self._notify(
            MatrixRecord(
                name=solved.matrix.name,
                bits_per_weight=self.entries[solved.matrix.name].bits.total / solved.value.numel(),
                weight_error=sums[0] / max(sums[1], 1e-30),
                h_error=fit[0],
                h_error_held_out=held_out[0],
                objective=fit[1],
                objective_held_out=held_out[1],
                tokens=0.0 if solved.known.fit is None else solved.known.fit.tokens,
                seconds=solved.seconds,
                decisions=solved.decisions,
            )
        )

    def _turned(
        self, weights: Weights, used: Statistics | None, held_out: Statistics | None, place: int
    ) -> dict[str, _Turned]:
        """Aims and bases of the matrices that have a transform; one fit for all that share one."""
        sharing: dict[Transform, Weights] = {}
        for matrix, weight in weights:
            transform = self.entries[matrix.name].basis
            if transform is not None:
                sharing[transform] = [*sharing.get(transform, ()), (matrix, weight)]
        found: dict[str, _Turned] = {}
        for transform, members in sharing.items():
            aims = [self._aim(matrix, weight, used, held_out) for matrix, weight in members]
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + place)
            bases = transform.fit(aims, used, None, generator)
            statistics = None if used is None else bases[0].statistics(self._of_rounding(members, used))
            for (matrix, _), aim, basis in zip(members, aims, bases, strict=True):
                found[matrix.name] = _Turned(aim, basis, statistics)
        return found

    def _of_rounding(self, members: Weights, used: Statistics) -> Statistics:
        """What roundings and refinements see: no drift where only aims take it up."""
        if any("drift" in self.entries[matrix.name].rounding.needs for matrix, _ in members):
            return used
        return replace(used, drift=None, output_drift=None, residual=None)

    def _aim(self, matrix: Matrix, weight: Tensor, used: Statistics | None, held_out: Statistics | None) -> Aim:
        try:
            return self.entries[matrix.name].target.aim(weight, used, held_out)
        except MezzotintError as error:
            error.add_note(f"while quantizing {matrix.name}")
            raise

    def _one(
        self,
        matrix: Matrix,
        weight: Tensor,
        known: Known,
        turned: _Turned | None,
        note: Mapping[str, float | str],
        *,
        last: bool,
    ) -> Solved:
        started = time.perf_counter()
        entry, judge, held_out = self.entries[matrix.name], None, known.held_out
        share = self._share(entry, matrix)
        curvature = self._of_outputs(entry, matrix, share)
        if turned is None:
            # what is decided by all rows, or relaxed later, is aimed at by all ranks, and only then divided
            whole = entry.target.decides or not entry.grid.rowwise or entry.submodules is not None
            rows = WHOLE.rows if whole else share.rows
            used = _of_rows(known.used, rows)
            turned = _Turned(self._aim(matrix, weight[rows], used, _of_rows(held_out, rows)), None, used, rows)
        if last:
            for statistics in (known.used, turned.statistics):
                if statistics is not None:
                    statistics.forget_ridges()  # wide ones are a large part of the memory
        if entry.refinement is not None and held_out is not None and held_out.tokens > 0:
            own = _of_rows(held_out, share.rows)
            assert own is not None
            judge = quadratic_of(weight[share.rows].to(turned.aim.matrix.dtype), own, curvature=curvature)
        try:
            result, decisions = quantized(entry, matrix.shape, turned, judge, share, curvature=curvature)
        except MezzotintError as error:
            error.add_note(f"while quantizing {matrix.name}")
            raise
        return Solved(
            matrix=matrix,
            weight=weight,
            known=known,
            aim=turned.aim,
            basis=turned.basis,
            result=result,
            value=result.dense(turned.aim.matrix.dtype),
            seconds=time.perf_counter() - started,
            decisions={**self.notes.get(matrix.name, {}), **note, **decisions, **turned.aim.decisions},
        )

    def _share(self, entry: Entry, matrix: Matrix) -> Share:
        """The rows of a matrix that this rank rounds."""
        if entry.basis is not None and entry.refinement is not None:
            return WHOLE  # what refinement is judged by, in the original basis, depends on all rows in this one
        if entry.curvature is not None:
            return self._ranks.share(matrix.shape[0], entry.curvature.block_size)
        return self._ranks.share(matrix.shape[0], entry.grid.multiple[0] if entry.grid.pads else entry.grid.tile[0])

    def _of_outputs(self, entry: Entry, matrix: Matrix, share: Share) -> Curvature | None:
        """What was measured of the rows of a share, on the device of the streams."""
        if entry.curvature is None:
            return None
        assert self._curvature is not None
        measured = self._curvature(matrix)
        if not bool(measured.blocks.any()):
            self.notes[matrix.name] = {**self.notes.get(matrix.name, {}), "curvature": "none: no gradient arrived"}
            return None
        return measured.damped(entry.curvature.damping).take_rows(share.rows)


def quantized(
    entry: Entry,
    shape: tuple[int, int],
    turned: _Turned,
    judge: Quadratic | None,
    share: Share,
    *,
    curvature: Curvature | None = None,
) -> tuple[QuantizedWeight, dict[str, float | str]]:
    """Basis, padding, grid, rounding and refinement of one aim; what they made, and what they decided.

    Args:
        entry: settings.
        shape: of the matrix.
        turned: the aim, of all rows or of those of the share.
        judge: of the rows of the share, for the refinement.
        share: rows to round here; the others come from their ranks.
        curvature: of the outputs that are the rows of the share.
    """
    aim, basis, statistics, rows = turned
    if basis is not None:
        aim = replace(aim, matrix=basis.weight(aim.matrix))
    if entry.grid.pads:
        wide, statistics = padded(aim.matrix, statistics, entry.grid.multiple)
        aim = replace(aim, matrix=wide)

    def loss(found: Rounded) -> float:
        assert judge is not None
        part = QuantizedWeight(shape=(len(judge.cross), shape[1]), code=found.code, grid=found.grid, basis=basis)
        return share.ranks.total(float(judge.value(part.dense(judge.cross.dtype)).sum()))[0]

    grid = entry.grid.fit(aim.matrix, statistics and statistics.importance)
    if rows != share.rows:
        grid, statistics = grid.take_rows(share.rows), _of_rows(statistics, share.rows)
        aim = replace(aim, matrix=aim.matrix[share.rows])
    aim = replace(aim, curvature=curvature)
    rounded = entry.rounding.round(aim, grid, statistics)
    decisions = dict(rounded.decisions)
    if entry.refinement is not None and statistics is not None:
        rounded, decisions["refinement"] = refined(entry, rounded, aim, statistics, loss if judge else None)
    code, whole = rounded.grid.join_rows(rounded.code, share.ranks.joined)
    return QuantizedWeight(shape=shape, code=code, grid=whole, basis=basis), decisions


def trusted(matrix: Matrix, fit: Statistics | None) -> tuple[Statistics | None, dict[str, float | str]]:
    """The statistics to use: isotropic ones where too few tokens were seen, and what the report says then."""
    if fit is None or fit.tokens >= least_tokens(matrix):
        return fit, {}
    drifts = {"drift": fit.drift, "output_drift": fit.output_drift}
    none = {name: torch.zeros_like(drift) for name, drift in drifts.items() if drift is not None}
    used = replace(Statistics.isotropic(matrix.shape[1], fit.gram), **none)
    return used, {"statistics": f"isotropic: only {fit.tokens:.0f} tokens, at least {least_tokens(matrix)} needed"}


def least_tokens(matrix: Matrix) -> int:
    """Fewer tokens than this say too little about a matrix's inputs: one for every sixteen columns."""
    return max(16, matrix.shape[1] // 16)


def refined(
    entry: Entry, rounded: Rounded, aim: Aim, fit: Statistics, judge: Callable[[Rounded], float] | None
) -> tuple[Rounded, str]:
    """The refined result if it is better on the held-out windows, else the one it started from, and which it is.

    Refinement minimises the regularised objective (strength and damping of the target). The result is accepted by the
    unregularised error on held-out tokens.
    """
    assert entry.refinement is not None
    if judge is None:
        return rounded, "refused: there are no held-out windows to measure it on"
    cross = aim.matrix @ fit.gram.to(aim.matrix.dtype)
    own = cross if aim.curvature is None else aim.curvature.mixed(cross)
    near = Quadratic(gram=fit.gram, cross=cross, const=(own * aim.matrix).sum(-1), curvature=aim.curvature)
    better = entry.refinement.refine(rounded, aim.matrix, near, lambda grid: entry.rounding.round(aim, grid, fit))
    if judge(better) < judge(rounded):
        return better, "accepted"
    return rounded, "refused: worse on the held-out windows"


def _energy(values: Tensor) -> float:
    """Sum of squares."""
    flat = values.flatten()
    return float(flat @ flat)


def _losses(weight: Tensor, value: Tensor, known: Statistics | None) -> tuple[float, float, float]:
    """``tr(E H E')`` for ``E = V - W``, ``tr(W H W')``, and what E takes off the drift, ``2 tr((W D + Gamma) E')``."""
    if known is None:
        return 0.0, 0.0, 0.0
    error, energy = h_energies(weight, value, known.gram)
    if not known.has_drift:
        return error, energy, 0.0
    # less it, the error is what `quadratic_of` gives, which takes three products more
    pull = known.drift_of(weight)
    if known.residual is not None:
        pull = pull + known.residual
    return error, energy, 2 * float((pull * (value - weight)).sum())


def _errors(known: Statistics | None, error: float, energy: float, gain: float) -> tuple[float | None, float | None]:
    """``h_error`` and ``objective`` of a record."""
    if known is None:
        return None, None
    return relative(error, energy), relative(error - gain, energy) if known.has_drift else None


def _of_rows(statistics: Statistics | None, rows: slice) -> Statistics | None:
    return statistics and statistics.take_rows(rows)
