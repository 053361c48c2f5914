"""Checks for stages of a recipe that cannot be combined."""

from collections.abc import Iterator

from mezzotint.core.contracts import Matrix, Refinement
from mezzotint.core.plans import Entry
from mezzotint.errors import ConfigError
from mezzotint.grids.uniform import UniformGrid
from mezzotint.recipes.recipe import Stages


def check_stages(matrix: str, stages: Stages) -> None:
    """Refuse stages that are wrong together by mathematics.

    Raises:
        ConfigError: says which, why, and what to use instead.
    """
    if not stages.rounding.accepts_corrected and stages.submodules is not None:
        raise ConfigError(
            f"{matrix}: rounding {stages.rounding.kind!r} corrects drift itself, and the targets of "
            "submodules are already "
            "corrected: the error would be corrected twice. Use rounding.kind=gptq, or submodules.kind=none."
        )
    if not stages.rounding.accepts_corrected and "drift" in stages.target.needs:
        raise ConfigError(
            f"{matrix}: rounding {stages.rounding.kind!r} corrects drift itself, and so does target "
            f"{stages.target.kind!r}: it would be corrected twice. Use target.kind=weight, or rounding.kind=gptq."
        )
    if stages.rounding.scalar_only and stages.grid.tile != (1, 1):
        raise ConfigError(
            f"{matrix}: this rounding needs a scalar grid, but this grid encodes tiles of {stages.grid.tile}. "
            "Use rounding.kind=gptq."
        )
    refusals = list(_refusals(stages))
    if refusals:  # all at once: a grid that one cannot serve, the other often cannot either
        reasons = "; ".join(f"{stage} {reason}" for stage, reason in refusals)
        remedies = " and ".join(f"{stage}.kind=none" for stage, _ in refusals)
        raise ConfigError(f"{matrix}: {reasons}. Use {remedies}.")


def _refusals(stages: Stages) -> Iterator[tuple[str, str]]:
    """Optional stages that cannot serve the others, with what they are and why."""
    if stages.curvature is not None and (reason := _refuses_curvature(stages)) is not None:
        yield "curvature", f"{stages.curvature.kind!r} {reason}"
    if stages.refinement is not None and (reason := _refuses_refinement(stages, stages.refinement)) is not None:
        yield "refinement", f"{stages.refinement.kind!r} {reason}"


def _refuses_curvature(stages: Stages) -> str | None:
    """Why the other stages know nothing of the curvature in outputs, or change what outputs are, or None."""
    if stages.rounding.kind != "gptq":
        return f"needs rounding.kind=gptq, but rounding.kind is {stages.rounding.kind!r}"
    if not isinstance(stages.grid, UniformGrid):
        return f"needs grid.kind=uniform, but grid.kind is {stages.grid.kind!r}"
    if stages.transform is not None:
        return f"is measured in the original basis, and transform {stages.transform.kind!r} changes it"
    return None


def _refuses_refinement(stages: Stages, refinement: Refinement) -> str | None:
    """Why the grid cannot be refined, or what was rounded must not be, or None."""
    if not stages.rounding.accepts_corrected:
        kind = stages.rounding.kind
        return f"moves codes towards the target, and would undo the drift correction of rounding {kind!r}"
    return refinement.refuses(stages.grid)


def check_compensation(entry: Entry, matrix: Matrix) -> None:
    """Refuse what an adapter cannot hold.

    Raises:
        ConfigError: the matrix is not the weight of an nn.Linear, or submodules would change the codes once more.
    """
    if entry.compensation is None:
        return
    if entry.submodules is not None:
        raise ConfigError(
            "compensation needs final codes, but submodules change codes after the statistics are collected. "
            "Use submodules.kind=none or compensation.kind=none."
        )
    if not matrix.linear or matrix.expert is not None:
        raise ConfigError(
            f"{matrix.name} is not the weight of an nn.Linear, so it cannot have an adapter. Leave it out with "
            "{match: ..., set: {compensation.kind: none}}."
        )
