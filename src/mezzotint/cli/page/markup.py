"""Small pieces of HTML. Text is escaped where it enters; `Markup` is what has been."""

from collections.abc import Iterable, Sequence
from html import escape

from mezzotint.cli.tables import size as size

Markup = str


def tag(name: str, *inside: Markup, **attributes: str | float | None) -> Markup:
    """An element.

    Args:
        name: of it.
        inside: markup, not text; see `text`.
        attributes: trailing and inner underscores become nothing and hyphens (``class_``, ``aria_label``); None leaves
            one out.

    Example:
        >>> tag("p", text("1 < 2"), class_="note")
        '<p class="note">1 &lt; 2</p>'
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{shown}>{''.join(inside)}</{name}>"


def text(value: object) -> Markup:
    """Any text, escaped."""
    return escape(str(value), quote=False)


def section(title: str, *inside: Markup, note: str = "") -> Markup:
    """A part of the page with a heading, and a sentence on what is seen."""
    told = tag("p", text(note), class_="note") if note else ""
    return tag("section", tag("h2", text(title)), told, *inside)


def facts(pairs: Iterable[tuple[str, str, str]]) -> Markup:
    """Large figures: what, value, and a line below."""
    cells = [
        tag("div", tag("dt", text(what)), tag("dd", text(value), tag("small", text(below))))
        for what, value, below in pairs
    ]
    return tag("dl", *cells, class_="facts")


def table(columns: Sequence[str], rows: Iterable[Sequence[Markup]], *, left: int = 1) -> Markup:
    """A table that scrolls sideways where it is too wide.

    Args:
        columns: headings, as text.
        rows: cells, as markup.
        left: columns of words, from the first on; the others hold numbers.
    """

    def cells(kind: str, values: Sequence[Markup]) -> Markup:
        return tag("tr", *(tag(kind, v, class_=None if i < left else "n") for i, v in enumerate(values)))

    head = tag("thead", cells("th", [text(column) for column in columns]))
    body = tag("tbody", *(cells("td", row) for row in rows))
    return tag("div", tag("table", head, body), class_="wide", tabindex="0")


def code(value: str) -> Markup:
    """A block of code."""
    return tag("pre", tag("code", text(value)), tabindex="0")


def number(value: float | None, digits: int = 4, stderr: float | None = None, *, sign: bool = False) -> Markup:
    """A number with its standard error; a dash for none."""
    if value is None:
        return "–"
    shown = text(f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−"))
    return shown if stderr is None else shown + tag("small", text(f" ± {stderr:.{digits}f}"))


def seconds(value: float) -> str:
    """A time for people: ``0.4 s``, ``41 s``, ``6.9 min``, ``2.1 h``."""
    if value < 60:
        return f"{value:.2g} s"
    return f"{value / 60:.1f} min" if value < 3600 else f"{value / 3600:.1f} h"
