"""Post-training quantization of language models: 1.5 to 8 bits per weight, with a measured loss.

Example:
    >>> import mezzotint
    >>> mezzotint.quantize("SmolLM2-135M", out="small", bits=3)  # doctest: +SKIP
    >>> mezzotint.evaluate("small", "text.txt", against="SmolLM2-135M").kl_nats  # doctest: +SKIP
"""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mezzotint.engines import hook as _hook
from mezzotint.recipes.options import Options

if TYPE_CHECKING:
    from torch import dtype as _Dtype  # noqa: N812  (a class, in spite of its name)
    from transformers import PreTrainedModel

    from mezzotint.evaluation import Evaluation
    from mezzotint.evaluation.tasks import TaskScore
    from mezzotint.jobs.run import Listener
    from mezzotint.planning.planned import Planned
    from mezzotint.recipes.recipe import Recipe as Recipe
    from mezzotint.report.compare import Compared, Pair

__version__ = version("mezzotint")
__all__ = [
    "Options",
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
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Quantize a model folder into another one and return the report.

    Args:
        model: folder of the original, or its name on the hub.
        recipe: name of a preset, path of a .yaml file, or a `Recipe`.
        out: folder to make; it must not exist, or be empty.
        listener: told of progress.
        resume: continue the work of an interrupted run with the same arguments; without any, start.
        **options: see `Options`.

    Raises:
        MezzotintError: what is wrong with the request, the model, the text or the disk.
    """
    from mezzotint.jobs import quantize as budgeted
    from mezzotint.recipes.request import make_request

    return budgeted.quantize(make_request(model, recipe, **options), Path(out), listener, resume=resume)


def plan(model: str | Path, recipe: "str | Recipe" = "default", **options: Unpack[Options]) -> "Planned":
    """What `quantize` would do; reads headers, and weights only where bits are allocated.

    Args:
        model: folder of the original.
        recipe: name of a preset, path of a .yaml file, or a `Recipe`.
        **options: see `Options`.

    Raises:
        MezzotintError: what is wrong with the request or the model.
    """
    from mezzotint.jobs import quantize as budgeted
    from mezzotint.recipes.request import make_request

    return budgeted.plan(make_request(model, recipe, **options))[0]


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    seqlen: int | None = None,
    windows: int | None = None,
    cache: str | Path | None = None,
    precision: str = "float32",
    device: str = "auto",
    memory: int | str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> "Evaluation":
    """Perplexity of a folder on a text, and its divergence from the original.

    Args:
        model: folder, quantized or not.
        text: a file, or a data set by name.
        against: the original.
        seqlen: tokens of a window; None is 2048, or what the model takes if that is less.
        windows: use the first so many; None is all.
        cache: folder that keeps the original's states for the next comparison.
        precision: of matrix products: ``"float32"`` or ``"bfloat16"``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        memory: that the process may take: bytes, or text such as ``"8GiB"``.
        trust_remote_code: run Python code from the folders.
        progress: told of the work done and of all of it.

    Raises:
        MezzotintError: a folder or the text cannot be used.
    """
    from mezzotint.evaluation.texts import evaluate as run
    from mezzotint.recipes.request import nbytes, resolve_device

    return run(
        Path(model),
        str(text),
        against=_path(against),
        seqlen=seqlen,
        windows=windows,
        cache=_path(cache),
        precision=precision,
        device=resolve_device(device),
        memory=nbytes(memory),
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def rotate(
    model: str | Path,
    *,
    out: str | Path,
    residual: str = "hadamard",
    heads: str = "hadamard",
    untie: bool = False,
    dtype: str | None = None,
    seed: int = 0,
    resume: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a folder whose model computes what ``model`` computes, from weights without outliers.

    Args:
        model: folder of the original.
        out: folder to make; it must not exist, or be empty.
        residual: rotation of the residual stream (R1): ``"hadamard"``, ``"random"`` or ``"none"``.
        heads: rotation of the values of heads (R2), by the same choices.
        untie: a head that is the embedding may become a matrix of its own.
        dtype: of the rotated tensors: ``"float16"``, ``"bfloat16"`` or ``"float32"``; None is the model's own.
        seed: of the rotations.
        resume: take the place of an interrupted rotation of the same model, from its start.
        trust_remote_code: run Python code from the folder.

    Raises:
        MezzotintError: the model cannot be rotated exactly; the message says why.
    """
    from mezzotint.jobs.rotate import Rotations
    from mezzotint.jobs.rotate import rotate as run

    choices = Rotations(residual=residual, heads=heads, untie=untie, dtype=dtype, seed=seed)
    return run(Path(model), Path(out), choices, resume=resume, trust_remote_code=trust_remote_code)


def convert(
    folder: str | Path,
    form: str,
    *,
    out: str | Path,
    engine: str | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    step: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Write a quantized folder in another format, with the same codes and scales.

    Args:
        folder: what `quantize` made.
        form: name of the format; ``dense`` takes everything.
        out: folder to make; it must not exist, or be empty.
        engine: what will run the result; None asks for what most engines load.
        resume: take the place of an interrupted conversion of the same folder, from its start.
        trust_remote_code: run Python code from the folder.
        step: told of the matrices done and of all of them.

    Raises:
        MezzotintError: the format cannot hold what is there without loss; the message says why.
    """
    from mezzotint.jobs.convert import convert as run

    return run(
        Path(folder), Path(out), form, engine=engine, resume=resume, trust_remote_code=trust_remote_code, step=step
    )


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    against: str | Path | None = None,
    task_path: Sequence[str | Path] = (),
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    memory: int | str | None = None,
    trust_remote_code: bool = False,
    show_progress: bool = False,
) -> "dict[str, TaskScore]":
    """Scores of a folder in tasks of lm-eval, item by item beside those of the original.

    Args:
        model: folder, quantized or not.
        tasks: names that lm-eval knows.
        against: the original.
        task_path: folders with further task files, for local data.
        limit: use the first so many items of each task; None is all.
        shots: solved examples before each item; None is what the task says.
        batch_size: items that run together.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        memory: that the weights may take: bytes, or text such as ``"8GiB"``.
        trust_remote_code: run Python code from the folders.
        show_progress: let lm-eval draw its bars on stderr.

    Raises:
        MezzotintError: lm-eval is not installed, a task is unknown, or a folder or data cannot be used.
    """
    from mezzotint.evaluation.scores import evaluate_tasks as run
    from mezzotint.recipes.request import nbytes, resolve_device

    return run(
        Path(model),
        tasks,
        against=_path(against),
        task_path=[Path(folder) for folder in task_path],
        limit=limit,
        shots=shots,
        batch_size=batch_size,
        device=resolve_device(device),
        memory=nbytes(memory),
        trust_remote_code=trust_remote_code,
        show_progress=show_progress,
    )


def compare(folders: Sequence[str | Path]) -> "tuple[tuple[Compared, ...], tuple[Pair, ...]]":
    """Quantized folders beside each other, and every one's difference from the first where they were measured alike.

    Args:
        folders: two or more that `quantize` made; `evaluate` with ``--keep-results`` keeps what is compared.

    Raises:
        MezzotintError: fewer than two, or a folder has no report.
    """
    from mezzotint.report.compare import compare as run

    return run([Path(folder) for folder in folders])


def load(
    folder: str | Path,
    *,
    dtype: "_Dtype | str | None" = None,
    device_map: "str | dict[str, Any] | None" = None,
    trust_remote_code: bool = False,
    **others: Any,
) -> "PreTrainedModel":
    """The model of a folder, ready to use, through transformers' own loader.

    Weights of our own format stay packed in memory. With this package imported, ``from_pretrained`` loads them as well.

    Args:
        folder: what `quantize` made, or any other model.
        dtype: of weights that are not packed; None is what transformers takes for the folder.
        device_map: where the weights go, such as ``"auto"`` or ``"cuda"``; None is the CPU.
        trust_remote_code: run Python code from the folder.
        **others: further arguments of ``AutoModelForCausalLM.from_pretrained``, which this hands on.

    Raises:
        FormatError: the folder is of a later version of our own format, or damaged.
    """
    from transformers import AutoModelForCausalLM

    chosen = {"dtype": dtype, "device_map": device_map}
    others |= {name: value for name, value in chosen.items() if value is not None}
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **others)


def _path(place: str | Path | None) -> Path | None:
    return None if place is None else Path(place)
