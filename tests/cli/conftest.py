import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mezzotint.cli.app import app
from runs import TEXT, TINY_LLAMA

SMALL = ("--calibration", str(TEXT), "--samples", "4", "--seqlen", "32", "--device", "cpu")


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    stdout: str
    stderr: str

    @property
    def last_object(self) -> dict[str, Any]:
        return json.loads(self.stdout.splitlines()[-1])


@pytest.fixture
def mezzotint() -> Callable[..., Answer]:
    """Run a command in this process."""

    def run(*arguments: str | Path) -> Answer:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Answer(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A copy of the trained Llama that a test may damage."""
    return Path(shutil.copytree(TINY_LLAMA, tmp_path / "model"))


@pytest.fixture
def refused(mezzotint: Callable[..., Answer], tmp_path: Path) -> Callable[..., str]:
    """``quantize`` exits 2, says one thing, and writes nothing; gives what it says."""

    def check(model: Path, *arguments: str | Path, small: bool = True) -> str:
        out = tmp_path / "out"
        before = sorted(tmp_path.rglob("*"))
        answer = mezzotint("quantize", model, "--out", out, *(SMALL if small else ()), *arguments)
        assert answer.code == 2, answer.stderr
        assert answer.stdout == ""
        assert sorted(tmp_path.rglob("*")) == before
        assert answer.stderr.count("error:") == 1, answer.stderr
        assert "Traceback" not in answer.stderr
        return answer.stderr

    return check
