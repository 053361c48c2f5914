"""Everything that is decided before a weight is read: entries, format, sizes, calibration, memory, time."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, cast

import torch

from mezzotint.allocation.knapsack import ALLOCATED
from mezzotint.calibration import TOKENS_PER_COLUMN, TOKENS_TO_REGRESS, auto_samples
from mezzotint.core.contracts import Bits, Block, Grid, Matrix, Transform
from mezzotint.core.files import Entry, Format, Plan
from mezzotint.errors import ConfigError, FormatError
from mezzotint.formats.dense import Dense
from mezzotint.formats.gguf import Gguf
from mezzotint.formats.native import Native
from mezzotint.grids.uniform import UniformGrid
from mezzotint.models import Source
from mezzotint.pipeline.adapter import check_compensation
from mezzotint.pipeline.costs import START_SECONDS, CalibrationPlan, Costs, estimate, flops_per_second
from mezzotint.pipeline.importance import Importance, open_importance
from mezzotint.pipeline.layout import Layout, make_layout, users_of_sources, written_alone
from mezzotint.pipeline.parts import check_parts
from mezzotint.pipeline.recipe import Recipe, Stages
from mezzotint.pipeline.refusals import check_stages
from mezzotint.pipeline.request import Request
from mezzotint.registry import FORMATS, ROUNDINGS, TARGETS, TRANSFORMS

SELF_SEQLEN = 256
TEXT_SEQLEN = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan with what it was made for.

    Attributes:
        calibration: None if nothing needs it, or there is an importance matrix.
        importance: what stands in its place.
        costs: predicted memory and time.
        shapes: of the quantized matrices.
        because: why this format.
        precision: of matrix products in blocks and statistics.
    """

    plan: Plan
    request: Request
    layout: Layout
    form: Format
    calibration: CalibrationPlan | None
    importance: Importance | None
    costs: Costs

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(weights for _, weights in self._sizes)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized matrices, scales and zero points included."""
        return sum(e.bits.total for e in self.plan.entries) / max(self.weights, 1)

    @property
    def bits_per_weight_without_side_data(self) -> float:
        """Of the quantized matrices, codes only."""
        return sum(e.bits.code for e in self.plan.entries) / max(self.weights, 1)

    shapes: Mapping[str, tuple[int, int]]
    because: str
    precision: str

    def seconds(self) -> float:
        """Predicted time of the run, from the speed of a matrix product measured now."""
        return START_SECONDS + self.costs.flops / flops_per_second(self.request.device, self.precision)

    @property
    def _sizes(self) -> list[tuple[str, int]]:
        return [(e.matrix, self.shapes[e.matrix][0] * self.shapes[e.matrix][1]) for e in self.plan.entries]


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
    entries, kept = _entries(source, recipe)
    if not entries:
        raise ConfigError(f"nothing to quantize: all {len(kept)} matrices are kept. Remove a --keep pattern or a rule.")
    form, because = _format(source, entries, request)
    matrices = source.map.matrices
    entries = [
        replace(entry, bits=stored_bits(form, matrices[entry.matrix], entry.grid, entry.basis)) for entry in entries
    ]
    layout = make_layout(source, entries, form)
    calibration, importance = None, None
    if request.calibration.imatrix is not None:
        if calibrate:
            raise ConfigError("this needs calibration text, and --imatrix gives mean squares of inputs. Leave it out.")
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
        fingerprint=_fingerprint(source, request, entries, calibration, importance, precision=precision),
    )
    refusals = (*form.refuses_plan(plan, source.map), *request.loading.refuses_plan(plan, source.map))
    if refusals:
        raise FormatError(f"format {form.name!r} ({because}) cannot hold this plan: {refusals[0]}")
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
                refinement=stages.refinement,
                bits=grid.stored_bits(matrix.shape),  # the rest depends on the format
                because=because,
                submodules=None if block is None else stages.submodules,
                compensation=None if block is None else stages.compensation,
            )
        )
        check_compensation(entries[-1], matrix)
    check_parts(source, entries)
    return entries, kept


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


def stored_bits(form: Format, matrix: Matrix, grid: Grid, transform: Transform | None) -> Bits:
    """Exact bits of a matrix in a file of that format; what is written dense counts as in our own.

    Args:
        form: of the output.
        matrix: whose shape and name count.
        grid: without any ``auto``.
        transform: whose basis is stored beside, or None.
    """
    if isinstance(form, Gguf):  # nothing beside the blocks comes into the file
        return grid.stored_bits(matrix.shape)
    packed = Native() if isinstance(form, Dense) else form
    total = 8 * sum(spec.nbytes for spec in packed.specs(matrix, grid, torch.float32, transform))
    code = grid.stored_bits(matrix.shape).code
    return Bits(code=code, side=total - code)


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


def _format(source: Source, entries: list[Entry], request: Request) -> tuple[Format, str]:
    """The format, and why; refuses what it cannot hold."""
    users = users_of_sources(source)
    name, because = _wanted_format(entries, request)
    matrices = [source.map.matrices[entry.matrix] for entry in entries]
    holds = "nn.Linear and nn.Embedding" if name == Native.name else "nn.Linear"
    kinds = [m.linear or (m.lookup and name == Native.name) for m in matrices]
    odd = next((m for m, held in zip(matrices, kinds, strict=True) if not (held and written_alone(m, users))), None)
    if odd is not None and name != "dense":
        if request.wanted_format is not None:
            raise FormatError(
                f"{because} writes {name}, which holds weights of {holds} only, and {odd.name} is another kind of "
                "module. Use --for dense, keep it, or leave --for out."
            )
        name, because = "dense", f"{odd.name} is not the weight of {holds} alone, and packed formats hold nothing else"
    form: Format = FORMATS[name]()
    form.check_source(source.folder, source.config.to_dict(), list(source.checkpoint.tensors))
    for entry, matrix in zip(entries, matrices, strict=True):
        refusal = form.refuses(entry, matrix) or request.loading.refuses(
            name, entry, matrix, head=matrix.name == source.map.head
        )
        if refusal is not None:
            raise FormatError(f"format {name!r} ({because}) cannot hold {matrix.name}: {refusal}")
    return form, because


def _wanted_format(entries: list[Entry], request: Request) -> tuple[str, str]:
    wanted = request.wanted_format
    if wanted is not None:
        return wanted, f"--format {wanted}" if request.engine is None else f"--for {request.engine}"
    own = next((e for e in entries if not _usual(e.grid) or e.basis is not None), None)
    if own is None:
        return "compressed-tensors", "what most engines load"
    if own.basis is None and all(e.grid.kind == "gguf" for e in entries):
        return "gguf", "all grids are GGUF block types"
    kind = f"{own.grid.kind!r}" if own.basis is not None or own.grid.kind != "uniform" else "'uniform' of one scale"
    basis = "" if own.basis is None else f" in the basis {own.basis.kind!r}"
    return "mezzotint", f"{own.matrix} has the grid {kind}{basis}, which only mezzotint's own format holds"


def _usual(grid: Grid) -> bool:
    """Whether most engines have kernels for it."""
    return isinstance(grid, UniformGrid) and grid.scale_per != "matrix"


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


def _stages_of(entry: Entry) -> tuple[object, ...]:
    first = (entry.target, entry.transform, entry.grid, entry.rounding, entry.curvature, entry.refinement)
    return (*first, entry.submodules, entry.compensation)


def _fingerprint(
    source: Source,
    request: Request,
    entries: list[Entry],
    calibration: CalibrationPlan | None,
    importance: Importance | None,
    *,
    precision: str,
) -> str:
    """Changes when anything that determines the result changes."""
    told = {
        "version": version("mezzotint"),
        "torch": torch.__version__,
        "config": {name: value for name, value in source.config.to_dict().items() if name != "_name_or_path"},
        "tensors": {n: [str(t.dtype), list(t.shape)] for n, t in source.checkpoint.tensors.items()},
        "entries": [[e.matrix, *(repr(s) for s in _stages_of(e))] for e in entries],
        "calibration": calibration and {**asdict(request.calibration), **asdict(calibration)},
        "importance": importance and importance.checksum,
        "seed": calibration and request.seed,
        "precision": calibration and precision,
        "engine": request.engine,
        "format": request.format,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
