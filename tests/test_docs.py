"""The documentation: its commands run as they stand, every other command can be parsed, its tables are the results'."""

import re
import shlex
import shutil
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from mezzotint.cli.app import app
from mezzotint.recipes.recipe import load_recipe
from runs import HELD_OUT, TEXT, TINY_LLAMA, quantized

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = [page for page in PAGES if "```run" in page.read_text(encoding="utf-8")]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the documentation gives a name to."""
    (tmp_path / "MODEL").symlink_to(TINY_LLAMA)
    shutil.copyfile(TEXT, tmp_path / "text.txt")
    shutil.copyfile(HELD_OUT, tmp_path / "other.txt")
    shutil.copyfile(ROOT / "examples" / "own_recipe.yaml", tmp_path / "own_recipe.yaml")
    for name in ("DIR", "DIR2"):
        quantized(TINY_LLAMA, tmp_path / name, "rtn", bits=4 if name == "DIR" else 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(block: str) -> list[list[str]]:
    """Words of every line that starts with our name; what stands behind two spaces explains it."""
    lines = [re.split(r" {2,}", line.strip())[0] for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("mezzotint ")]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_commands_and_code_run_as_they_stand(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if kind == "run":
            for words in commands(block):
                done = CliRunner().invoke(app, words)
                assert done.exit_code == 0, f"{words}: {done.stderr}"
        elif kind == "python":
            exec(block, {})
    made = {"tutorial": ("small", "small.html", "both.html"), "extend": ("own",)}.get(page.stem, ())
    assert all((place / name).exists() for name in made)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_every_command_can_be_parsed(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for _, block in FENCE.findall(page.read_text(encoding="utf-8")):
        for name, *words in commands(block):
            group.commands[name].make_context(name, words)  # raises UsageError for what does not exist
            for option, value in pairwise(words):
                if option == "--recipe" and not value.endswith(".yaml"):
                    load_recipe(value)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_what_it_tells_to_install_exists(page: Path) -> None:
    extras = SETTINGS["project"]["optional-dependencies"]
    for extra in re.findall(r"mezzotint\[(\w+)\]", page.read_text(encoding="utf-8")):
        assert extra in extras
    for named in re.findall(r"`(examples/[\w.]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / named).is_file(), named


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import tables

    for page, blocks in tables.pages().items():
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text, *blocks) == text, f"{page.name}: python -m benchmarks.tables"


@pytest.mark.engine
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason="the extra 'docs' is not installed")
    pytest.importorskip("material")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    mkdocs.build(config)  # `strict: true` makes an error of every warning
    for page in PAGES:
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        text = (tmp_path / "site" / name).read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', text), "asks another host"
