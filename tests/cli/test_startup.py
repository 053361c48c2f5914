"""How the commands start: fast, because what takes long to import is imported when there is work to do."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer.main

from mezzotint.cli.app import app

COMMANDS = sorted(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
SLOW = {"torch", "transformers", "numpy", "scipy", "safetensors", "yaml", "matplotlib", "huggingface_hub"}
SECONDS = 1.5  # of processor; it takes 0.2, and took 2.0 when torch and scipy were imported

SCRIPT = """
import json, sys, time
try:
    {line}
except SystemExit as ended:
    code = ended.code or 0
else:
    code = 0
modules = sorted({{name.partition(".")[0] for name in sys.modules}})
sys.stderr.write(json.dumps([code, time.process_time(), modules]))
"""
MAIN = "sys.argv = ['mezzotint', *{words!r}]; from mezzotint.cli import main; main()"


def started(line: str) -> tuple[str, int, float, set[str]]:
    """Standard output, exit code, processor seconds and packages of a fresh process that runs a line."""
    command = [sys.executable, "-c", SCRIPT.format(line=line)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    code, seconds, modules = json.loads(done.stderr)
    return done.stdout, code, seconds, set(modules)


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_that_takes_long(words: list[str]) -> None:
    output, code, seconds, modules = started(MAIN.format(words=words))
    assert code == 0
    assert output
    assert not modules & SLOW
    assert seconds < SECONDS


def test_the_package_imports_nothing_that_takes_long() -> None:
    line = "import mezzotint; from mezzotint import quantize, plan; assert mezzotint.__all__; mezzotint.__version__"
    _, code, seconds, modules = started(line)
    assert code == 0
    assert not modules & SLOW
    assert seconds < SECONDS


def test_the_package_still_installs_its_hook() -> None:
    line = "import mezzotint; assert any(type(f).__module__ == 'mezzotint.engines.hook' for f in sys.meta_path)"
    assert started(line)[1] == 0


def test_every_public_name_can_be_imported() -> None:
    line = "import mezzotint; assert all(getattr(mezzotint, name) for name in mezzotint.__all__)"
    assert started(line)[1] == 0


@pytest.mark.parametrize("words", [["--help"], ["--version"]], ids=" ".join)
def test_the_module_is_the_command(words: list[str]) -> None:
    command = [sys.executable, "-m", "mezzotint", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == f"mezzotint {version('mezzotint')}" if "--version" in words else "plan" in done.stdout
