"""Tasks on a folder of any format, and on the original beside it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mezzotint.blockwise.source import open_source
from mezzotint.blockwise.whole import dense_model
from mezzotint.calibration import load_tokenizer
from mezzotint.errors import ConfigError
from mezzotint.evaluation.tasks import TaskRun, TaskScore, load_tasks, run_tasks, scored


def evaluate_tasks(
    model: Path,
    tasks: Sequence[str],
    *,
    against: Path | None = None,
    task_path: Sequence[Path] = (),
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    memory: int | None = None,
    trust_remote_code: bool = False,
    show_progress: bool = False,
) -> dict[str, TaskScore]:
    """Scores of a model in tasks of lm-eval, item by item beside those of the original.

    Packed weights of every format are decoded first: the figures are those of the same weights written ``--for dense``.

    Args:
        model: folder, quantized or not.
        tasks: names of lm-eval's tasks, groups or tags.
        against: the reference, usually the original.
        task_path: folders with further task files, for local data.
        limit: items of each task, from the first on; None is all.
        shots: solved examples in front of each item; None is what the task says.
        batch_size: items that run together.
        device: ``cpu`` or ``cuda``.
        memory: bytes that the weights may take.
        trust_remote_code: run Python code from the folders.
        show_progress: let lm-eval draw its bars on stderr.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, or a number makes no sense.
        ModelError, CalibrationError: a folder, or the data of a task, cannot be used.
    """
    for name, value, least in (("limit", limit, 1), ("shots", shots, 0), ("batch-size", batch_size, 1)):
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}; it must be at least {least}.")
    if not tasks:
        raise ConfigError("--tasks names no task. Give for example --tasks arc_easy,piqa.")
    manager = load_tasks(tasks, task_path)

    def run(folder: Path) -> dict[str, TaskRun]:
        source = open_source(folder, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
        with torch.no_grad():
            return run_tasks(
                dense_model(source, device=device, memory=memory),
                tokenizer,
                tasks,
                manager=manager,
                limit=limit,
                shots=shots,
                batch_size=batch_size,
                show_progress=show_progress,
            )

    found = run(model)
    reference = {} if against is None else run(against)
    return {task: scored(result, reference.get(task)) for task, result in found.items()}
