"""Tables whose names are never broken across lines."""

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_LEAST = 16  # columns that a shortened name keeps; its end tells it apart


class Name:
    """A cell that shows a name on one line; where there is no room, it is shortened from the left."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(len(self._name), _LEAST), len(self._name))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(shorten(self._name, options.max_width), no_wrap=True, overflow="crop", end="")


def shorten(name: str, width: int) -> str:
    """The end of a name that is too long.

    Example:
        >>> shorten("model.layers.3.mlp.down_proj", 16)
        '….mlp.down_proj'
    """
    if len(name) <= width:
        return name
    end = name[len(name) - width + 1 :]
    start = end.find(".")
    return "…" + (end[start:] if start > 0 and len(end) - start > width // 2 else end)


def print_table(table: Table, console: Console) -> None:
    """Print a table; into a file or a pipe as wide as it needs to be."""
    needed = Measurement.get(console, console.options.update(width=10_000), table).maximum
    before = console.width
    if not console.is_terminal and needed > before:
        console.width = needed
    console.print(table)
    if console.width != before:
        console.width = before
