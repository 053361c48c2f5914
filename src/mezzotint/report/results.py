"""Saved evaluation results of a folder, for its model card, its HTML report and comparisons."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mezzotint.errors import ModelError, WriteError
from mezzotint.evaluation import Evaluation, WindowSums
from mezzotint.evaluation.tasks import TaskScore
from mezzotint.storage.files import write_json

RESULTS_NAME = "mezzotint.evaluation.json"


def read_results(folder: Path) -> dict[str, Any]:
    """``texts`` and ``tasks`` by name; both empty where nothing was kept.

    Raises:
        ModelError: the file is not readable.
    """
    path = folder / RESULTS_NAME
    if not path.is_file():
        return {"texts": {}, "tasks": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{str(path)!r} is not valid JSON ({error}). Remove it and evaluate again.") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(kind), dict) for kind in ("texts", "tasks")):
        raise ModelError(f"{str(path)!r} has no 'texts' and 'tasks'. Remove it and evaluate again.")
    return found


def keep_results(
    folder: Path, *, text: Evaluation | None = None, tasks: Mapping[str, TaskScore] | None = None, against: str | None
) -> None:
    """Add results to those of a folder; newer ones of the same text or task replace older ones.

    Args:
        folder: that was measured.
        text: what `evaluate` gave.
        tasks: what `evaluate_tasks` gave.
        against: name of the reference.

    Raises:
        WriteError: the folder cannot be written.
    """
    kept = read_results(folder)
    if text is not None:
        kept["texts"][text.text] = {**text.figures(), "against": against, "by_window": _columns(text.by_window)}
    for name, score in (tasks or {}).items():
        items = {one.metric: _written(one.items) for one in (score, *score.others) if one.items is not None}
        kept["tasks"][name] = {**score.figures(), "against": against, "items": items}
    try:
        write_json(folder / RESULTS_NAME, kept)
    except OSError as error:
        raise WriteError(
            f"cannot keep the results in {str(folder)!r}: {error.strerror}. Evaluate without --keep-results."
        ) from error


def items_of(kept: Sequence[float] | str) -> list[float]:
    """Scores of items as they were before `keep_results`."""
    return [float(score) for score in kept]


def _written(items: tuple[float, ...]) -> list[float] | str:
    """Rights and wrongs take a digit each, other scores their number."""
    return "".join(str(int(item)) for item in items) if {*items} <= {0.0, 1.0} else list(items)


def _columns(windows: Sequence[WindowSums]) -> dict[str, list[int | float]]:
    rows = [asdict(window) for window in windows]
    return {f.name: [row[f.name] for row in rows] for f in fields(WindowSums)}
