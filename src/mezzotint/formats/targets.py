"""Names of modules as engines match them: explicit, or a pattern that is provably the same."""

import re
from collections.abc import Collection, Iterable

from mezzotint.core.plans import Refusal
from mezzotint.core.structure import Matrix, ModelMap

_EXPERTS = ".experts"
_BLOCK_INDEX = re.compile(r"^(?P<path>.*?)\.\d+\.(?P<rest>.+)$")


def module_of(parameter: str) -> str:
    """The module that owns a parameter.

    Example:
        >>> module_of("model.layers.3.mlp.up_proj.weight")
        'model.layers.3.mlp.up_proj'
    """
    return parameter.rpartition(".")[0]


def modules_of(matrix: Matrix) -> tuple[str, ...]:
    """Names of the module that holds a matrix: in the model, and in the checkpoint where conversion renames it.

    transformers matches the model's names; engines that read the checkpoint themselves match its names. Experts that a
    checkpoint stores one by one are named by their common container, as engines do that fuse them.
    """
    if matrix.tied_to is not None:
        return (module_of(matrix.parameter),)  # its tensor in the checkpoint is the other one's
    stored = (_container(module_of(source)) for source in matrix.sources)
    return tuple(dict.fromkeys((module_of(matrix.parameter), *stored)))


def refuses_tied(matrix: Matrix) -> Refusal | None:
    """A matrix that shares its storage cannot be packed."""
    if matrix.tied_to is None:
        return None
    return Refusal(
        rule="tied",
        what=matrix.name,
        value=f"shares its storage with {matrix.tied_to}",
        limit="a packed copy would be replaced by the shared tensor when the model is loaded",
        remedy="Keep it.",
    )


def known_modules(model: ModelMap, further: Iterable[str] = ()) -> tuple[str, ...]:
    """Every module that an engine might take for a linear, in the order of the map.

    Args:
        model: matrices and unmapped parameters count; what is looked up is none.
        further: module names outside the map, e.g. of linears outside the blocks.
    """
    mapped = (name for matrix in model.matrices.values() if not matrix.lookup for name in modules_of(matrix))
    unmapped = (module_of(parameter) for parameter in model.unmapped)
    return tuple(dict.fromkeys((*mapped, *unmapped, *further)))


def compact(wanted: Collection[str], known: Collection[str]) -> list[str]:
    r"""Targets that match ``wanted`` and nothing else of ``known``, in the grammar of compressed-tensors.

    A name inside a block becomes ``re:.*\.REST$``, one pattern for all blocks, if everything in ``known`` that the
    pattern matches is wanted; otherwise it is written out. Engines match patterns with ``re.match``. A container of
    experts stands for itself and what is in it: engines that fuse experts ask for either.

    Example:
        >>> names = [f"layers.{i}.{part}" for i in range(2) for part in ("q", "o")]
        >>> compact(["layers.0.q", "layers.1.q", "layers.0.o"], names)
        ['re:.*\\.q$', 'layers.0.o']
    """
    allowed = set(wanted)
    patterns: dict[str, bool] = {}
    targets: dict[str, None] = {}
    for name in wanted:
        inside = _BLOCK_INDEX.match(name)
        tail = r"(\..*)?$" if name.endswith(_EXPERTS) else "$"
        pattern = "" if inside is None else rf".*\.{re.escape(inside['rest'])}{tail}"
        if pattern not in patterns:
            patterns[pattern] = inside is not None and all(
                other in allowed for other in known if re.match(pattern, other)
            )
        if patterns[pattern]:
            targets["re:" + pattern] = None
        elif name.endswith(_EXPERTS):
            targets[f"re:{re.escape(name)}{tail}"] = None
        else:
            targets[name] = None
    return list(targets)


def _container(module: str) -> str:
    head, found, _ = module.partition(_EXPERTS + ".")
    return head + _EXPERTS if found else module
