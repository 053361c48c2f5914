"""From a budget to one grid for every matrix: sensitivities, prices, the knapsack, and the guard that measures it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from mezzotint.allocation import Choice, Item, allocate, frontier
from mezzotint.allocation.knapsack import Knapsack
from mezzotint.allocation.sensitivity import Sensitivity
from mezzotint.budgeting.footprint import other_bytes, serving_bytes
from mezzotint.budgeting.latency import Latency
from mezzotint.budgeting.noise import noise_insertion
from mezzotint.budgeting.pricing import Label, Price, menus, price, setting_of
from mezzotint.budgeting.sensitivity import measure_sensitivity
from mezzotint.calibration import Windows
from mezzotint.core.contracts import Grid
from mezzotint.core.precision import products_in
from mezzotint.errors import ConfigError
from mezzotint.formats.native import Scheme
from mezzotint.models import Source
from mezzotint.planning.plan import SYMMETRIC, make_plan
from mezzotint.planning.planned import Planned
from mezzotint.recipes.request import Request
from mezzotint.sweep.job import Job

Told = Callable[[str, int, int], None]  # stage, steps done, of so many

_NOISE_ENERGY = 0.001
_POINTS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A place on the frontier.

    Attributes:
        kind: ``allocated`` or ``uniform``.
        bits_per_weight: stored, of the quantized matrices.
        bytes: of the folder.
        predicted_kl_nats: per token.
        code_bits: of every code, if they are the same.
        type: of GGUF that every matrix has, or its fallback.
        tokens_per_second: predicted, if time matters.
    """

    kind: str
    bits_per_weight: float
    bytes: int
    predicted_kl_nats: float
    code_bits: float | int | None = None
    type: str | None = None
    tokens_per_second: float | None = None

    @property
    def label(self) -> Label:
        """Of the choice that all matrices have, where they have one."""
        return self.type or self.code_bits or 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocated:
    """An allocation with what it was decided on.

    Attributes:
        request: the same with one grid for each matrix.
        uniform: the same with the best single grid within the budget; None if even the smallest is too large.
        chosen: the point that was chosen.
        alike: the point of ``uniform``.
        points: of the frontier, both kinds.
        sensitivities: by matrix.
        gap: share of the predicted loss that a better allocation could save at most.
    """

    request: Request
    uniform: Request | None
    chosen: Point
    alike: Point | None
    points: tuple[Point, ...]
    sensitivities: Mapping[str, Sensitivity]
    gap: float
    knapsack: Knapsack

    def as_json(self) -> dict[str, Any]:
        """For the report and the command line."""

        def shown(point: Point) -> dict[str, Any]:
            return {name: getattr(point, name) for name in Point.__slots__ if getattr(point, name) is not None}

        return {
            "budget": {name: getattr(self.knapsack, name) for name in self.knapsack.budgets},
            "chosen": shown(self.chosen),
            "uniform": None if self.alike is None else shown(self.alike),
            "gap": self.gap,
            "frontier": [shown(point) for point in self.points],
            "sensitivities": {
                name: {"fisher": s.fisher, "relative_error": s.relative_error} for name, s in self.sensitivities.items()
            },
        }


def allocated(job: Job, tell: Told = lambda *_: None) -> Allocated:
    """Decide which grid each matrix gets.

    What is measured of the model lies in the user's cache afterwards: another budget takes seconds.

    Args:
        job: its recipe has an allocation with a budget.
        tell: told of progress.

    Raises:
        ConfigError: there is no budget, or one that nothing fits: the message says what would.
        MezzotintError: the request cannot be planned.
    """
    source, request = job.source, job.request
    knapsack = request.recipe.stages().allocation
    assert knapsack is not None
    if not knapsack.budgets:
        raise ConfigError(
            "this recipe allocates bits, but there is no budget. Give --bits (average stored bits per "
            "weight), --size or "
            "--tokens-per-second."
        )
    if knapsack.fits is not None:
        beside = serving_bytes(source, knapsack.context)
        if beside >= knapsack.fits:
            raise ConfigError(
                f"--fits is {knapsack.fits:,} bytes, and a sequence of {knapsack.context} tokens takes {beside:,} "
                "beside the weights. Raise it, or lower --context."
            )
        knapsack = replace(knapsack, fits=None, size=knapsack.fits - beside)
    if request.wanted_format is None:
        request = replace(request, engine="mezzotint")
    job = job.of(_assigned(request, {}), calibrate=True)
    planned = job.planned
    if knapsack.size is not None and planned.plan.format == "dense":
        raise ConfigError(
            "--size has no effect with --for dense: a dense folder has the same size with any bits. Use --bits."
        )
    if knapsack.tokens_per_second is not None and planned.plan.format != "mezzotint":
        raise ConfigError(
            f"--tokens-per-second is measured with our own kernels; how fast --for {request.engine} runs is not known "
            "here. Use --for mezzotint, or --size."
        )
    choices = menus(source, planned, knapsack)
    classes = _classes(source, planned)
    if _becomes_symmetric(source, request, classes, choices):
        request = replace(request, recipe=request.recipe.with_settings({"grid.symmetric": True}))
        job = job.of(_assigned(request, {}), calibrate=True)
        planned = job.planned
        choices = menus(source, planned, knapsack)
    sensitivities = _sensitivities(job, knapsack, tell)
    latency = None if knapsack.tokens_per_second is None else Latency(planned.weights)
    prices = price(job, sensitivities, choices, latency=latency, progress=partial(tell, "pricing"))
    constant = 0.0 if latency is None else _constant(latency, source, planned, prices)
    items = [_item(name, [prices[member] for member in members]) for name, members in classes.items()]
    return _solved(source, planned, knapsack, items, classes, sensitivities=sensitivities, constant=constant)


def _constant(latency: Latency, source: Source, planned: Planned, prices: Mapping[str, Sequence[Price]]) -> float:
    """Seconds of a token beside its matrices, measured with the grid in the middle of each menu."""
    schemes = {
        entry.matrix: Scheme(
            shape=source.map.matrices[entry.matrix].shape,
            grid=prices[entry.matrix][len(prices[entry.matrix]) // 2].grid,
            transform=entry.basis,
        )
        for entry in planned.plan.entries
        if not source.map.looked_up(entry.matrix)
    }
    constant = latency.constant(source, schemes)
    latency.save()
    return constant


def _solved(
    source: Source,
    planned: Planned,
    knapsack: Knapsack,
    items: Sequence[Item],
    classes: Mapping[str, Sequence[str]],
    *,
    sensitivities: Mapping[str, Sensitivity],
    constant: float,
) -> Allocated:
    """The allocation, and what there is beside it."""
    request = planned.request
    rest = other_bytes(source, planned)

    def point(kind: str, choices: Sequence[Choice], label: Label | None = None) -> Point:
        bits = sum(choice.bits for choice in choices)
        seconds = constant + sum(choice.seconds for choice in choices)
        return Point(
            kind=kind,
            bits_per_weight=bits / planned.weights,
            bytes=rest + -(-bits // 8),
            predicted_kl_nats=sum(choice.loss for choice in choices),
            code_bits=None if isinstance(label, str) else label,
            type=label if isinstance(label, str) else None,
            tokens_per_second=1 / seconds if constant else None,
        )

    budget = None
    if knapsack.bits is not None:
        budget = int(knapsack.bits * planned.weights)
    elif knapsack.size is not None:
        budget = 8 * (knapsack.size - rest)
    deadline = None if knapsack.tokens_per_second is None else 1 / knapsack.tokens_per_second
    _check_budget(items, budget, knapsack, rest, planned.weights)
    _check_speed(items, deadline, constant)
    found = allocate(items, bits=budget, seconds=deadline, time_constant=constant)
    uniform = {label: point("uniform", choices, label) for label, choices in _uniform(items).items()}
    best = min(
        (one for one in uniform.values() if _within(one, knapsack)), key=lambda p: p.predicted_kl_nats, default=None
    )
    names = [name for members in classes.values() for name in members]
    chosen = {member: found.labels[name] for name, members in classes.items() for member in members}
    return Allocated(
        request=_assigned(request, chosen),
        uniform=None if best is None else _assigned(request, dict.fromkeys(names, best.label)),
        chosen=point("allocated", list(found.choices.values())),
        alike=best,
        points=(
            *(point("allocated", list(one.choices.values())) for one in frontier(items, points=_POINTS)),
            *uniform.values(),
        ),
        sensitivities={name: sensitivities[name] for name in names},
        gap=found.gap,
        knapsack=knapsack,
    )


def _within(point: Point, knapsack: Knapsack) -> bool:
    return (
        (knapsack.bits is None or point.bits_per_weight <= knapsack.bits)
        and (knapsack.size is None or point.bytes <= knapsack.size)
        and (knapsack.tokens_per_second is None or (point.tokens_per_second or 0) >= knapsack.tokens_per_second)
    )


def _assigned(request: Request, labels: Mapping[str, Any]) -> Request:
    """The request with the choice for each matrix written into its recipe, and no allocation."""
    matrices = {name: {**request.recipe.matrices.get(name, {}), **setting_of(label)} for name, label in labels.items()}
    changes = {"allocation": {"kind": "none"}, "matrices": {**request.recipe.matrices, **matrices}}
    return replace(request, recipe=request.recipe.model_copy(update=changes))


def _classes(source: Source, planned: Planned) -> dict[str, list[str]]:
    """Matrices that must have one scheme, under a name: what engines fuse, where the format is for such engines."""
    loads = planned.request.loading.loads.get(planned.plan.format)
    fused = loads is not None and loads.fused
    classes: dict[str, list[str]] = {}
    for entry in planned.plan.entries:
        fusion = source.map.matrices[entry.matrix].fusion if fused else entry.matrix
        classes.setdefault(fusion, []).append(entry.matrix)
    return classes


def _item(name: str, members: Sequence[Sequence[Price]]) -> Item:
    """The choices that all members have, losses and bits added up."""
    tables = [{one.label: one for one in prices} for prices in members]
    common = [label for label in tables[0] if all(label in other for other in tables)]
    if not common:
        raise ConfigError(f"the matrices of {name} must have one grid, and no bits are possible for all of them.")
    choices = [
        Choice(
            label=label,
            loss=sum(table[label].loss for table in tables),
            bits=sum(table[label].bits for table in tables),
            seconds=sum(table[label].seconds for table in tables),
        )
        for label in common
    ]
    return Item(name=name, choices=tuple(choices))


def _uniform(items: Sequence[Item]) -> dict[Label, list[Choice]]:
    """The same choice everywhere, where every item can have it."""
    tables = [{choice.label: choice for choice in item.choices} for item in items]
    common = [label for label in tables[0] if all(label in table for table in tables)]
    return {cast(Label, label): [table[label] for table in tables] for label in common}


def _check_speed(items: Sequence[Item], deadline: float | None, constant: float) -> None:
    """Say what is possible, in the user's own unit."""
    if deadline is None:
        return
    fastest = constant + sum(min(choice.seconds for choice in item.choices) for item in items)
    if deadline < fastest:
        raise ConfigError(
            f"--tokens-per-second is {1 / deadline:g}; with this menu this machine reaches {1 / fastest:.1f}, and "
            f"{1 / constant:.1f} if the matrices took no time. Ask for less, or allow fewer bits (--set "
            "allocation.least, allocation.menu)."
        )


def _check_budget(items: Sequence[Item], budget: int | None, knapsack: Knapsack, rest: int, weights: int) -> None:
    """Say what is possible, in the user's own unit."""
    if budget is None:
        return
    least, most = (sum(end(c.bits for c in item.choices) for item in items) for end in (min, max))
    if budget >= least:
        return
    if knapsack.size is not None:
        raise ConfigError(
            f"--size is {knapsack.size:,} bytes; with this menu the folder takes {rest + least // 8:,} to "
            f"{rest + most // 8:,} bytes, of which {rest:,} bytes are not quantized. Raise the size, or "
            "allow fewer bits "
            "(--set allocation.least, allocation.menu)."
        )
    raise ConfigError(
        f"--bits is {knapsack.bits:g}; with this menu {least / weights:.3f} to {most / weights:.3f} bits are stored "
        "for a weight, side data included. Raise the bits, or allow fewer (--set allocation.least, allocation.menu)."
    )


def _becomes_symmetric(
    source: Source, request: Request, classes: Mapping[str, Sequence[str]], choices: Mapping[str, Mapping[Label, Grid]]
) -> bool:
    """Whether planning takes the zero points away where bits differ, so that symmetric grids are to be priced.

    It plans the most uneven mixture, so a format that cannot hold different bits is refused before any work.
    """
    ends: dict[str, Any] = {}
    for place, members in enumerate(classes.values()):
        for name in members:
            ends[name] = list(choices[name])[0 if place % 2 else -1]
    mixture = make_plan(source, _assigned(request, ends))
    return any(step.what == SYMMETRIC for entry in mixture.plan.entries for step in entry.steps_down)


def _sensitivities(job: Job, knapsack: Knapsack, tell: Told) -> Mapping[str, Sensitivity]:
    """Measured, or as the user's cache has them."""
    fit, _ = job.windows(partial(tell, "sampling")).split(seed=job.request.seed)
    windows = fit.take(torch.arange(min(knapsack.windows, len(fit))))
    names = [entry.matrix for entry in job.planned.plan.entries]
    depends_on = {
        **job.determined(windows),
        "kind": knapsack.sensitivity,
        "matrices": names if knapsack.sensitivity == "noise" else None,
    }

    def measure() -> dict[str, Tensor]:
        return {
            f"{name}.{part}": value
            for name, one in _measured(job, knapsack, windows, names, tell).items()
            for part, value in one.tensors().items()
        }

    kept = job.cache.tensors("sensitivities", depends_on, measure)
    by_matrix: dict[str, dict[str, Tensor]] = {}
    for key, value in kept.items():
        name, _, part = key.rpartition(".")
        by_matrix.setdefault(name, {})[part] = value
    return {name: Sensitivity.of_tensors(parts) for name, parts in by_matrix.items()}


def _measured(
    job: Job, knapsack: Knapsack, windows: Windows, names: Sequence[str], tell: Told
) -> Mapping[str, Sensitivity]:
    source, request = job.source, job.request
    with products_in(job.planned.precision):
        if knapsack.sensitivity == "noise":
            found = noise_insertion(
                source,
                windows,
                names,
                energy=_NOISE_ENERGY,
                seed=request.seed,
                device=request.device,
                memory=request.memory,
                progress=partial(tell, "sensitivity"),
            )
            matrices = source.map.matrices
            return {
                name: Sensitivity.even(loss, matrices[name].view(source.checkpoint.parameter(matrices[name].parameter)))
                for name, loss in found.items()
            }
        return measure_sensitivity(
            source,
            windows,
            seed=request.seed,
            device=request.device,
            memory=request.memory,
            diagonal=knapsack.sensitivity == "diagonal",
            progress=partial(tell, "sensitivity"),
        )
