"""Walks model types through every step; from the root of the repository: PYTHONPATH=tests python -m zoo [TYPE ...]."""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from zoo.models import make, names
from zoo.page import filled
from zoo.walk import OK, STEPS, Outcome, walk


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 if a step of a model crashed or gave something that was not meant."""
    options = _parser().parse_args(arguments)
    unknown = {*options.types} - {*names()} | {*options.steps} - {*STEPS}
    if unknown:
        raise SystemExit(
            f"unknown: {', '.join(sorted(unknown))}. Types: {', '.join(names())}. Steps: {', '.join(STEPS)}."
        )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    outcomes = {} if options.read is None else _read(options.read)
    types = options.types or ([] if options.read else names())
    for name in types:
        for outcome in walked(name, options.steps):
            outcomes[outcome.name, outcome.step] = outcome
            if outcome.status != OK:
                _tell(line_of(outcome))
        if options.json is not None:
            _write(options.json, list(outcomes.values()))
    _tell(summary(list(outcomes.values())))
    if options.update is not None:
        page = options.update.read_text(encoding="utf-8")
        options.update.write_text(filled(page, list(outcomes.values())), encoding="utf-8")
    return int(any(outcome.status not in (OK, "REFUSED") for outcome in outcomes.values()))


def walked(name: str, steps: Sequence[str]) -> list[Outcome]:
    """Make a model and walk it."""
    place = Path(tempfile.mkdtemp(prefix="zoo-"))
    try:
        return walk(name, make(name, place / name), place / "results", steps)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def line_of(outcome: Outcome) -> str:
    """What stopped a step, in a line."""
    return f"{outcome.name}: {outcome.step}: {outcome.status} in {outcome.stage}: {outcome.what} [{outcome.where}]"


def summary(outcomes: Sequence[Outcome]) -> str:
    """How often every step ended how."""
    lines = [f"{len({outcome.name for outcome in outcomes})} models"]
    for step in STEPS:
        counts = Counter(outcome.status for outcome in outcomes if outcome.step == step)
        if counts:
            lines.append(f"{step}: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    parser.add_argument(
        "types", nargs="*", metavar="TYPE", help="of a model, or a variant; all of them if none is given"
    )
    parser.add_argument("--steps", nargs="+", default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--read", type=Path, metavar="FILE", help="take earlier results; run only the given types again"
    )
    parser.add_argument(
        "--update", type=Path, metavar="PAGE", help="fill the table between the marks of docs/models.md"
    )
    return parser


def _read(path: Path) -> dict[tuple[str, str], Outcome]:
    outcomes = [Outcome(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    return {(outcome.name, outcome.step): outcome for outcome in outcomes}


def _write(path: Path, outcomes: Sequence[Outcome]) -> None:
    path.write_text(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1), encoding="utf-8")


def _tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
