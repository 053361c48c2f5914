"""The pages: whole, self-contained, and with what they should show; in a browser, as wide as the screen."""

import html
import json
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mezzotint.cli.page import comparison, single, write_page
from mezzotint.cli.page.charts import Line, line_chart
from mezzotint.cli.page.markup import seconds
from mezzotint.cli.page.one import frontier, role_of
from mezzotint.errors import WriteError
from mezzotint.report.compare import compare
from mezzotint.report.report import read_report
from mezzotint.report.results import read_results
from runs import HELD_OUT, TEXT, TINY_LLAMA

Run = Callable[..., Any]
VOID = {"meta", "link"}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SMALL = ("--calibration", str(TEXT), "--samples", "4", "--seqlen", "32", "--device", "cpu")


class Reader(HTMLParser):
    """Checks that every element is closed in its turn, and keeps text, titles and links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from typer.testing import CliRunner

    from mezzotint.cli.app import app

    made = tmp_path_factory.mktemp("pages")
    out = []
    for name, recipe in (("rtn & co", "rtn"), ("gptq", "gptq")):
        folder = made / name
        keep = ("--keep", "*.0.mlp.down_proj")
        run = CliRunner().invoke(
            app, ["quantize", str(TINY_LLAMA), "--out", str(folder), "--recipe", recipe, "--bits", "3", *SMALL, *keep]
        )
        assert run.exit_code == 0, run.stderr
        measured = ("--text", str(HELD_OUT), "--seqlen", "64", "--windows", "4", "--device", "cpu", "--keep-results")
        run = CliRunner().invoke(app, ["evaluate", str(folder), "--against", str(TINY_LLAMA), *measured])
        assert run.exit_code == 0, run.stderr
        out.append(folder)
    return out


@pytest.fixture(scope="module")
def page(folders: list[Path]) -> str:
    return single("gptq", read_report(folders[1]), read_results(folders[1]), None, ())


def test_one_folder(page: str, folders: list[Path]) -> None:
    read = Reader(page)
    report, kept = read_report(folders[1]), read_results(folders[1])
    assert read.links == ["data:,"]
    assert "script" not in read.tags
    for title in ("Size", "Evaluation", "Bits", "Errors", "Error after each block", "Time and memory", "Reproduce"):
        assert f"<h2>{title}</h2>" in page, title
    for part in (
        f"{report['bits_per_weight']:.2f}",
        report["command"],
        f"{kept['texts'][HELD_OUT.name]['kl_nats']:.4f}",
        *(linear["name"] for linear in report["linears"]),
        "model.layers.0.mlp.down_proj: not quantized",
        "prefers-color-scheme: dark",
    ):
        assert part in html.unescape(page), part
    # every matrix of every block has a cell in both maps, and what is kept in one
    assert read.tags.count("rect") >= 20 + 1 + 20
    assert "Size against loss" not in page
    assert "Generated text" not in page


def test_nothing_to_show_is_not_shown(folders: list[Path]) -> None:
    bare = single("rtn & co", read_report(folders[0]), {"texts": {}, "tasks": {}}, None, ())
    Reader(bare)
    assert "rtn &amp; co" in bare
    assert "rtn & co" not in bare.replace("rtn &amp; co", "")
    for title in ("Evaluation", "Error after each block", "Decisions"):
        assert f"<h2>{title}</h2>" not in bare


def test_the_frontier_of_an_allocation() -> None:
    allocation = {
        "frontier": [{"bytes": n * 2**20, "predicted_kl_nats": 4.0**-n, "kind": "allocated"} for n in (1, 2, 3)],
        "chosen": {"bytes": 2 * 2**20, "predicted_kl_nats": 0.07, "kind": "allocated"},
        "held_out_kl_nats": {"allocated": 0.08, "uniform": 0.1},
        "kept": "allocated",
    }
    shown = frontier(allocation)
    Reader(shown)
    assert shown.count("allocated: ") == 3
    assert "chosen: 0.07 at size 2 MiB" in shown
    assert "KL allocated 0.0800, uniform 0.1000. The result with allocated bits was kept" in shown
    assert frontier(None) == ""


def test_several_folders(folders: list[Path]) -> None:
    found, pairs = compare(folders)
    shown = comparison(found, pairs)
    read = Reader(shown)
    assert read.links == ["data:,"]
    kl = next(pair for pair in pairs if pair.measure.startswith("KL"))
    assert f"{kl.difference.mean:+.4f}".replace("-", "−") in read.text
    assert all(one.report["command"] in read.text for one in found)


def test_on_the_command_line(mezzotint: Run, folders: list[Path], tmp_path: Path) -> None:
    one, many = tmp_path / "one.html", tmp_path / "many.html"
    prompt = ("--prompt", "The <wheel> turns", "--against", TINY_LLAMA, "--device", "cpu")
    answer = mezzotint("inspect", folders[1], "--html", one, *prompt, "--json")
    assert answer.last_object == read_report(folders[1])
    read = Reader(one.read_text(encoding="utf-8"))
    assert read.text.count("The <wheel> turns") == 2
    assert "Generated text" in read.text
    answer = mezzotint("compare", *folders, "--html", many, "--json")
    assert [folder["name"] for folder in answer.last_object["folders"]] == ["rtn & co", "gptq"]
    assert {pair["measure"] for pair in answer.last_object["differences"]} == {"KL, nats/token", "log perplexity"}
    Reader(many.read_text(encoding="utf-8"))
    shown = mezzotint("compare", *folders)
    assert "differences over the same windows" in shown.stdout
    assert mezzotint("compare", folders[0]).code == 2
    assert "has nothing to measure" in mezzotint("evaluate", folders[0]).stderr


def test_a_page_that_cannot_be_written(tmp_path: Path, mezzotint: Run, folders: list[Path]) -> None:
    with pytest.raises(WriteError, match="Give --html another path"):
        write_page(tmp_path, "")
    for path, part in ((tmp_path / "no" / "page.html", "does not exist"), (tmp_path / "page.txt", "must end in .html")):
        for command in (("inspect", folders[0]), ("compare", *folders)):
            answer = mezzotint(*command, "--html", path)
            assert (answer.code, answer.stdout) == (2, "")
            assert part in answer.stderr


def test_options_that_would_do_nothing(mezzotint: Run, folders: list[Path]) -> None:
    for command, part in (
        (("inspect", folders[0], "--prompt", "x"), "--prompt does nothing without --html"),
        (("evaluate", folders[0], "--text", HELD_OUT, "--limit", "3"), "--limit does nothing without --tasks"),
        (("evaluate", folders[0], "--tasks", "piqa", "--windows", "3"), "--windows does nothing without --text"),
        (("evaluate", folders[0], "--text", "x.txt", "--task-path", "x"), "--task-path does nothing without --tasks"),
        (
            ("evaluate", "some/name", "--text", HELD_OUT, "--keep-results"),
            "--keep-results cannot write into 'some/name'",
        ),
    ):
        answer = mezzotint(*command)
        assert answer.code == 2
        assert part in answer.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("model.layers.11.mlp.experts.gate_up_proj[7]", (11, "mlp.experts.gate_up_proj")),
        ("transformer.h.0.attn.c_attn", (0, "attn.c_attn")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_roles(name: str, expected: tuple[int | None, str]) -> None:
    assert role_of(name) == expected


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-9], [0.37, 12.0], [1.0, 1.0]])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_can_be_drawn(values: list[float], log: bool) -> None:
    line = Line(name="x", points=[(float(x), y) for x, y in enumerate(values)])
    drawn = line_chart([line], label="l", x="x", y="y", x_format=str, y_format=str, log=log)
    Reader(drawn)
    assert "nan" not in drawn
    for place in drawn.split("bottom:")[1:]:
        assert 0 <= float(place.split("%")[0]) <= 100


def test_times_for_people() -> None:
    assert [seconds(t) for t in (0.25, 9.0, 41.3, 90.0, 5400.0)] == ["0.25 s", "9 s", "41 s", "1.5 min", "1.5 h"]


PROBE = """<!doctype html><meta name="color-scheme" content="light dark"><body><iframe id="f" style="width:{width}px;\
height:900px;border:0" src="page.html"></iframe><script>f.onload = () => {{
const d = f.contentDocument, style = f.contentWindow.getComputedStyle(d.documentElement);
const low = [...d.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height < 3).length;
document.title = JSON.stringify({{wide: d.documentElement.scrollWidth, back: style.backgroundColor, ink: style.color,
 requests: f.contentWindow.performance.getEntriesByType('resource').length, low}})}}</script>"""


@pytest.mark.engine
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 820, 1280])
def test_in_a_browser(page: str, tmp_path: Path, width: int, dark: bool) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "probe.html").write_text(PROBE.format(width=width), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=5000", "--window-size=1400,1000", "--dump-dom", (tmp_path / "probe.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = json.loads(html.unescape(done.stdout.split("<title>")[1].split("</title>")[0]))
    assert found["wide"] <= width, "the page does not scroll sideways"
    assert found["requests"] == 0
    assert found["low"] == 0, "no picture has lost its height"
    back, ink = (sum(map(int, found[name][4:-1].split(","))) for name in ("back", "ink"))
    assert (back < ink) == dark
    assert abs(back - ink) > 3 * 150, "text stands out from the page"
