"""A recipe: one choice of target, transform, grid and rounding, and rules per pattern."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mezzotint.allocation.knapsack import Knapsack
from mezzotint.core.contracts import Grid, Refinement, Rounding, Target, Transform
from mezzotint.core.curvature import Fisher
from mezzotint.core.plans import Compensation, Submodules
from mezzotint.errors import ConfigError, unknown
from mezzotint.recipes.settings import Settings, build, with_setting
from mezzotint.registry import (
    ALLOCATIONS,
    COMPENSATIONS,
    CURVATURES,
    GRIDS,
    REFINEMENTS,
    ROUNDINGS,
    SUBMODULES,
    TARGETS,
    TRANSFORMS,
    Registry,
)

STAGES = (
    "target",
    "transform",
    "grid",
    "rounding",
    "curvature",
    "refinement",
    "embeddings",
    "submodules",
    "compensation",
    "allocation",
)


class Rule(BaseModel):
    """What changes for matrices whose name matches a glob; the first rule that matches wins.

    Attributes:
        match: glob over canonical names, e.g. ``*.mlp.down_proj``.
        set: dotted settings that change.
        keep: leave these matrices as they are (true) or quantize what is kept by default, like the head (false).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: str
    set: dict[str, Any] = {}
    keep: bool | None = None

    @model_validator(mode="after")
    def _about_a_matrix(self) -> "Rule":
        for name in self.set:
            if name.startswith("allocation."):
                raise ValueError(f"{name} applies to all matrices together. Set it outside the rules")
        return self


class Recipe(BaseModel):
    """One choice of each stage; every stage is ``{kind: ..., its settings}``.

    ``matrices`` are dotted settings of single matrices by canonical name, on top of everything else: an allocation is
    written down so.

    Attributes:
        embeddings: grid of the token embedding, and with it of a head that shares its storage; ``none`` keeps it.

    Example:
        >>> Recipe(grid={"kind": "uniform", "bits": 3}, rounding={"kind": "nearest"}).stages().grid.bits
        3
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "custom"
    summary: str = ""
    paper: str = ""
    target: dict[str, Any] = {"kind": "weight"}
    transform: dict[str, Any] = {"kind": "none"}
    grid: dict[str, Any] = {"kind": "uniform"}
    rounding: dict[str, Any] = {"kind": "gptq"}
    curvature: dict[str, Any] = {"kind": "none"}
    refinement: dict[str, Any] = {"kind": "none"}
    embeddings: dict[str, Any] = {"kind": "none"}
    allocation: dict[str, Any] = {"kind": "none"}
    submodules: dict[str, Any] = {"kind": "none"}
    compensation: dict[str, Any] = {"kind": "none"}
    rules: tuple[Rule, ...] = ()
    matrices: dict[str, dict[str, Any]] = {}

    @property
    def settings(self) -> dict[str, Settings]:
        """The stages as nested dictionaries."""
        return {stage: dict(getattr(self, stage)) for stage in STAGES}

    def with_settings(self, changes: Mapping[str, Any]) -> "Recipe":
        """A copy with dotted settings changed, e.g. ``{"grid.bits": 3}``; checked.

        Raises:
            ConfigError: unknown name (with a suggestion) or a value that does not fit.
        """
        settings = self.settings
        for name, value in sorted(changes.items(), key=lambda item: not item[0].endswith(".kind")):
            settings = with_setting(settings, name, value)
        changed = self.model_copy(update=settings)
        changed.stages()
        return changed

    def with_rules(self, rules: Sequence[Rule]) -> "Recipe":
        """A copy with these rules before the recipe's own."""
        return self.model_copy(update={"rules": (*rules, *self.rules)})

    def rule_for(self, matrix: str) -> Rule | None:
        """The first rule that matches a canonical name."""
        return next((rule for rule in self.rules if fnmatchcase(matrix, rule.match)), None)

    def stages(self, changes: Mapping[str, Any] | None = None) -> "Stages":
        """The stages as objects, after dotted changes."""
        settings = self.settings
        for name, value in sorted((changes or {}).items(), key=lambda item: not item[0].endswith(".kind")):
            settings = with_setting(settings, name, value)
        return Stages(
            target=build("target", settings["target"], TARGETS),
            transform=_optional("transform", settings["transform"], TRANSFORMS),
            grid=build("grid", settings["grid"], GRIDS),
            rounding=build("rounding", settings["rounding"], ROUNDINGS),
            curvature=_optional("curvature", settings["curvature"], CURVATURES),
            refinement=_optional("refinement", settings["refinement"], REFINEMENTS),
            embeddings=_optional("embeddings", settings["embeddings"], GRIDS),
            allocation=_optional("allocation", settings["allocation"], ALLOCATIONS),
            submodules=_optional("submodules", settings["submodules"], SUBMODULES),
            compensation=_optional("compensation", settings["compensation"], COMPENSATIONS),
        )

    def check_patterns(self, matrices: Sequence[str]) -> None:
        """Every rule must match at least one matrix, and every matrix that is named must be there.

        Raises:
            ConfigError: names the pattern that matches nothing, and what there is.
        """
        for name in self.matrices:
            if name not in matrices:
                raise ConfigError(unknown("matrix", name, matrices))
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.match) for name in matrices):
                shown = ", ".join(matrices[:4])
                raise ConfigError(
                    f"pattern {rule.match!r} matches none of the {len(matrices)} matrices. They are called {shown}, … "
                    "Correct the pattern or remove the rule."
                )


def _optional(stage: str, settings: Mapping[str, Any], registry: Registry) -> Any:
    if settings.get("kind") != "none":
        return build(stage, settings, registry)
    for name in sorted(settings.keys() - {"kind"}):
        raise ConfigError(
            f"setting '{stage}.{name}' has no effect, because {stage}.kind is none. Set {stage}.kind too: "
            f"{', '.join(registry) or 'there is none yet'}."
        )
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """One choice of each stage, as objects."""

    target: Target
    transform: Transform | None
    grid: Grid
    rounding: Rounding
    curvature: Fisher | None
    refinement: Refinement | None
    embeddings: Grid | None
    allocation: Knapsack | None
    submodules: Submodules | None
    compensation: Compensation | None


@cache
def presets() -> Mapping[str, Recipe]:
    """Every recipe that has a name."""
    text = files("mezzotint.recipes").joinpath("presets.toml").read_text(encoding="utf-8")
    return {name: Recipe(name=name, **values) for name, values in tomllib.loads(text).items()}


def load_recipe(name: str) -> Recipe:
    """A preset by name, or a recipe from a ``.yaml`` file.

    Raises:
        ConfigError: unknown name (with a suggestion), missing file, or a file that is not a recipe.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in presets():
            raise ConfigError(unknown("recipe", name, presets()))
        return presets()[name]
    if not path.is_file():
        raise ConfigError(f"recipe file {name!r} does not exist. Give a path to a .yaml file or the name of a recipe.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ConfigError(f"recipe file {name!r} holds {type(values).__name__}, not a mapping of stages.")
        recipe = Recipe(**{"name": path.stem, **values})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe file {name!r} is not valid YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = Rule.model_fields if first["loc"][0] == "rules" else Recipe.model_fields
            raise ConfigError(f"recipe file {name!r}: {unknown('key', where, known)}") from error
        raise ConfigError(f"recipe file {name!r}: {where}: {first['msg']}.") from error
    recipe.stages()
    return recipe
