"""The table of model types in docs/models.md."""

import re
from collections.abc import Mapping, Sequence

from zoo.models import type_of
from zoo.tables import EXCLUDED
from zoo.walk import OK, QUANTIZING, REFUSED, Outcome

BEGIN, END = "<!-- zoo -->", "<!-- /zoo -->"
COLUMNS = {
    "rtn": "`rtn`, 8 bits",
    "default": "`default`, 4 bits",
    "best": "`best`, 4 bits",
    "self": "sampled text",
    "own": "own format",
}
LONGEST = 160
ADDRESS = re.compile(r"\d{9,}")
PATH = re.compile(r"\w+(?:\.[\w\[\]]+){2,}")  # of a module or matrix
SENTENCE = re.compile(r"(?<=[\w)'])\.\s+(?=[A-Z])")


class _Notes:
    """Numbered reasons, each once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """Of the first sentence of a message, without names of layers."""
        general = ADDRESS.sub("…", PATH.sub("…", SENTENCE.split(text)[0])).rstrip(".")
        short = general if len(general) <= LONGEST else general[:LONGEST].rsplit(" ", 1)[0] + " …"
        return self._numbers.setdefault(short, len(self._numbers) + 1)

    def lines(self) -> list[str]:
        return [f"{number}. {_escaped(text)}" for text, number in self._numbers.items()]


def filled(page: str, outcomes: Sequence[Outcome]) -> str:
    """The page with the table of these outcomes between the marks."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"the page has no {BEGIN} and {END}; write these marks where the table belongs.")
    return f"{head}{BEGIN}\n{table(outcomes)}\n\n{END}{tail}"


def table(outcomes: Sequence[Outcome]) -> str:
    """One row a model, the reasons, and the types that were left out."""
    by_name: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        by_name.setdefault(outcome.name, {})[outcome.step] = outcome
    notes = _Notes()
    rows = [_row(name, steps, notes) for name, steps in sorted(by_name.items())]
    titles = ["model type", "quantized", *(COLUMNS[step] for step in QUANTIZING)]
    parts = [_counts(by_name), "\n".join([_joined(titles), _joined(["---"] * len(titles)), *rows])]
    if notes.lines():
        parts.append("Reasons, with … for the name of a layer:\n\n" + "\n".join(notes.lines()))
    return "\n\n".join([*parts, _excluded()])


def _counts(by_name: Mapping[str, Mapping[str, Outcome]]) -> str:
    count = sum(steps["default"].status == OK for steps in by_name.values() if "default" in steps)
    return f"{count} of {len(by_name)} models pass `default` at 4 bits."


def _row(name: str, steps: Mapping[str, Outcome], notes: _Notes) -> str:
    title = f"`{name}`" if type_of(name) == name else f"`{name}` (of `{type_of(name)}`)"
    shares = [one.share for one in steps.values() if one.share is not None]
    share = f"{100 * min(shares):.0f} %" if shares else "–"
    return _joined([title, share, *(_cell(steps.get(step), notes) for step in QUANTIZING)])


def _cell(outcome: Outcome | None, notes: _Notes) -> str:
    if outcome is None:
        return "not run"
    if outcome.status == OK:
        numbers = sorted({notes.number(text) for text in outcome.stepped_down})
        return f"simpler ({', '.join(map(str, numbers))})" if numbers else "yes"
    word = "no" if outcome.status == REFUSED else "fails"
    return f"{word} ({notes.number(outcome.what)})"


def _excluded() -> str:
    types: dict[str, list[str]] = {}
    for name, reason in sorted(EXCLUDED.items()):
        types.setdefault(reason, []).append(f"`{name}`")
    lines = [f"* {', '.join(names)}: {reason}." for reason, names in types.items()]
    return "Types of transformers that are not in the table:\n\n" + "\n".join(lines)


def _joined(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Plain text in Markdown."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
