"""Charts as inline SVG. They scale with the page; text is HTML and keeps its size on every screen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mezzotint.cli.page.markup import Markup, tag, text

Format = Callable[[float], str]
_SHADES = (0, 1, 3, 4, 5, 2)  # of lines; the third is a quiet one, for what is not the point


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of a heat map: what it stands for, and how dark it is, from 0 to 1; None is an outline."""

    title: str
    tone: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A named line; ``dots`` marks the points and leaves the line out."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Whisker:
    """A value with its interval."""

    name: str
    value: float
    low: float
    high: float


def heat_map(
    rows: Mapping[str, Sequence[Cell | None]], *, label: str, legend: tuple[str, str], below: str = "block"
) -> Markup:
    """Rows of cells, light to dark; None is an empty place.

    Args:
        rows: by name; all of one length.
        label: for readers that do not see it.
        legend: what the lightest and the darkest tone stand for.
        below: what the columns are.
    """
    columns = max(map(len, rows.values()))
    drawn: list[Markup] = []
    for y, cells in enumerate(rows.values()):
        for x, cell in enumerate(cells):
            if cell is not None:
                tone = {"class_": "kept"} if cell.tone is None else {"style": f"--t:{cell.tone:.3f}"}
                place = {"x": f"{x + 0.04:g}", "y": f"{y + 0.05:g}", "width": "0.92", "height": "0.9"}
                drawn.append(tag("rect", tag("title", text(cell.title)), **place, **tone))
    box = {"viewBox": f"0 0 {columns} {len(rows)}", "preserveAspectRatio": "none"}
    picture = tag("svg", *drawn, **box, role="img", aria_label=label, style=f"--rows:{len(rows)}")
    names = tag("div", *(tag("span", text(name)) for name in rows), class_="names", style=f"--rows:{len(rows)}")
    ends = tag("div", tag("span", text(f"{below} 0")), tag("span", text(columns - 1)), class_="x")
    scale = tag("div", tag("span", text(legend[0])), tag("i"), tag("span", text(legend[1])), class_="scale")
    area = tag("div", picture, ends, class_="area")
    return tag("figure", tag("div", names, area, class_="heat", style=f"--columns:{columns}"), scale)


def line_chart(
    lines: Sequence[Line], *, label: str, x: str, y: str, x_format: Format, y_format: Format, log: bool = False
) -> Markup:
    """Lines over a common axis that starts at zero, or a logarithmic one.

    Args:
        lines: each with at least one point.
        label: for readers that do not see it.
        x: what the horizontal axis is.
        y: what the vertical axis is.
        x_format: writes a number of the horizontal axis.
        y_format: writes a number of the vertical axis.
        log: of the vertical axis.
    """
    values = [point[1] for line in lines for point in line.points]
    places = [point[0] for line in lines for point in line.points]
    if log and min(values) > 0:
        ticks = _decades(min(values), max(values))
        low, high = math.log(min(ticks)), math.log(max(ticks))

        def up(value: float) -> float:
            return (math.log(value) - low) / (high - low)
    else:
        ticks = _round_steps(max(values))

        def up(value: float) -> float:
            return value / ticks[-1]

    left, right = min(places), max(places)
    margin = 0.02 * (right - left) or 0.5

    def across(place: float) -> float:
        return (place - left + margin) / (right - left + 2 * margin)

    grid = "".join(f"M0 {1000 - 1000 * up(tick):.1f}H1000" for tick in ticks)
    drawn = [tag("path", d=grid, class_="grid")]
    for index, line in enumerate(lines):
        points = [(1000 * across(px), 1000 - 1000 * up(py), px, py) for px, py in line.points]
        shade = f"line c{_SHADES[index % 6]}"
        if not line.dots:
            drawn.append(tag("path", d="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b, _, _ in points), class_=shade))
        for a, b, px, py in points:
            title = tag("title", text(f"{line.name}: {y_format(py)} at {x} {x_format(px)}"))
            drawn.append(tag("path", title, d=f"M{a:.1f} {b:.1f}h0", class_=f"dot {shade}"))
    box = {"viewBox": "0 0 1000 1000", "preserveAspectRatio": "none"}
    picture = tag("svg", *drawn, **box, role="img", aria_label=label)
    marks = [tag("span", text(y_format(tick)), style=f"bottom:{100 * up(tick):.1f}%") for tick in ticks]
    ends = tag("div", tag("span", text(f"{x} {x_format(left)}")), tag("span", text(x_format(right))), class_="x")
    plot = tag("div", tag("div", *marks, class_="y"), tag("div", picture, ends, class_="area"), class_="plot")
    return tag("figure", tag("figcaption", text(y), _key([line.name for line in lines])), plot)


def bars(
    rows: Sequence[tuple[str, Sequence[tuple[str, float]], str]], *, label: str, parts: Sequence[str] = ()
) -> Markup:
    """Horizontal bars on one scale, each made of parts.

    Args:
        rows: name, parts with their values, and what is written behind.
        label: for readers that do not see it.
        parts: names of the parts, for the key.
    """
    longest = max(sum(value for _, value in inside) for _, inside, _ in rows) or 1.0
    shown: list[Markup] = []
    for name, inside, behind in rows:
        drawn: list[Markup] = []
        start = 0.0
        for part, value in inside:
            shade = parts.index(part) % 6 if part in parts else 0
            place = {"x": f"{1000 * start / longest:.1f}", "width": f"{1000 * value / longest:.1f}", "height": "10"}
            drawn.append(tag("rect", tag("title", text(part)), **place, class_=f"c{shade}"))
            start += value
        box = {"viewBox": "0 0 1000 10", "preserveAspectRatio": "none"}
        shown.append(tag("span", text(name)))
        shown.append(tag("svg", *drawn, **box, role="img", aria_label=f"{label}: {name} {behind}"))
        shown.append(tag("span", text(behind), class_="n"))
    key = _key(parts, range(6))
    return tag("figure", tag("figcaption", key) if parts else "", tag("div", *shown, class_="bars"))


def whiskers(rows: Sequence[Whisker], *, label: str, value_format: Format) -> Markup:
    """Values with their intervals on one scale, around zero where they lie on both sides of it."""
    low, high = min(0.0, *(row.low for row in rows)), max(0.0, *(row.high for row in rows))
    margin = 0.04 * (high - low) or 1.0

    def across(value: float) -> float:
        return 1000 * (value - low + margin) / (high - low + 2 * margin)

    shown: list[Markup] = []
    for row in rows:
        reach = f"M{across(row.low):.1f} 5H{across(row.high):.1f}"
        zero = f"M{across(0.0):.1f} 0V10"
        box = {"viewBox": "0 0 1000 10", "preserveAspectRatio": "none"}
        told = f"{value_format(row.value)} [{value_format(row.low)}, {value_format(row.high)}]"
        inside = [
            tag("path", d=zero, class_="grid"),
            tag("path", d=reach, class_="line c0 reach"),
            tag("path", tag("title", text(told)), d=f"M{across(row.value):.1f} 5h0", class_="dot line c0"),
        ]
        shown.append(tag("span", text(row.name)))
        shown.append(tag("svg", *inside, **box, role="img", aria_label=f"{label}: {row.name} {told}"))
        shown.append(tag("span", text(told), class_="n"))
    return tag("figure", tag("div", *shown, class_="bars whiskers"))


def _key(names: Sequence[str], shades: Sequence[int] = _SHADES) -> Markup:
    if len(names) < 2:
        return ""
    shown = [tag("li", tag("i", class_=f"c{shades[index % 6]}"), text(name)) for index, name in enumerate(names)]
    return tag("ul", *shown, class_="key")


def _round_steps(highest: float) -> list[float]:
    """Three to six round numbers from zero to at least the highest."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(power * part for part in (0.2, 0.25, 0.5, 1.0, 2.0) if highest / (power * part) <= 5)
    return [step * index for index in range(math.ceil(highest / step - 1e-9) + 1)]


def _decades(lowest: float, highest: float) -> list[float]:
    """1, 2 and 5 times the powers of ten around the values; powers only where they are many."""
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    parts = (1.0, 2.0, 5.0) if last - first <= 2 else (1.0,)
    ticks = [part * 10.0**power for power in range(first, last + 1) for part in parts]
    below = max((tick for tick in ticks if tick <= lowest), default=ticks[0])
    above = min((tick for tick in ticks if tick >= highest), default=ticks[-1])
    kept = [tick for tick in ticks if below <= tick <= above]
    return kept if len(kept) > 1 else [kept[0], kept[0] * 10]
