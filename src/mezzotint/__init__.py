"""Post-training quantization of language models: 1.5 to 8 bits per weight, with a measured loss.

Example:
    >>> import mezzotint
    >>> mezzotint.quantize("SmolLM2-135M", out="small", bits=3)  # doctest: +SKIP
    >>> mezzotint.evaluate("small", "text.txt", against="SmolLM2-135M").kl_nats  # doctest: +SKIP
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.engines import hook as _hook

if TYPE_CHECKING:
    from mezzotint.evaluation import Evaluation
    from mezzotint.evaluation.tasks import TaskScore
    from mezzotint.jobs.run import Listener
    from mezzotint.planning.planned import Planned
    from mezzotint.recipes.recipe import Recipe as Recipe
    from mezzotint.report.compare import Compared, Pair

__version__ = version("mezzotint")
__all__ = [
    "Recipe",
    "__version__",
    "compare",
    "convert",
    "evaluate",
    "evaluate_tasks",
    "load",
    "plan",
    "quantize",
    "rotate",
]

_hook.install()


def __getattr__(name: str) -> Any:
    # Recipe is imported when it is used: pydantic, torch and transformers take seconds
    if name == "Recipe":
        from mezzotint.recipes.recipe import Recipe

        return Recipe
    raise AttributeError(f"module 'mezzotint' has no attribute {name!r}")


def quantize(
    model: str | Path,
    recipe: "str | Recipe" = "default",
    *,
    out: str | Path,
    listener: "Listener | None" = None,
    resume: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """Quantize a model folder into another one and return the report.

    Args:
        model: folder of the original, or its name on the hub.
        recipe: name of a preset, path of a .yaml file, or a `Recipe`.
        out: folder to make; it must not exist, or be empty.
        listener: told of progress.
        resume: continue the work of an interrupted run with the same arguments; without any, start.
        **overrides: see `plan`.

    Raises:
        MezzotintError: what is wrong with the request, the model, the text or the disk.
    """
    from mezzotint.jobs import quantize as budgeted

    return budgeted.quantize(_request(model, recipe, **overrides), Path(out), listener, resume=resume)


def plan(model: str | Path, recipe: "str | Recipe" = "default", **overrides: Any) -> "Planned":
    """What `quantize` would do; reads headers, and weights only where bits are allocated.

    Args:
        model: folder of the original.
        recipe: name of a preset, path of a .yaml file, or a `Recipe`.
        **overrides: ``bits``, ``size`` and ``fits`` (bytes), ``context``, ``tokens_per_second``, ``settings`` (dotted
            names to values), ``keep`` (globs), ``engine``, ``format``, ``calibration``, ``samples``, ``seqlen``,
            ``field``, ``lines``, ``packing``, ``imatrix``, ``seed``, ``device``, ``precision``, ``memory`` (bytes),
            ``trust_remote_code``; as the options of the command line.

    Raises:
        MezzotintError: what is wrong with the request or the model.
    """
    from mezzotint.jobs import quantize as budgeted

    return budgeted.plan(_request(model, recipe, **overrides))[0]


def evaluate(model: str | Path, text: str | Path, *, against: str | Path | None = None, **options: Any) -> "Evaluation":
    """Perplexity of a folder on a text, and its divergence from the original.

    Args:
        model: folder, quantized or not.
        text: a file, or a data set by name.
        against: the original.
        **options: ``seqlen``, ``windows``, ``device``, ``memory``, ``cache`` (folder that keeps the original's states),
            ``precision``, ``trust_remote_code``, ``progress``.

    Raises:
        MezzotintError: a folder or the text cannot be used.
    """
    from mezzotint.evaluation.texts import evaluate as run

    return run(Path(model), str(text), against=None if against is None else Path(against), **options)


def rotate(
    model: str | Path, *, out: str | Path, resume: bool = False, trust_remote_code: bool = False, **choices: Any
) -> dict[str, Any]:
    """Write a folder whose model computes what ``model`` computes, from weights without outliers.

    Args:
        model: folder of the original.
        out: folder to make; it must not exist, or be empty.
        resume: take the place of an interrupted rotation of the same model, from its start.
        trust_remote_code: run Python code from the folder.
        **choices: ``residual`` and ``heads`` (``hadamard``, ``random`` or ``none``), ``untie``, ``dtype``, ``seed``; as
            the options of the command line.

    Raises:
        MezzotintError: the model cannot be rotated exactly; the message says why.
    """
    from mezzotint.jobs.rotate import Rotations
    from mezzotint.jobs.rotate import rotate as run

    return run(Path(model), Path(out), Rotations(**choices), resume=resume, trust_remote_code=trust_remote_code)


def convert(folder: str | Path, form: str, *, out: str | Path, **options: Any) -> dict[str, Any]:
    """Write a quantized folder in another format, with the same codes and scales.

    Args:
        folder: what `quantize` made.
        form: name of the format; ``dense`` takes everything.
        out: folder to make; it must not exist, or be empty.
        **options: ``engine``, ``resume``, ``trust_remote_code``, as the options of the command line, and ``step``.

    Raises:
        MezzotintError: the format cannot hold what is there without loss; the message says why.
    """
    from mezzotint.jobs.convert import convert as run

    return run(Path(folder), Path(out), form, **options)


def evaluate_tasks(
    model: str | Path, tasks: Sequence[str], *, against: str | Path | None = None, **options: Any
) -> "dict[str, TaskScore]":
    """Scores of a folder in tasks of lm-eval, item by item beside those of the original.

    Args:
        model: folder, quantized or not.
        tasks: names that lm-eval knows.
        against: the original.
        **options: ``task_path`` (folders with further task files), ``limit``, ``shots``, ``batch_size``, ``device``,
            ``memory``, ``trust_remote_code``, ``show_progress``.

    Raises:
        MezzotintError: lm-eval is not installed, a task is unknown, or a folder or data cannot be used.
    """
    from mezzotint.evaluation.scores import evaluate_tasks as run

    return run(Path(model), tasks, against=None if against is None else Path(against), **options)


def compare(folders: Sequence[str | Path]) -> "tuple[tuple[Compared, ...], tuple[Pair, ...]]":
    """Quantized folders beside each other, and every one's difference from the first where they were measured alike.

    Args:
        folders: two or more that `quantize` made; `evaluate` with ``--keep-results`` keeps what is compared.

    Raises:
        MezzotintError: fewer than two, or a folder has no report.
    """
    from mezzotint.report.compare import compare as run

    return run([Path(folder) for folder in folders])


def load(folder: str | Path, **options: Any) -> Any:
    """The model of a folder, ready to use, through transformers' own loader.

    Weights of our own format stay packed in memory. With this package imported, ``from_pretrained`` loads them as well.

    Args:
        folder: what `quantize` made, or any other model.
        **options: of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        FormatError: the folder is of a later version of our own format, or damaged.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def _request(
    model: str | Path,
    recipe: "str | Recipe",
    *,
    bits: int | float | None = None,
    size: int | None = None,
    fits: int | None = None,
    context: int | None = None,
    tokens_per_second: float | int | None = None,
    settings: Mapping[str, Any] | None = None,
    keep: Sequence[str] = (),
    engine: str | None = None,
    format: str | None = None,  # noqa: A002
    calibration: str | Path = "self",
    samples: int | None = None,
    seqlen: int | None = None,
    field: str | None = None,
    lines: bool = False,
    packing: bool = True,
    imatrix: str | Path | None = None,
    device: str = "auto",
    **rest: Any,
) -> Any:
    from mezzotint.recipes.request import CalibrationRequest, Request, resolve_device, resolve_recipe

    return Request(
        model=Path(model),
        recipe=resolve_recipe(
            recipe,
            engine=engine,
            form=format,
            bits=bits,
            size=size,
            fits=fits,
            context=context,
            tokens_per_second=tokens_per_second,
            settings=settings,
            keep=tuple(keep),
            weighted=imatrix is not None,
        ),
        calibration=CalibrationRequest(
            source=str(calibration),
            samples=samples,
            seqlen=seqlen,
            field=field,
            lines=lines,
            packing=packing,
            imatrix=None if imatrix is None else Path(imatrix),
        ),
        engine=engine,
        format=format,
        device=resolve_device(device),
        **rest,
    )
