"""Zero- and few-shot tasks through lm-eval (extra ``eval``), and two models compared item by item."""

import difflib
import hashlib
import io
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mezzotint.errors import CalibrationError, ConfigError, NonFiniteError, unknown
from mezzotint.evaluation.intervals import Difference, difference

NORMALISED = "acc_norm"  # the metric that papers report of a task that has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One measure of one task.

    Attributes:
        value: over all items.
        stderr: lm-eval's standard error; None where it has none.
        items: score of each item, in the task's order; None where the value is not their mean (perplexities, groups).
    """

    value: float
    stderr: float | None
    items: tuple[float, ...] | None = field(repr=False, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric of a model beside that of the reference. Without a reference the last fields are None.

    Attributes:
        metric: lm-eval's name of it.
        difference: model minus reference over the same items.
        flips: shares of items that the reference solved and the model does not (``lost``), and the other way
            (``gained``); of metrics that are right or wrong (arXiv 2407.09141).
    """

    metric: str
    value: float
    stderr: float | None
    reference: float | None = None
    reference_stderr: float | None = None
    difference: Difference | None = None
    flips: Mapping[str, float] | None = None
    items: tuple[float, ...] | None = field(repr=False, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore(Score):
    """The main metric of a task: ``acc_norm`` where it has one, else its first; the rest beside it.

    Attributes:
        count: items.
        shots: solved examples in front of each.
        digest: of the prompts; two models were asked the same where it is equal.
        others: further metrics.
    """

    count: int
    shots: int
    digest: str
    others: tuple[Score, ...] = ()

    def figures(self) -> dict[str, Any]:
        """Everything but the scores of items, for people and JSON."""
        found = _figures(self)
        return {**found, "others": {other.metric: _figures(other) for other in self.others}}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRun:
    """What one model did in one task: metrics by name."""

    count: int
    shots: int
    digest: str
    metrics: Mapping[str, Metric]


def load_tasks(names: Sequence[str], folders: Sequence[Path] = ()) -> Any:
    """lm-eval's index of tasks, after a look whether it knows these.

    Args:
        names: tasks, groups or tags.
        folders: with further task files; one of the same name replaces lm-eval's own.

    Raises:
        ConfigError: lm-eval is not installed, a folder is missing, or a task is unknown.
    """
    try:
        # an extra: not there unless the user asked for it
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "--tasks needs lm-eval, which is not installed. Run: pip install 'mezzotint[eval]'."
        ) from error
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"--task-path is {str(folder)!r}, which is not a folder. Give a folder with task files.")
    paths = [str(folder.absolute()) for folder in folders]
    with _quiet():
        manager = TaskManager(include_path=paths or None, include_defaults=not paths)
        if paths and not {*names} <= {*manager.all_tasks}:  # lm-eval's own are thousands of files: only where needed
            manager = TaskManager(include_path=paths)
    for name in names:
        if name not in manager.all_tasks:
            known = _near(name, manager.all_tasks)
            raise ConfigError(
                f"{unknown('task', name, known)} `lm-eval ls tasks` lists all; --task-path adds your own."
            )
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    manager: Any,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    show_progress: bool = False,
) -> dict[str, TaskRun]:
    """Run tasks with lm-eval's own prompts, scoring and seeds.

    Args:
        model: with all weights, on its device.
        tokenizer: of the model.
        names: as given to `load_tasks`.
        manager: what `load_tasks` gave.
        limit: items of each task, from the first on; None is all.
        shots: solved examples in front of each item; None is what the task says.
        batch_size: items that run together.
        show_progress: let lm-eval draw its bars on stderr.

    Raises:
        CalibrationError: a task's data cannot be read.
        NonFiniteError: a result is not finite.
    """
    from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    shown = sys.stderr if show_progress else io.StringIO()  # stdout belongs to results
    with _quiet(), redirect_stdout(shown), redirect_stderr(shown):
        chosen = _loaded(manager, names, shots)
        language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # type: ignore[arg-type]
        found = evaluate(lm=language_model, task_dict=chosen, limit=limit)
    return {task: _run(task, found) for task in found["results"]}


def scored(run: TaskRun, reference: TaskRun | None) -> TaskScore:
    """The metrics of a model beside those of the reference."""
    scores = {name: _score(name, metric, reference and reference.metrics[name]) for name, metric in run.metrics.items()}
    main = NORMALISED if NORMALISED in scores else next(iter(scores))
    others = tuple(score for name, score in scores.items() if name != main)
    values = {f.name: getattr(scores[main], f.name) for f in fields(Score)}
    return TaskScore(count=run.count, shots=run.shots, digest=run.digest, others=others, **values)


def _score(name: str, metric: Metric, reference: Metric | None) -> Score:
    paired, flips = None, None
    if reference is not None and metric.items is not None and reference.items is not None and len(metric.items) > 1:
        paired = difference(metric.items, reference.items)
        pairs = list(zip(metric.items, reference.items, strict=True))
        if {*metric.items, *reference.items} <= {0.0, 1.0}:
            flips = {
                "lost": sum(own < other for own, other in pairs) / len(pairs),
                "gained": sum(own > other for own, other in pairs) / len(pairs),
            }
    return Score(
        metric=name,
        value=metric.value,
        stderr=metric.stderr,
        reference=None if reference is None else reference.value,
        reference_stderr=None if reference is None else reference.stderr,
        difference=paired,
        flips=flips,
        items=metric.items,
    )


def _loaded(manager: Any, names: Sequence[str], shots: int | None) -> Any:
    """Tasks with their data, set as lm-eval's own command sets them."""
    import datasets  # pyright: ignore[reportMissingImports]  (lm-eval depends on it)
    from lm_eval.defaults import DEFAULT_OTHER_SEED  # pyright: ignore[reportMissingImports]

    try:
        found = manager.load(list(names))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f"the data of {', '.join(names)} cannot be read: {reason} Connect to the network once, or give task files "
            "that name local data with --task-path."
        ) from error
    for task in found["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:  # a task that says 0 is one that must not have any
            task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return found


def _run(task: str, found: Mapping[str, Any]) -> TaskRun:
    samples: list[Mapping[str, Any]] = found.get("samples", {}).get(task, [])
    metrics: dict[str, Metric] = {}
    for key, value in found["results"][task].items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise NonFiniteError(f"{name} of {task} is {value}; check the weights for values that are not finite.")
        stderr = found["results"][task].get(f"{name}_stderr,{chosen}")
        of_filter = [sample for sample in samples if sample["filter"] == chosen]
        shown = name if name not in metrics and chosen == "none" else f"{name} ({chosen})"
        metrics[shown] = Metric(
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
            items=_items(of_filter, name, float(value)),
        )
    if not metrics:
        raise ConfigError(f"{task} has no metric. Name its subtasks instead of the group.")
    return TaskRun(
        count=found.get("n-samples", {}).get(task, {}).get("effective", len(samples)),
        shots=int(found.get("n-shot", {}).get(task) or 0),
        digest=hashlib.sha256("".join(sample["prompt_hash"] for sample in samples).encode()).hexdigest()[:16],
        metrics=metrics,
    )


def _items(samples: Sequence[Mapping[str, Any]], name: str, value: float) -> tuple[float, ...] | None:
    """Scores of the items, where their mean is the metric."""
    scores = [sample[name] for sample in samples if name in sample]
    if not scores or not all(isinstance(score, int | float) for score in scores):
        return None
    mean = math.fsum(scores) / len(scores)
    # sums of up to 10^5 scores in another order
    return tuple(float(score) for score in scores) if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12) else None


def _figures(score: Score) -> dict[str, Any]:
    hidden = ("items", "others")
    found = {f.name: getattr(score, f.name) for f in fields(score) if f.name not in hidden}
    if score.difference is not None:
        found["difference"] = {f.name: getattr(score.difference, f.name) for f in fields(Difference)}
    return found


def _near(name: str, known: Sequence[str]) -> list[str]:
    """A few of thousands of names."""
    return difflib.get_close_matches(name, known, n=8, cutoff=0.4) or list(known[:8])


@contextmanager
def _quiet() -> Any:
    """Only errors of lm-eval's log, for a while: its warnings are about arguments that are none of the user's."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
