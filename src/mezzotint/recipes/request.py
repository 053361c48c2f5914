"""The user's request, checked as far as possible without the model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import torch

from mezzotint.core.precision import PRECISIONS
from mezzotint.errors import ConfigError, unknown
from mezzotint.formats.engine_rules import ANY, Engine, engines
from mezzotint.recipes.options import Options
from mezzotint.recipes.recipe import Recipe, Rule, load_recipe, presets
from mezzotint.recipes.settings import fields_of
from mezzotint.registry import FORMATS, GRIDS

WHOLE_BITS = ("uniform", "lookup")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """``8GiB``, ``1.5 GB`` or a plain number, in bytes.

    Raises:
        ConfigError: not a size.

    Example:
        >>> parse_bytes("1.5GiB")
        1610612736
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"size {text!r} is not a size. Write for example 8GiB, 1500MB or a number of bytes.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRequest:
    """Which text to calibrate on.

    Attributes:
        source: ``self`` (sampled from the model), a file, or a data set by name.
        samples: windows; None lets the plan choose.
        seqlen: tokens per window; None lets the plan choose.
        field: field of a .jsonl or .parquet row that holds the text; None finds it.
        lines: a .txt file has one document a line.
        packing: documents end to end; otherwise one document a window, padded.
        imatrix: importance matrix of llama.cpp, in the place of text.
    """

    source: str = "self"
    samples: int | None = None
    seqlen: int | None = None
    field: str | None = None
    lines: bool = False
    packing: bool = True
    imatrix: Path | None = None

    def __post_init__(self) -> None:
        if self.imatrix is not None and (self.source != "self" or self.samples is not None or self.seqlen is not None):
            raise ConfigError("--imatrix replaces calibration text. Leave --calibration and its options out.")
        for name, value, least in (("samples", self.samples, 2), ("seqlen", self.seqlen, 8)):
            if value is not None and value < least:
                raise ConfigError(f"--{name} is {value}; it must be at least {least}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One quantization: everything that determines its result, and where it runs.

    Attributes:
        model: folder of the original.
        recipe: with overrides and rules applied.
        engine: what will run the result; None chooses the format most engines load.
        format: of the result; None is the first that the engine loads.
        precision: of matrix products in calibration: float32, bfloat16 (factors; sums stay float32), or auto, which is
            what the model is stored in.
        memory: bytes that weights, activations and solvers may take together; None is no limit.
        ranks: processes that share the work; the memory is that of each.
    """

    model: Path
    recipe: Recipe
    engine: str | None = None
    format: str | None = None
    calibration: CalibrationRequest = field(default_factory=CalibrationRequest)
    seed: int = 0
    device: str = "cpu"
    precision: str = "auto"
    memory: int | None = None
    trust_remote_code: bool = False
    ranks: int = 1

    @property
    def loading(self) -> Engine:
        """What the engine loads; where none is named, what most do."""
        return engines()[self.engine or ANY]

    @property
    def wanted_format(self) -> str | None:
        """The format that was asked for, by its name or by that of an engine."""
        return self.format or (None if self.engine is None else self.loading.formats[0])

    @property
    def model_name(self) -> str:
        """Of the original: ``OWNER/NAME`` on the hub, or its folder, without the place where that lies."""
        return self.model.absolute().name if self.model.exists() else self.model.as_posix()

    def __post_init__(self) -> None:
        check_engine(self.engine, self.format)
        if self.precision not in ("auto", *PRECISIONS):
            raise ConfigError(unknown("precision", self.precision, ("auto", *PRECISIONS)))


def make_request(model: str | Path, recipe: str | Recipe = "default", **options: Unpack[Options]) -> Request:
    """What the command line and the Python functions ask for, checked as far as it can be without the model.

    Args:
        model: folder of the original.
        recipe: name of a preset, path of a .yaml file, or a recipe.
        **options: see `Options`.

    Raises:
        TypeError: an option that there is not.
        ConfigError: a value that does not fit.
    """
    for name in options.keys() - Options.__annotations__.keys():
        raise TypeError(unknown("option", name, Options.__annotations__))
    imatrix = options.get("imatrix")
    resolved = resolve_recipe(
        recipe,
        form=options.get("format"),
        size=nbytes(options.get("size")),
        fits=nbytes(options.get("fits")),
        keep=tuple(options.get("keep", ())),
        weighted=imatrix is not None,
        **_given(options, "engine", "bits", "context", "tokens_per_second", "settings"),
    )
    calibration = CalibrationRequest(
        source=str(options.get("calibration", "self")),
        imatrix=None if imatrix is None else Path(imatrix),
        **_given(options, "samples", "seqlen", "field", "lines", "packing"),
    )
    return Request(
        model=Path(model),
        recipe=resolved,
        calibration=calibration,
        device=resolve_device(options.get("device", "auto")),
        memory=nbytes(options.get("memory")),
        **_given(options, "engine", "format", "seed", "precision", "trust_remote_code"),
    )


def _given(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of the options that were given: the others have their default in one place, where they are used."""
    return {name: options[name] for name in names if name in options}


def nbytes(value: int | str | None) -> int | None:
    """A number of bytes, given as such or as text for `parse_bytes`."""
    return parse_bytes(value) if isinstance(value, str) else value


def check_engine(engine: str | None, form: str | None) -> None:
    """Refuse names of engines and formats that there are not, and formats that the engine does not load.

    Raises:
        ConfigError: with what there is.
    """
    known = [name for name in engines() if name != ANY]
    if engine is not None and engine not in known:
        raise ConfigError(unknown("engine", engine, known))
    if form is not None and form not in FORMATS:
        raise ConfigError(unknown("format", form, FORMATS))
    if engine is None or form is None:  # a format of one's own is in no engine's table
        return
    loads = engines()[engine].formats
    if form not in loads:
        raise ConfigError(f"--format is {form}, and --for {engine} loads {', '.join(loads)}. Choose one of these.")


def resolve_recipe(
    recipe: str | Recipe,
    *,
    engine: str | None = None,
    form: str | None = None,
    bits: int | float | None = None,
    size: int | None = None,
    fits: int | None = None,
    context: int | None = None,
    tokens_per_second: float | int | None = None,
    settings: Mapping[str, Any] | None = None,
    keep: tuple[str, ...] = (),
    weighted: bool = False,
) -> Recipe:
    """A recipe by name or file with the command line's changes.

    Args:
        recipe: name of a preset, path of a .yaml file, or a recipe.
        engine: that will run the result; a preset takes what suits it where nothing else is said.
        form: name of the format of the result, if it was asked for.
        bits: of one code; where bits are allocated, and for the types of GGUF, the average that is stored for a weight.
        size: bytes of the folder, in which bits are allocated.
        fits: bytes of memory for weights, cache and activations, in which bits are allocated.
        context: tokens that the cache must hold then.
        tokens_per_second: speed, for which bits are allocated.
        settings: dotted names and values.
        keep: globs of matrices to leave as they are; they win over the recipe's own rules.
        weighted: there is an importance matrix; a preset weights its ranges by it where nothing else is said.

    Raises:
        ConfigError: an unknown name or a value that does not fit.
    """
    check_engine(engine, form)
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    changes = dict(settings or {})
    if isinstance(recipe, str) and recipe in presets():
        suited = _suited(chosen, engine, form, changes)
        kind = changes.get("grid.kind", suited.get("grid.kind", chosen.grid["kind"]))
        if weighted and "range" in fields_of(GRIDS[kind]):
            suited["grid.range"] = "weighted"
        changes = {**suited, **changes}
    kind = changes.get("grid.kind", chosen.grid.get("kind"))
    budgets = {"size": size, "fits": fits, "tokens_per_second": tokens_per_second}
    given = {f"allocation.{name}": value for name, value in budgets.items() if value is not None}
    if given:
        changes |= {"allocation.kind": "knapsack", **given}
    if context is not None:
        changes["allocation.context"] = context
    if bits is not None and kind == "gguf":
        changes["allocation.kind"] = "knapsack"
    if bits is not None and "knapsack" in (chosen.allocation["kind"], changes.get("allocation.kind")):
        changes["allocation.bits"] = bits
    elif bits is not None:
        whole = kind in WHOLE_BITS
        if whole and not float(bits).is_integer():
            near = f"Use --bits {int(bits)} or --bits {int(bits) + 1}" if 2 <= bits < 8 else "Use --bits 2 to 8"
            raise ConfigError(f"--bits is {bits:g}; grid {kind!r} stores whole bits. {near}.")
        changes["grid.bits"] = int(bits) if whole else float(bits)
    changed = chosen.with_settings(changes)
    return changed.with_rules([Rule(match=pattern, keep=True) for pattern in keep])


def _suited(preset: Recipe, engine: str | None, form: str | None, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine wants of a preset of integers or of its own grid, where it was not asked for something else."""
    if "grid.kind" in asked or (engine is None and form is None):
        return {}
    loading = engines()[engine or ANY]
    defaults = dict(loading.defaults.get(form or loading.formats[0], {}))
    if preset.grid.get("kind") not in ("uniform", defaults.get("grid.kind")):
        return {}
    if preset.transform.get("kind") != "none":  # what the recipe is about
        defaults.pop("transform.kind", None)
    if "grid.kind" in defaults:  # what the other grid has too stays
        known = fields_of(GRIDS[defaults["grid.kind"]])
        defaults |= {f"grid.{name}": value for name, value in preset.grid.items() if name in known}
    return defaults


def resolve_device(name: str) -> str:
    """``auto`` is the GPU if there is one.

    Raises:
        ConfigError: a GPU is asked for and there is none, or the name is unknown.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(unknown("device", name, ("auto", "cpu", "cuda")))
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device is cuda, but torch finds no CUDA device. Use --device cpu.")
    return "cuda" if available and name != "cpu" else "cpu"
