"""Decisions before any weight is read: entries, format, sizes, calibration, memory, time."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch

from mezzotint.allocation.knapsack import ALLOCATED
from mezzotint.calibration import TOKENS_PER_COLUMN, TOKENS_TO_REGRESS, auto_samples
from mezzotint.core.contracts import Block, Grid, Matrix
from mezzotint.core.plans import CalibrationPlan, Entry, Format, Plan, StepDown
from mezzotint.errors import ConfigError
from mezzotint.formats.engine_rules import MERGED, MIXED
from mezzotint.grids.uniform import UniformGrid
from mezzotint.models import Source
from mezzotint.planning.conflicts import check_compensation, check_stages
from mezzotint.planning.costs import estimate
from mezzotint.planning.format import Unloadable, chosen_format, stored_bits
from mezzotint.planning.identity import fingerprint_of
from mezzotint.planning.importance import open_importance
from mezzotint.planning.layout import make_layout
from mezzotint.planning.parts import with_possible_parts
from mezzotint.planning.planned import Planned
from mezzotint.recipes.recipe import Recipe, Stages
from mezzotint.recipes.request import Request
from mezzotint.registry import ROUNDINGS, TARGETS, TRANSFORMS

SELF_SEQLEN = 256
TEXT_SEQLEN = 512
SYMMETRIC = "grid.symmetric=true"  # what grids step down to


def make_plan(source: Source, request: Request, *, calibrate: bool = False) -> Planned:
    """Decide everything, or say what cannot be done.

    Args:
        source: the original.
        request: what is asked for.
        calibrate: plan calibration even if no stage needs it.

    Raises:
        ConfigError: a pattern matches nothing, nothing is left to quantize, stages do not fit together.
        FormatError: the format cannot hold what the recipe asks for.
    """
    recipe = request.recipe
    recipe.check_patterns(list(source.map.matrices))
    entries, kept, form, because = _decided(source, request)
    matrices = source.map.matrices
    entries = [
        replace(entry, bits=stored_bits(form, matrices[entry.matrix], entry.grid, entry.basis)) for entry in entries
    ]
    layout = make_layout(source, entries, form)
    calibration, importance = None, None
    if request.calibration.imatrix is not None:
        if calibrate:
            raise ConfigError(
                "this recipe needs calibration text, and --imatrix has only mean squares of inputs. Leave "
                "--imatrix out."
            )
        importance = open_importance(source, entries, request.calibration.imatrix)
    elif calibrate or any(entry.needs for entry in entries):
        calibration = _calibration(source, entries, request)
    precision = _precision(source, request)
    costs = estimate(
        source, entries, calibration=calibration, memory=request.memory, device=request.device, ranks=request.ranks
    )
    plan = Plan(
        entries=tuple(entries),
        kept=kept,
        format=form.name,
        engine=request.engine,
        bytes=layout.nbytes,
        peak_memory_bytes=costs.peak_memory_bytes,
        fingerprint=fingerprint_of(source, request, entries, calibration, importance, precision=precision),
    )
    shapes = {entry.matrix: source.map.matrices[entry.matrix].shape for entry in entries}
    return Planned(
        plan=plan,
        request=request,
        layout=layout,
        form=form,
        calibration=calibration,
        importance=importance,
        costs=costs,
        shapes=shapes,
        because=because,
        precision=precision,
    )


class _Decision(NamedTuple):
    """What is done to each matrix, and the format that holds it."""

    entries: list[Entry]
    kept: Mapping[str, str]
    form: Format
    because: str


def _decided(source: Source, request: Request) -> _Decision:
    """Entries that a format holds, with as little changed of what the recipe says as it takes.

    Where engines do not load what its defaults give, the grids become symmetric; where that does not help either and no
    format was asked for, the result is written dense.
    """
    try:
        return _held(source, request, request.recipe)
    except Unloadable as error:
        refused = error
    if refused.refusal.rule == MIXED and _symmetry_is_free(request.recipe):
        step = StepDown(SYMMETRIC, f"{refused.refusal.limit}, and {refused.refusal.what} are needed")
        return _held(source, request, request.recipe.with_settings({"grid.symmetric": True}), step=step)
    if refused.refusal.rule == MERGED and request.wanted_format is None:
        why = f"{refused.refusal.limit} ({refused.refusal.what}); --for vllm packs"
        return _held(source, request, request.recipe, instead=("dense", why))
    raise refused


def _held(
    source: Source,
    request: Request,
    recipe: Recipe,
    *,
    step: StepDown | None = None,
    instead: tuple[str, str] | None = None,
) -> _Decision:
    entries, kept = _entries(source, recipe)
    if not entries:
        raise ConfigError(
            f"there is nothing to quantize: all {len(kept)} matrices are kept. Remove a --keep pattern or a rule."
        )
    if step is not None:
        entries = [replace(entry, steps_down=(*entry.steps_down, step)) for entry in entries]
    return _Decision(entries, kept, *chosen_format(source, entries, request, instead))


def _symmetry_is_free(recipe: Recipe) -> bool:
    """Whether nobody said if grids have zero points."""
    said = [*recipe.grid, *(name.removeprefix("grid.") for rule in recipe.rules for name in rule.set)]
    return recipe.grid.get("kind") == UniformGrid.kind and "symmetric" not in said


def matrices_in_order(source: Source) -> Iterator[tuple[Block | None, Matrix]]:
    """Every matrix with its block, in running order: the embedding first, the head last."""
    yield None, source.map.matrices[source.map.embedding]
    for block in source.map.blocks:
        for group in block.groups:
            for name in group.matrices:
                yield block, source.map.matrices[name]
    if source.map.head is not None:
        yield None, source.map.matrices[source.map.head]


def _entries(source: Source, recipe: Recipe) -> tuple[list[Entry], dict[str, str]]:
    entries: list[Entry] = []
    kept: dict[str, str] = dict(source.map.unmapped)
    chosen: list[tuple[Block | None, Matrix, Stages, str]] = []
    known: dict[str, Stages] = {}
    for block, matrix in matrices_in_order(source):
        rule = recipe.rule_for(matrix.name)
        changes = {**(rule.set if rule else {}), **_of_matrix(source, recipe, matrix)}
        key = json.dumps(changes, sort_keys=True)
        if key not in known:
            known[key] = recipe.stages(changes)
            check_stages(matrix.name, known[key])
        stages = known[key]
        reason = _kept(source, block, matrix, rule.keep if rule else None, stages)
        if reason is not None:
            kept[matrix.name] = reason
            continue
        if matrix.name == source.map.embedding:
            assert stages.embeddings is not None
            stages = lookup_stages(stages.embeddings)
        because = f"rule {rule.match!r}" if rule and rule.set else f"recipe {recipe.name!r}"
        because = ALLOCATED if matrix.name in recipe.matrices else because
        chosen.append((block, matrix, stages, because))
    widths = {matrix.shape[1] for _, matrix, _, _ in chosen}
    for block, matrix, stages, because in chosen:
        grid = stages.grid.resolve(matrix.shape, source.checkpoint.tensors[matrix.sources[0]].dtype, widths)
        entries.append(
            Entry(
                matrix=matrix.name,
                block=block.index if block else None,
                target=stages.target,
                transform=stages.transform,
                grid=grid,
                rounding=stages.rounding,
                curvature=None if block is None or matrix.expert is not None else stages.curvature,
                steps_down=tuple(_steps_down(block, matrix, stages)),
                refinement=stages.refinement,
                bits=grid.stored_bits(matrix.shape),  # the rest depends on the format
                because=because,
                submodules=None if block is None else stages.submodules,
                compensation=None if block is None else stages.compensation,
            )
        )
        check_compensation(entries[-1], matrix)
    return with_possible_parts(source, entries), kept


def _steps_down(block: Block | None, matrix: Matrix, stages: Stages) -> Iterator[StepDown]:
    """Stages of the recipe that cannot serve a matrix of a block, which gets less."""
    if block is None:
        return
    if stages.curvature is not None and matrix.expert is not None:
        yield StepDown(
            "curvature.kind=none",
            "the gradients in the outputs of an expert cannot be recorded, because an expert is not a module",
        )
    ends = {role.matrix for role in block.roles if role.kind in ("o", "down")}
    group = next(group for group in block.groups if matrix.name in group.matrices)
    if "residual" in stages.target.needs and matrix.name in ends and not group.sees_residual:
        why = (
            "experts get different tokens in the original and the quantized model"
            if group.experts
            else "its output is normalised before the residual add"
        )
        yield StepDown(f"target {stages.target.kind!r} without the residual stream, as 'qep'", why)


def _of_matrix(source: Source, recipe: Recipe, matrix: Matrix) -> Mapping[str, Any]:
    """Settings of one matrix alone; the grid of an embedding is that of the stage of this name."""
    own = recipe.matrices.get(matrix.name, {})
    if matrix.name != source.map.embedding:
        return own
    return {name.replace("grid.", "embeddings.", 1): value for name, value in own.items()}


def lookup_stages(grid: Grid) -> Stages:
    """How the token embedding is quantized on a grid.

    Rows are looked up by their number: there are no inputs to weigh errors by, so they are rounded to nearest. Rotated,
    they lose 30 to 80 % less at the same bits, and a rotation of the columns leaves every row on its own.
    """
    if "gram" in grid.needs:
        grid = replace(cast(Any, grid), range="error")
    return Stages(
        target=TARGETS["weight"](),
        transform=TRANSFORMS["hadamard"](sides="input"),
        grid=grid,
        rounding=ROUNDINGS["nearest"](),
        curvature=None,
        refinement=None,
        embeddings=None,
        allocation=None,
        submodules=None,
        compensation=None,
    )


def _kept(source: Source, block: Block | None, matrix: Matrix, keep: bool | None, stages: Stages) -> str | None:
    if keep:
        return "kept by a rule"
    if matrix.name == source.map.embedding:
        return "token embedding: kept unless embeddings.kind gives it a grid" if stages.embeddings is None else None
    if matrix.tied_to is not None:
        return f"shares storage with {matrix.tied_to}"
    if block is None and keep is None:
        return "output head: kept unless a rule {match: ..., keep: false} asks for it"
    return None


def _calibration(source: Source, entries: list[Entry], request: Request) -> CalibrationPlan:
    asked = request.calibration
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    seqlen = asked.seqlen or min(SELF_SEQLEN if asked.source == "self" else TEXT_SEQLEN, longest or TEXT_SEQLEN)
    if longest is not None and seqlen > longest:
        raise ConfigError(f"--seqlen is {seqlen}, but the model takes at most {longest} positions.")
    widest = max(source.map.matrices[entry.matrix].shape[1] for entry in entries)
    # what is sampled takes longer to make than to calibrate on
    corrected = asked.source != "self" and any("drift" in entry.needs for entry in entries)
    each = TOKENS_TO_REGRESS if corrected else TOKENS_PER_COLUMN
    samples = asked.samples or auto_samples(widest, seqlen, each)
    return CalibrationPlan(source=asked.source, samples=samples, seqlen=seqlen)


def _precision(source: Source, request: Request) -> str:
    """``auto`` is that of the model: products of bfloat16 numbers where its matrices are stored so."""
    if request.precision != "auto":
        return request.precision
    stored = {source.checkpoint.tensors[name].dtype for m in source.map.matrices.values() for name in m.sources}
    return "bfloat16" if stored == {torch.bfloat16} else "float32"
