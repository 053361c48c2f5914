"""The report of a quantized folder on a terminal: one line per block, or one per matrix."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mezzotint.cli.names import Name, print_table
from mezzotint.cli.page.one import role_of, short_role
from mezzotint.cli.tables import size

Linear = Mapping[str, Any]
_ERRORS = {  # field of the report -> what it is; the first that was measured is shown
    "h_error_held_out": "output error on held-out text",
    "h_error": "output error on calibration text",
    "weight_error": "weight error",
}
_TONES = ("green", "yellow", "dark_orange", "red")


def show_report(report: Mapping[str, Any], console: Console, *, every: bool = False) -> None:
    """Bits and errors of a finished folder.

    Args:
        report: its ``mezzotint.json``.
        console: where to print.
        every: one line per matrix; else one per block.
    """
    title = f"{report['model']}: recipe {report['recipe']['name']}, format {report['plan']['format']}"
    if every:
        _show_matrices(report["linears"], title, console)
    else:
        weights = {one["name"]: math.prod(one["shape"]) for one in report["plan"]["linears"]}
        _show_blocks([{**one, "weights": weights[one["name"]]} for one in report["linears"]], title, console)
    console.print(
        f"{report['bits_per_weight']:.3f} bits per weight, {size(report['output_bytes'])}. Quantized in "
        f"{report['seconds']:.1f} s with at most {size(report['peak_rss_bytes'])} of memory."
    )
    if not every:
        console.print("--all lists every matrix; --html FILE writes the report as a page.")


def _show_matrices(linears: Sequence[Linear], title: str, console: Console) -> None:
    table = Table(title=title)
    table.add_column("matrix")
    for column in ("bits", "weight error", "output error", "held-out error"):
        table.add_column(column, justify="right", no_wrap=True)
    for linear in linears:
        errors = (linear["weight_error"], linear["h_error"], linear["h_error_held_out"])
        shown = ["-" if e is None else f"{e:.2e}" for e in errors]
        table.add_row(Name(linear["name"]), f"{linear['bits_per_weight']:.3f}", *shown)
    print_table(table, console)


def _show_blocks(linears: Sequence[Linear], title: str, console: Console) -> None:
    """A column per role where the terminal has room for them; else each block's mean and its worst matrix."""
    field = next((f for f in _ERRORS if any(linear[f] is not None for linear in linears)), "weight_error")
    blocks: dict[int, list[Linear]] = {}
    outside: list[Linear] = []
    for linear in linears:
        block, _ = role_of(linear["name"])
        (outside if block is None else blocks.setdefault(block, [])).append(linear)
    if blocks:
        mixed = len({round(linear["bits_per_weight"], 1) for linear in linears}) > 1
        titles = {field: _ERRORS[field]}
        if mixed:  # one width in all matrices needs no table
            titles = {"bits_per_weight": "stored bits per weight", **titles}
        for shown, what in titles.items():
            heading = f"{title}\n{what}"
            table = _by_role(blocks, shown, heading)
            if Measurement.get(console, console.options.update(width=10_000), table).maximum > console.width:
                table = _worst_only(blocks, field, heading)
                if shown != field:
                    continue  # the other table has the bits of each block
            print_table(table, console)
    for linear in outside:
        bits, error = linear["bits_per_weight"], linear[field]
        told = "" if error is None else f", {_ERRORS[field]} {_percent(error)}"
        console.print(f"{linear['name']}: {bits:.2f} bits{told}", highlight=False, soft_wrap=True)


def _by_role(blocks: Mapping[int, Sequence[Linear]], field: str, title: str) -> Table:
    """Experts of a block share a role: their mean is shown."""
    roles = list(dict.fromkeys(role_of(linear["name"])[1] for members in blocks.values() for linear in members))
    table = Table(title=title)
    for column in ("block", "bits", *map(short_role, roles)):
        table.add_column(column, justify="right", no_wrap=True)
    means = {
        index: [_mean([one for one in members if role_of(one["name"])[1] == role], field) for role in roles]
        for index, members in blocks.items()
    }
    logs = sorted(math.log(mean) for row in means.values() for mean in row if mean)
    for index, row in means.items():
        bits = f"{_block_bits(blocks[index]):.2f}"
        table.add_row(str(index), bits, *(_cell(mean, field, logs) for mean in row))
    return table


def _cell(mean: float | None, field: str, logs: Sequence[float]) -> Text:
    if mean is None:
        return Text("-")
    shown = f"{mean:.2f}" if field == "bits_per_weight" else _percent(mean)
    if not mean:
        return Text(shown)
    low, high = logs[len(logs) // 20], logs[-1 - len(logs) // 20]  # a few outliers must not take all colours
    place = (math.log(mean) - low) / (high - low or 1.0)
    return Text(shown, style=_TONES[min(len(_TONES) - 1, max(0, int(place * len(_TONES))))])


def _worst_only(blocks: Mapping[int, Sequence[Linear]], field: str, title: str) -> Table:
    table = Table(title=title)
    for column in ("block", "bits", "mean", "worst"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("worst matrix")
    for index, members in blocks.items():
        measured = [linear for linear in members if linear[field] is not None]
        mean, worst = _mean(members, field), max(measured, key=lambda linear: linear[field], default=None)
        shown = ("-", "-", "") if mean is None or worst is None else (
            _percent(mean), _percent(worst[field]), Name(role_of(worst["name"])[1])
        )  # fmt: skip
        table.add_row(str(index), f"{_block_bits(members):.2f}", *shown)
    return table


def _mean(members: Sequence[Linear], field: str) -> float | None:
    errors = [linear[field] for linear in members if linear[field] is not None]
    return math.fsum(errors) / len(errors) if errors else None


def _block_bits(members: Sequence[Linear]) -> float:
    """Stored bits per weight of all these matrices."""
    weights = sum(linear["weights"] for linear in members)
    return math.fsum(linear["bits_per_weight"] * linear["weights"] for linear in members) / weights


def _percent(value: float) -> str:
    """Three characters and the sign, so that seven roles fit into 80 columns."""
    percent = 100 * value
    return f"{percent:.0f}%" if percent >= 9.95 else f"{percent:.1f}%" if percent >= 0.095 else f"{percent:.2g}%"
