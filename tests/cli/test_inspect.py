"""`mezzotint inspect` on a terminal: one line per block, names in one piece."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mezzotint.cli.inspected import show_report
from mezzotint.cli.names import shorten
from mezzotint.report.report import read_report
from runs import TINY_LLAMA, quantized

ROLES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("inspect") / "out"
    quantized(TINY_LLAMA, out, "rtn", bits=4)
    return read_report(out)


def shown(report: dict[str, Any], *, width: int, terminal: bool = True, every: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    show_report(report, console, every=every)
    return file.getvalue()


def lines_of_table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_one_line_per_block(report: dict[str, Any]) -> None:
    text = shown(report, width=80)
    rows = lines_of_table(text)
    assert [row[0] for row in rows] == ["0", "1", "2"]
    (head,) = [line for line in text.splitlines() if line.startswith("┃")]
    assert [cell.strip() for cell in head.split("┃")[1:-1]] == [
        "block", "bits", "q", "k", "v", "o", "gate", "up", "down",
    ]  # fmt: skip
    assert all(cell.endswith("%") for row in rows for cell in row[2:])
    assert all(4 < float(row[1]) < 5 for row in rows)
    assert "model.layers" not in text


def test_mixed_bits_have_a_table_of_their_own(report: dict[str, Any]) -> None:
    linears = [{**one, "bits_per_weight": 2.0 + ("down" in one["name"])} for one in report["linears"]]
    rows = lines_of_table(shown({**report, "linears": linears}, width=80))
    assert [row[0] for row in rows] == ["0", "1", "2"] * 2
    assert {tuple(row[2:]) for row in rows[:3]} == {("2.00",) * 6 + ("3.00",)}
    assert all(cell.endswith("%") for row in rows[3:] for cell in row[2:])


def test_a_narrow_terminal_shows_the_worst_matrix_of_each_block(report: dict[str, Any]) -> None:
    rows = lines_of_table(shown(report, width=60))
    assert [row[0] for row in rows] == ["0", "1", "2"]
    names = {one["name"].split(".", 3)[3] for one in report["linears"]}
    assert all(row[4] in names for row in rows)
    assert all(float(row[2][:-1]) <= float(row[3][:-1]) for row in rows)


def test_all_lists_every_matrix_on_one_line(report: dict[str, Any]) -> None:
    for width, terminal in ((120, True), (40, False)):
        rows = lines_of_table(shown(report, width=width, terminal=terminal, every=True))
        assert [row[0] for row in rows] == [one["name"] for one in report["linears"]]


def test_names_that_do_not_fit_lose_their_start(report: dict[str, Any]) -> None:
    rows = lines_of_table(shown(report, width=75, every=True))
    assert len(rows) == len(report["linears"])
    for row, one in zip(rows, report["linears"], strict=True):
        assert row[0] == one["name"] or (row[0].startswith("…") and one["name"].endswith(row[0][1:]))
    assert any(row[0].startswith("…") for row in rows)


def test_matrices_outside_blocks_are_named(report: dict[str, Any]) -> None:
    head = {**report["linears"][0], "name": "lm_head"}
    planned = [*report["plan"]["linears"], {**report["plan"]["linears"][0], "name": "lm_head"}]
    text = shown(
        {**report, "linears": [*report["linears"], head], "plan": {**report["plan"], "linears": planned}}, width=80
    )
    assert f"lm_head: {head['bits_per_weight']:.2f} bits" in text


def test_many_roles_fall_back_to_the_worst_matrix(report: dict[str, Any]) -> None:
    """As in a block with several kinds of attention."""
    linears, planned = [], []
    for one, plan in zip(report["linears"], report["plan"]["linears"], strict=True):
        for number in range(4):
            name = f"{one['name']}_{number}"
            linears.append({**one, "name": name})
            planned.append({**plan, "name": name})
    text = shown({**report, "linears": linears, "plan": {**report["plan"], "linears": planned}}, width=80)
    assert [row[0] for row in lines_of_table(text)] == ["0", "1", "2"]
    assert "worst matrix" in text


@pytest.mark.parametrize("width", [8, 12, 16, 20, 40])
def test_shorten(width: int) -> None:
    for name in (*(f"model.layers.11.{role}" for role in ROLES), "x" * 30, "short"):
        short = shorten(name, width)
        assert len(short) <= width
        assert short == name or name.endswith(short.removeprefix("…"))


def test_the_command(report: dict[str, Any], mezzotint: Any, tmp_path: Path) -> None:
    quantized(TINY_LLAMA, tmp_path / "out", "rtn", bits=4)
    assert "model.layers.2.mlp.down_proj" not in mezzotint("inspect", tmp_path / "out").stdout
    assert "model.layers.2.mlp.down_proj" in mezzotint("inspect", tmp_path / "out", "--all").stdout
