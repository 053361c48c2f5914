"""Predicted loss and stored bits of each choice of a grid for each matrix."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor

from mezzotint.allocation.knapsack import Knapsack
from mezzotint.allocation.sensitivity import Sensitivity
from mezzotint.budgeting.latency import Latency
from mezzotint.core.contracts import Aim, Grid, Matrix, Rounding
from mezzotint.core.plans import Entry
from mezzotint.core.statistics import Statistics, block_ldl_ratio, padded
from mezzotint.errors import ConfigError
from mezzotint.grids.gguf.grid import GgufGrid
from mezzotint.grids.trellis import TrellisGrid, measured
from mezzotint.models import Source
from mezzotint.planning.format import stored_bits
from mezzotint.planning.planned import Planned
from mezzotint.recipes.request import WHOLE_BITS
from mezzotint.recipes.settings import build
from mezzotint.registry import GRIDS
from mezzotint.rounding.gptq import Gptq
from mezzotint.sweep.job import Job, digest_of
from mezzotint.sweep.solve import Solved, Solver, trusted
from mezzotint.sweep.sweep import Sweep
from mezzotint.sweep.watcher import Watcher
from mezzotint.targets.weight import WeightTarget

_WHOLE = tuple(range(2, 9))
_QUARTERS = tuple(quarter / 4 for quarter in range(4, 25))
_HALVES = tuple(half / 2 for half in range(3, 13))
Label = int | float | str  # of a choice: bits of a code, or a type of GGUF
# What grids can do.
_BITS: Mapping[str, tuple[float | int, ...]] = {
    "uniform": _WHOLE,
    "lookup": _WHOLE,
    "vector": _HALVES,
    "trellis": _QUARTERS,
}
_ROWS = 128  # of a matrix, evenly spaced, that are rounded to see what a grid costs it
# Of a width that does not take 256, the larger types stand for their fallbacks, and two more come between these.
_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_NARROW_TYPES = ("Q2_K", "Q3_K", "IQ4_NL", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


def menus(source: Source, planned: Planned, knapsack: Knapsack) -> dict[str, Mapping[Label, Grid]]:
    """The grids that each matrix may take: what its recipe's grid, the format, the engine and the settings allow.

    A type of GGUF that does not fit a width is its fallback there, as in llama.cpp's own files.

    Raises:
        ConfigError: nothing is left for a matrix.
    """
    plan = planned.plan
    loading = planned.request.loading
    found: dict[str, Mapping[Label, Grid]] = {}
    for entry in plan.entries:
        matrix = source.map.matrices[entry.matrix]
        loads = loading.loads.get(plan.format)
        labels = knapsack.menu or (_usual(entry.grid, matrix) if loads is None else loads.menu)
        grids: dict[Label, Grid] = {}
        refusals = []
        for label in dict.fromkeys(labels):
            grid = labelled(entry.grid, label).resolve(matrix.shape, torch.float32)
            if not knapsack.allows(entry.matrix, grid.bits):
                continue
            tried = replace(entry, grid=grid)
            refusal = planned.form.refuses(tried, matrix) or loading.refuses(
                plan.format, tried, matrix, head=matrix.name == source.map.head
            )
            if refusal is None:
                grids[label] = grid
            else:
                refusals.append(str(refusal))
        if not grids:
            why = refusals[0] if refusals else "allocation.limits or allocation.least leave none"
            raise ConfigError(f"no grid of {list(labels)} is possible for {entry.matrix}: {why}.")
        found[entry.matrix] = dict(sorted(grids.items(), key=lambda item: item[1].stored_bits(matrix.shape).total))
    return found


def labelled(grid: Grid, label: Label) -> Grid:
    """A grid of the same kind and settings with so many bits, or of that type.

    Raises:
        ConfigError: the label does not fit the kind.
    """
    if isinstance(grid, GgufGrid) != isinstance(label, str):
        names = "names of types" if isinstance(grid, GgufGrid) else "bits"
        raise ConfigError(f"allocation.menu has {label!r}; grid {grid.kind!r} is chosen by {names}. Give these.")
    settings = {"kind": grid.kind, **asdict(cast(Any, grid))}
    if isinstance(label, str):
        return build("grid", {**settings, "type": label}, GRIDS)
    return build("grid", {**settings, "bits": int(label) if grid.kind in WHOLE_BITS else float(label)}, GRIDS)


def setting_of(label: Label) -> dict[str, Label]:
    """The setting that makes a choice, as recipes have it."""
    return {"grid.type": label} if isinstance(label, str) else {"grid.bits": label}


def _usual(grid: Grid, matrix: Matrix) -> Sequence[Label]:
    if isinstance(grid, GgufGrid):
        return _TYPES if matrix.shape[1] % 256 == 0 else _NARROW_TYPES
    return _BITS[grid.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a matrix costs with one grid.

    Attributes:
        label: of the choice.
        loss: predicted, nats of KL per token.
        bits: stored.
        seconds: of one token; zero where time is no matter.
    """

    label: Label
    grid: Grid
    loss: float
    bits: int
    seconds: float


class _Pricer(Solver):
    """In the place of a solver: looks at a matrix and its statistics, and changes nothing.

    Args:
        entries: of the plan; only grids differ from what will be done.
        choices: of each matrix.
        sensitivities: by matrix.
        done: told of every matrix.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        choices: Mapping[str, Mapping[Label, Grid]],
        sensitivities: Mapping[str, Sensitivity],
        *,
        seed: int,
        done: Callable[[], None],
    ) -> None:
        super().__init__(entries, sink=lambda *_: None, notify=lambda _: None, seed=seed)
        self._choices = choices
        self._sensitivities = sensitivities
        self._done = done
        self.losses: dict[str, Tensor] = {}

    def solve(
        self,
        weights: Sequence[tuple[Matrix, Tensor]],
        fit: Statistics | None,
        held_out: Statistics | None,
        *,
        place: int,
    ) -> Iterator[Solved]:
        """Price matrices with the same statistics; gives nothing, so that their weights stay what they are."""
        used, _ = trusted(weights[0][0], fit)
        turned = self._turned(list(weights), used, held_out, place)
        for matrix, weight in weights:
            entry = self.entries[matrix.name]
            statistics, turned_weight, sensitivity = used, weight, self._sensitivities[matrix.name]
            if matrix.name in turned:
                basis, statistics = turned[matrix.name].basis, turned[matrix.name].statistics
                assert basis is not None
                turned_weight = basis.weight(weight)
                # of its scale; errors are spread over all rows alike, and over columns as their inputs are
                sensitivity = Sensitivity.even(sensitivity.fisher, turned_weight)
            if entry.grid.pads:
                turned_weight, statistics = padded(turned_weight, statistics, entry.grid.multiple)
            rounding = _on_equal_inputs(entry.rounding)
            losses = [
                predicted(rounding, grid, turned_weight, statistics, sensitivity)
                for grid in self._choices[matrix.name].values()
            ]
            self.losses[matrix.name] = torch.tensor(losses, dtype=torch.float64)
            self._done()
        return iter(())


def predicted(
    rounding: Rounding, grid: Grid, weight: Tensor, statistics: Statistics | None, sensitivity: Sensitivity
) -> float:
    """Nats per token that rounding to a grid costs.

    Some rows are rounded, and stand for all. Only a trellis needs no trial: weights that a transform has made as good
    as normal lose what is known of its codes, less what feedback makes up for.

    Args:
        rounding: on equal inputs.
        grid: to fit and to round to.
        weight: in the basis of the grid.
        statistics: of the inputs there; None if nothing is known.
        sensitivity: of the matrix.
    """
    known = statistics if statistics is not None and "gram" in rounding.needs | grid.needs else None
    if isinstance(grid, TrellisGrid):
        ratio = 1.0
        if known is not None:
            feedback = _feedback(rounding)
            ratio = block_ldl_ratio(known, grid.tile[1], feedback.damping, order=feedback.order)
        return sensitivity.fisher * measured(grid.states)[grid.rate].distortion * ratio
    rows = slice(None, None, max(1, weight.shape[0] // _ROWS))
    part = weight[rows].float()
    fitted = grid.fit(part, None if known is None else known.importance)
    error = rounding.round(Aim(matrix=part), fitted, known).value - part
    return sensitivity.of_rows(rows).loss(error, None if known is None else known.gram)


def _on_equal_inputs(rounding: Rounding) -> Rounding:
    """What roundings that see the drift of the inputs do where there is none."""
    return rounding if rounding.needs <= {"gram"} else _feedback(rounding)


def _feedback(rounding: Rounding) -> Gptq:
    """GPTQ with the damping and the order of another rounding, as far as it has them."""
    usual = Gptq()
    return Gptq(
        damping=getattr(rounding, "damping", usual.damping),
        order=getattr(rounding, "order", usual.order),
    )


def price(
    job: Job,
    sensitivities: Mapping[str, Sensitivity],
    choices: Mapping[str, Mapping[Label, Grid]],
    *,
    latency: Latency | None,
    progress: Callable[[int, int], None],
) -> Mapping[str, tuple[Price, ...]]:
    """Loss and bits of every choice of every matrix; losses from one pass of the original, or the user's cache.

    Args:
        job: planned with any grids; everything else is as it will be.
        sensitivities: of all matrices of the plan.
        choices: `menus`.
        latency: measures the time of every choice; None where time is no matter.
        progress: told of matrices done.
    """
    source, planned = job.source, job.planned
    # weights stay what they are, so both streams are the same and no drift is needed
    entries = [
        replace(
            entry,
            target=WeightTarget(),
            transform=entry.basis,
            curvature=None,
            refinement=None,
            submodules=None,
            compensation=None,
        )
        for entry in planned.plan.entries
    ]
    windows = job.windows()
    known = digest_of({f"{name}.rows": one.rows for name, one in sensitivities.items()})
    depends_on = {
        **job.determined(windows),
        "entries": [repr(replace(entry, steps_down=())) for entry in entries],
        "choices": {name: [repr(grid) for grid in grids.values()] for name, grids in choices.items()},
        "sensitivities": known,
    }
    losses = job.cache.tensors("losses", depends_on, lambda: _losses(job, entries, sensitivities, choices, progress))

    def priced(entry: Entry) -> tuple[Price, ...]:
        matrix = source.map.matrices[entry.matrix]
        timed = None if latency is None or source.map.looked_up(entry.matrix) else latency
        return tuple(
            Price(
                label=label,
                grid=grid,
                loss=float(loss),
                bits=stored_bits(planned.form, matrix, grid, entry.basis).total,
                seconds=0.0 if timed is None else timed.seconds(matrix.shape, grid, entry.basis),
            )
            for (label, grid), loss in zip(choices[entry.matrix].items(), losses[entry.matrix], strict=True)
        )

    return {entry.matrix: priced(entry) for entry in entries}


def _losses(
    job: Job,
    entries: Sequence[Entry],
    sensitivities: Mapping[str, Sensitivity],
    choices: Mapping[str, Mapping[Label, Grid]],
    progress: Callable[[int, int], None],
) -> Mapping[str, Tensor]:
    """What every choice of every matrix loses, ``[choices]`` each."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, len(entries))

    pricer = _Pricer(
        {entry.matrix: entry for entry in entries}, choices, sensitivities, seed=job.request.seed, done=step
    )
    with TemporaryDirectory(prefix="mezzotint-") as scratch:
        streams = job.streams(job.windows(), Path(scratch), entries=())
        try:
            Sweep(job, streams, pricer, Watcher()).run()
        finally:
            streams.close()
    return pricer.losses
