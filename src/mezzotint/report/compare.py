"""Compares quantized folders, with confidence intervals of their differences."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mezzotint.errors import ConfigError
from mezzotint.evaluation import Difference, difference
from mezzotint.report.report import read_report
from mezzotint.report.results import items_of, read_results


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One folder of a comparison.

    Attributes:
        name: of the folder, with as much of its path as tells it from the others.
        report: its ``mezzotint.json``.
        results: what was measured of it.
    """

    name: str
    report: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def drift(self) -> list[float]:
        """Held-out error behind every block that was run."""
        errors = [block["relative_error"] for block in self.report["blocks"]]
        return [error for error in errors if error is not None]

    def figures(self) -> dict[str, Any]:
        """What the table and JSON say of it."""
        report = self.report
        texts = {
            name: {key: value for key, value in text.items() if key != "by_window"}
            for name, text in self.results["texts"].items()
        }
        tasks = {
            name: {key: value for key, value in task.items() if key != "items"}
            for name, task in self.results["tasks"].items()
        }
        names = ("model", "bits_per_weight", "bits_per_weight_without_side_data", "output_bytes", "seconds")
        return {
            "name": self.name,
            "recipe": report["recipe"]["name"],
            "format": report["plan"]["format"],
            **{name: report[name] for name in names},
            "peak_rss_bytes": report["peak_rss_bytes"],
            "last_block_error": self.drift[-1] if self.drift else None,
            "texts": texts,
            "tasks": tasks,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A measure of two folders on the same windows or items: ``first`` minus ``second``."""

    measure: str
    on: str
    first: str
    second: str
    difference: Difference

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "clear": self.difference.clear}


def compare(folders: Sequence[Path]) -> tuple[tuple[Compared, ...], tuple[Pair, ...]]:
    """Reports and kept results of folders, and every folder against the first where they were measured on the same.

    Args:
        folders: two or more that mezzotint made.

    Raises:
        ConfigError: fewer than two.
        ModelError: a folder has no report.
    """
    if len(folders) < 2:
        raise ConfigError(f"compare needs at least 2 folders, not {len(folders)}. Give two or more.")
    found = tuple(
        Compared(name=name, report=read_report(folder), results=read_results(folder))
        for name, folder in zip(_names(folders), folders, strict=True)
    )
    pairs = [pair for other in found[1:] for pair in (*_texts(other, found[0]), *_tasks(other, found[0]))]
    return found, tuple(pairs)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"{str(folders[0])!r} is given twice. Give different folders.")


def _texts(first: Compared, second: Compared) -> list[Pair]:
    pairs = []
    for text, own in first.results["texts"].items():
        other = second.results["texts"].get(text)
        if other is None or own["digest"] != other["digest"] or own["windows"] < 2:
            continue
        measures = [("log perplexity", "nll")]
        if own["kl_nats"] is not None and other["kl_nats"] is not None and own["against"] == other["against"]:
            measures.insert(0, ("KL, nats/token", "kl"))
        for measure, column in measures:
            windows = own["by_window"], other["by_window"]
            found = difference(windows[0][column], windows[1][column], windows[0]["tokens"])
            pairs.append(Pair(measure=measure, on=text, first=first.name, second=second.name, difference=found))
    return pairs


def _tasks(first: Compared, second: Compared) -> list[Pair]:
    pairs = []
    for task, own in first.results["tasks"].items():
        other = second.results["tasks"].get(task)
        if other is None or own["digest"] != other["digest"]:
            continue
        for metric, items in own["items"].items():
            others = other["items"].get(metric)
            if others is not None and len(items) > 1:
                found = difference(items_of(items), items_of(others))
                pairs.append(Pair(measure=metric, on=task, first=first.name, second=second.name, difference=found))
    return pairs
