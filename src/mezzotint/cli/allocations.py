"""An allocation as tables and as a picture."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mezzotint.cli.plots import save
from mezzotint.cli.tables import size

if TYPE_CHECKING:
    from mezzotint.budgeting.allocate import Allocated, Point
    from mezzotint.planning.planned import Planned

_SHOWN = 12
_COLOURS = ("grey37", "blue", "cyan", "green", "yellow", "red")  # few bits to many


def show(found: "Allocated", planned: "Planned", console: Console) -> None:
    """The frontier, what was chosen, and the bits of every matrix."""
    table = Table(title="size against predicted loss")
    for column in ("", "bits/weight", "folder", "predicted KL, nats/token"):
        table.add_column(column, justify="right" if column else "left")
    spread = [point for point in found.points if point.kind == "allocated"]
    step = max(1, -(-len(spread) // _SHOWN))
    lines = [
        *(("allocated", p) for p in spread[::step]),
        *((_named(p), p) for p in found.points if p.kind == "uniform"),
    ]
    lines += [("chosen", found.chosen)]
    for name, point in sorted(lines, key=lambda line: line[1].bytes):
        values = f"{point.bits_per_weight:.3f}", size(point.bytes), f"{point.predicted_kl_nats:.4f}"
        table.add_row(name, *values, style="bold" if name == "chosen" else None)
    console.print(table)
    heat = Table(title="bits of a code")
    blocks, parts, bits = grid_of(planned)
    heat.add_column("block", justify="right")
    for part in parts:
        heat.add_column(part, justify="right")
    values = [b for row in bits for b in row if b is not None]
    for block, row in zip(blocks, bits, strict=True):
        heat.add_row(block, *(_cell(b, min(values), max(values)) for b in row))
    console.print(heat)
    console.print(f"predicted KL {found.chosen.predicted_kl_nats:.4f} nats per token in {size(found.chosen.bytes)}")
    if found.alike is not None:
        times = found.alike.predicted_kl_nats / found.chosen.predicted_kl_nats
        console.print(
            f"{_named(found.alike)}: {found.alike.predicted_kl_nats:.4f}, {times:.2f} times as "
            f"much, in {size(found.alike.bytes)}"
        )


def draw(found: "Allocated", planned: "Planned", path: Path) -> None:
    """The frontier and the bits of every matrix.

    Raises:
        WriteError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for kind, style in (("allocated", "-"), ("uniform", ".")):
        points = [point for point in found.points if point.kind == kind]
        left.plot([p.bytes / 1e6 for p in points], [p.predicted_kl_nats for p in points], style, label=kind)
    left.plot(found.chosen.bytes / 1e6, found.chosen.predicted_kl_nats, "o", label="chosen")
    left.set(yscale="log", xlabel="folder, MB", ylabel="predicted KL, nats per token")
    left.grid(visible=True, which="both", color="0.9")
    left.legend()
    blocks, parts, bits = grid_of(planned)
    shown = [[float("nan") if b is None else b for b in row] for row in bits]
    image = right.imshow(shown, aspect="auto", interpolation="nearest")
    right.set(ylabel="block", xticks=range(len(parts)), title="bits of a code")
    right.set_xticklabels(parts, rotation=45, ha="right")
    right.set_yticks(range(0, len(blocks), max(1, len(blocks) // 8)))
    right.set_yticklabels(blocks[:: max(1, len(blocks) // 8)])
    figure.colorbar(image, ax=right)
    save(figure, path)


def grid_of(planned: "Planned") -> tuple[list[str], list[str], list[list[float | None]]]:
    """Names of blocks, names of parts, and the bits of each part of each block; experts are averaged."""
    found: dict[str, dict[str, list[float]]] = {}
    for entry in planned.plan.entries:
        inside = re.sub(r"^.*?\.\d+\.|\.experts\.\d+|\[\d+\]", "", entry.matrix)
        block = "" if entry.block is None else str(entry.block)
        found.setdefault(block, {}).setdefault(_part(inside), []).append(float(entry.grid.bits))
    parts = list(dict.fromkeys(part for row in found.values() for part in row))
    bits = [[sum(row[p]) / len(row[p]) if p in row else None for p in parts] for row in found.values()]
    return list(found), parts, bits


def _part(inside: str) -> str:
    """``self_attn.q_proj`` -> ``q_proj``."""
    return inside.rpartition(".")[2]


def _named(point: "Point") -> str:
    return f"{point.type or f'{point.code_bits:g} bits'} everywhere"


def _cell(bits: float | None, least: float, most: float) -> Text:
    if bits is None:
        return Text("")
    place = 0 if most == least else (bits - least) / (most - least)
    return Text(f"{bits:g}", style=_COLOURS[min(len(_COLOURS) - 1, int(place * len(_COLOURS)))])
