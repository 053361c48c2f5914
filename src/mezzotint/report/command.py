"""The command line that repeats a run."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mezzotint.core.plans import CalibrationPlan
from mezzotint.recipes.recipe import Recipe, presets
from mezzotint.recipes.request import Request

# settings that have options of their own
_OPTIONS = {
    "grid.bits": "--bits",
    "allocation.bits": "--bits",
    "allocation.size": "--size",
    "allocation.tokens_per_second": "--tokens-per-second",
}


def command_of(request: Request, calibration: CalibrationPlan | None, out: str) -> str:
    """``mezzotint quantize ...`` with every choice that changes the result, also those that the plan made.

    A recipe without a name of its own is given as the file ``NAME.yaml``, whose text `recipe_yaml` gives.

    Args:
        request: what was asked for.
        calibration: as it was run.
        out: name of the output folder.
    """
    words = ["mezzotint", "quantize", request.model_name, "--out", out, *_recipe_words(request.recipe)]
    if request.engine is not None:
        words += ["--for", request.engine]
    words += ["--format", request.format] if request.format is not None else []
    if calibration is not None:
        sizes = "--samples", str(calibration.samples), "--seqlen", str(calibration.seqlen)
        source = Path(calibration.source)
        # where a file lay on this machine is nobody else's business
        words += ["--calibration", source.name if source.is_absolute() else calibration.source, *sizes]
        asked = request.calibration
        words += ["--field", asked.field] if asked.field is not None else []
        words += ["--lines"] * asked.lines + ["--no-packing"] * (not asked.packing)
    if request.calibration.imatrix is not None:
        words += ["--imatrix", request.calibration.imatrix.name]
    words += ["--precision", request.precision] if request.precision != "auto" else []
    words += ["--seed", str(request.seed)] if request.seed else []
    words += ["--trust-remote-code"] * request.trust_remote_code
    return shlex.join(words)


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    """The text of a recipe file, from a recipe of a report; what does nothing is left out, and what was allocated."""
    hidden = {"name", "summary", "paper"}
    if recipe["allocation"]["kind"] != "none":
        hidden.add("matrices")  # its result, not a choice
    kept = {name: value for name, value in recipe.items() if name not in hidden and value and value != {"kind": "none"}}
    if "rules" in kept:
        kept["rules"] = [{name: value for name, value in rule.items() if value} for rule in kept["rules"]]
    return yaml.safe_dump(kept, sort_keys=False, default_flow_style=None, allow_unicode=True)


def _recipe_words(recipe: Recipe) -> list[str]:
    base = presets().get(recipe.name)
    keeps = [rule.match for rule in recipe.rules if rule.keep and not rule.set]
    if base is None or recipe.matrices or len(keeps) < len(recipe.rules):
        return ["--recipe", f"{recipe.name}.yaml"]
    words = ["--recipe", recipe.name]
    for name, value in _changes(recipe, base):
        text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
        words += [_OPTIONS[name], text] if name in _OPTIONS else ["--set", f"{name}={text}"]
    for pattern in keeps:
        words += ["--keep", pattern]
    return words


def _changes(recipe: Recipe, base: Recipe) -> Iterator[tuple[str, Any]]:
    """Dotted settings in which a recipe differs from its preset."""
    for stage, settings in recipe.settings.items():
        before = base.settings[stage]
        if settings.get("kind") != before.get("kind"):
            before = {}
        for name, value in settings.items():
            if name not in before or before[name] != value:
                yield f"{stage}.{name}", value
