"""What engines load: the tables of engines.toml, and the rules that follow from them."""

import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

from mezzotint.core.contracts import Matrix, ModelMap
from mezzotint.core.plans import Entry, Plan, Refusal
from mezzotint.formats.schemes import Scheme, listed, refuses_bits, schemes_of
from mezzotint.grids.uniform import UniformGrid

ANY = "any"


MERGED = "merged-weights"
MIXED = "mixed-asymmetric"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """What an engine loads of a format of uniform integers; engines.toml says what the fields are."""

    bits: tuple[int, ...]
    menu: tuple[int, ...]
    zero_points: Literal["yes", "alone", "no"]
    group_sizes: tuple[int, ...] | None = None
    group_multiple: int = 1
    channel: bool = True
    multiple: tuple[int, int] = (1, 1)
    fused: bool = True
    mixed: bool = True
    head: bool = True
    experts: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine in the version that was looked at.

    Attributes:
        formats: that it loads; the first is written where none is asked for.
        loads: by format; a format that is missing holds nothing that the engine does not load.
        defaults: by format, settings of named recipes where none were given.
    """

    name: str
    version: str
    evidence: Literal["run", "source"]
    formats: tuple[str, ...]
    loads: Mapping[str, Loads] = field(default_factory=dict)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def refuses(self, form: str, entry: Entry, matrix: Matrix, *, head: bool) -> Refusal | None:
        """The first rule of the engine that an entry breaks, or None.

        Rules: ``engine-head``, ``engine-bits``, ``engine-zero-points``, ``engine-group-size``, ``engine-width``.

        Args:
            form: name of the format.
            entry: that the format holds.
            matrix: that it is about.
            head: it is the output head.
        """
        loads, grid = self.loads.get(form), entry.grid
        if loads is None or not isinstance(grid, UniformGrid):
            return None
        where = f"{self.version} reads"
        if head and not loads.head:
            return Refusal(
                rule="engine-head",
                what=matrix.name,
                value="the output head",
                limit=f"{where} it dense only",
                remedy="Keep it.",
            )
        refusal = refuses_bits(grid, matrix, loads.bits, rule="engine-bits", who=where)
        if refusal is not None:
            return refusal
        if not grid.symmetric and loads.zero_points == "no":
            return Refusal(
                rule="engine-zero-points",
                what=f"grid.symmetric of {matrix.name}",
                value="false",
                limit=f"{where} no zero points from {form}",
                remedy="Use --set grid.symmetric=true.",
                nearest=replace(grid, symmetric=True),
            )
        return _refuses_group(loads, grid, matrix, where) or _refuses_width(loads, matrix, where)

    def refuses_plan(self, plan: Plan, model: ModelMap) -> tuple[Refusal, ...]:
        """Rules about several matrices at once.

        ``fused-scheme``, one per class, ``mixed-schemes``, ``mixed-asymmetric``, ``dense-experts``, ``merged-weights``.
        """
        loads = self.loads.get(plan.format)
        if loads is None:
            return ()
        schemes = schemes_of(plan, model)
        refusals = []
        if loads.fused:
            classes: dict[str, list[Matrix]] = defaultdict(list)
            for matrix in model.matrices.values():
                classes[matrix.fusion].append(matrix)
            refusals += [_refuses_class(fusion, members, schemes) for fusion, members in classes.items()]
        refusals.append(self._refuses_mixture(loads, list(dict.fromkeys(schemes.values()))))
        if not loads.experts:
            refusals.append(_refuses_merged(model, schemes))
        return tuple(refusal for refusal in refusals if refusal is not None)

    def _refuses_mixture(self, loads: Loads, distinct: Sequence[Scheme]) -> Refusal | None:
        if len(distinct) <= 1:
            return None
        what, value = f"{len(distinct)} schemes", "; ".join(map(str, distinct))
        if not loads.mixed:
            return Refusal(
                rule="mixed-schemes",
                what=what,
                value=value,
                limit=f"{self.version} reads one scheme for all matrices",
                remedy="Use one scheme for all matrices; which group size fits all, --set grid.group_size says.",
            )
        if loads.zero_points == "alone" and not all(scheme.symmetric for scheme in distinct):
            return Refusal(
                rule=MIXED,
                what=what,
                value=value,
                limit="transformers loads zero points only where one scheme serves all matrices",
                remedy="Use --set grid.symmetric=true, one scheme for all matrices, --for dense, or --for vllm.",
            )
        return None


def _refuses_group(loads: Loads, grid: UniformGrid, matrix: Matrix, where: str) -> Refusal | None:
    size, width = grid.group_size, matrix.shape[1]
    assert size != "auto", f"{matrix.name}: grid.group_size is not decided"
    if size is None or size == width:
        good = loads.channel
    else:
        good = (loads.group_sizes is None or size in loads.group_sizes) and size % loads.group_multiple == 0
    if good:
        return None
    allowed = loads.group_sizes or tuple(g for g in (32, 64, 128) if g % loads.group_multiple == 0)
    fitting = [g for g in allowed if width % g == 0]
    aim = width if size is None else size
    best = min(fitting, key=lambda g: abs(g - aim), default=None)
    channel = " or one scale a row" if loads.channel else ""
    return Refusal(
        rule="engine-group-size",
        what=f"grid.group_size of {matrix.name}",
        value="null" if size is None else str(size),
        limit=f"{where} groups of {listed(allowed)}{channel}",
        remedy=f"The nearest that divides {width} is --set grid.group_size={'null' if best is None else best}.",
        nearest=replace(grid, group_size=best),
    )


def _refuses_width(loads: Loads, matrix: Matrix, where: str) -> Refusal | None:
    if all(size % multiple == 0 for size, multiple in zip(matrix.shape, loads.multiple, strict=True)):
        return None
    rows, columns = loads.multiple
    return Refusal(
        rule="engine-width",
        what=f"shape of {matrix.name}",
        value=f"{matrix.shape[0]} x {matrix.shape[1]}",
        limit=f"{where} multiples of {rows} rows and {columns} columns",
        remedy="Keep it, with all that is fused with it, or use --for dense.",
    )


def _refuses_class(fusion: str, members: list[Matrix], schemes: Mapping[str, Scheme]) -> Refusal | None:
    """Engines that fuse q, k and v (gate and up) read one scheme for the class, and fail on any other."""
    found = {member.name: schemes.get(member.name) for member in members}
    if len(set(found.values())) == 1:
        return None
    value = "; ".join(f"{name}: {'kept' if scheme is None else scheme}" for name, scheme in found.items())
    return Refusal(
        rule="fused-scheme",
        what=f"fused class {fusion}",
        value=value,
        limit="engines store these as one matrix with one scheme",
        remedy="Let one rule match all of them, or use --for dense.",
    )


def _refuses_merged(model: ModelMap, schemes: Mapping[str, Scheme]) -> Refusal | None:
    """Dense weights that transformers merges while it loads: in a packed folder it takes all of them for packed."""
    if not schemes or not model.merged:
        return None
    experts = {matrix.parameter: matrix for matrix in model.matrices.values() if matrix.expert is not None}
    stacked = next((experts[name] for name in model.merged if name in experts), None)
    if stacked is None:
        return Refusal(
            rule=MERGED,
            what=model.merged[0],
            value="dense, beside packed matrices",
            limit="transformers makes it of several weights, which it takes for packed in a packed folder",
            remedy="Use --for dense, or --for vllm.",
        )
    return Refusal(
        rule="dense-experts",
        what=f"experts, such as {stacked.name}",
        value="kept, beside packed matrices",
        limit="transformers cannot load dense experts from a packed folder",
        remedy="Use --for dense, which quantizes experts too, or --for vllm.",
    )


@cache
def engines() -> Mapping[str, Engine]:
    """Every engine by name, and what they have in common under `ANY`."""
    text = resources.files("mezzotint.formats").joinpath("engines.toml").read_text(encoding="utf-8")
    return {name: _engine(name, table) for name, table in tomllib.loads(text).items()}


def _engine(name: str, table: Mapping[str, Any]) -> Engine:
    formats = tuple(table["formats"])
    own = {f.name for f in fields(Engine)}
    cells = {key: dict(value) for key, value in table.items() if key not in own}
    assert cells.keys() <= set(formats), f"engines.toml: {name} has a table for a format that it does not list"
    defaults = {form: cell.pop("defaults", {}) for form, cell in cells.items()}
    return Engine(
        name=name,
        version=table["version"],
        evidence=table["evidence"],
        formats=formats,
        loads={form: _loads(cell) for form, cell in cells.items() if cell},
        defaults=defaults,
    )


def _loads(cell: Mapping[str, Any]) -> Loads:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in cell.items()}
    return Loads(**{"menu": values["bits"], **values})
