"""Runs that fail or are killed: nothing that looks like a finished model is left."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mezzotint.errors import MezzotintError, RunError, WriteError
from mezzotint.models import open_model
from mezzotint.storage.folder import MARKER, OutputFolder
from mezzotint.sweep.solve import Solver
from runs import TEXT, TINY_LLAMA, least_memory, quantized

SMALL = ("--calibration", str(TEXT), "--samples", "4", "--seqlen", "32", "--device", "cpu")
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C is heard, though a shell may have started the tests in its background, where it is not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("after", "spilled"), [(0, False), (3, True), (25, False), (60, True)])
def test_a_disk_that_fills_up(
    after: int, spilled: bool, mezzotint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = after
    least = least_memory(TINY_LLAMA, "default", samples=4, seqlen=32)
    memory = ("--memory", str(least)) if spilled else ()
    pwrite = os.pwrite

    def full(*arguments: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    answer = mezzotint("quantize", TINY_LLAMA, "--out", tmp_path / "out", *SMALL, *memory, "--json")
    # where the very first byte does not fit, nothing has been done: the request is at fault
    assert answer.code == (2 if after == 0 else 1), answer.stderr
    assert answer.stdout == ""
    assert answer.stderr.count("error:") == 1
    assert "space" in answer.stderr
    assert "Traceback" not in answer.stderr
    monkeypatch.undo()
    left = [path.name for path in tmp_path.iterdir()]
    if after == 0:
        assert left == []
    else:
        assert left == ["out.partial"]
        assert "--resume continues it" in answer.stderr
        assert not (tmp_path / "out.partial" / "config.json").exists()
    finished = mezzotint("quantize", TINY_LLAMA, "--out", tmp_path / "out", *SMALL, *memory, "--resume")
    assert finished.code == 0, finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_synced(mezzotint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    answer = mezzotint("quantize", TINY_LLAMA, "--out", tmp_path / "out", *SMALL)
    assert answer.code == 1
    assert "Input/output error" in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_stops_after_the_matrix(mezzotint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve, solved = Solver._one, []

    def press(solver: Solver, matrix: Any, *arguments: Any, **options: Any) -> Any:
        if len(solved) == 10:
            signal.raise_signal(signal.SIGINT)
        solved.append(matrix.name)
        return solve(solver, matrix, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Solver, "_one", press)
        answer = mezzotint("quantize", TINY_LLAMA, "--out", tmp_path / "out", *SMALL)
    assert answer.code == 1
    assert len(solved) == 11
    assert "stopping after this matrix" in answer.stderr
    assert "stopped" in answer.stderr
    assert "the same command with --resume continues it" in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    events = [json.loads(line) for line in (tmp_path / "out.partial" / "work" / "log.jsonl").read_text().splitlines()]
    assert [event["name"] for event in events if event["event"] == "linear"] == solved
    assert mezzotint("quantize", TINY_LLAMA, "--out", tmp_path / "out", *SMALL, "--resume").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_ctrl_c_stops_at_once(mezzotint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(Solver, "_one", press)
    answer = mezzotint("quantize", TINY_LLAMA, "--out", tmp_path / "out", *SMALL)
    assert answer.code == 1
    assert "--resume continues it" in answer.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_ctrl_c_stays_ignored(mezzotint: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = Solver._one

    def press(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return solve(*arguments, **options)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(Solver, "_one", press)
    answer = mezzotint("quantize", TINY_LLAMA, "--out", tmp_path / "out", *SMALL)
    assert answer.code == 0, answer.stderr
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_place_that_is_taken_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = OutputFolder.finish

    def late(folder: OutputFolder, *arguments: Any, **options: Any) -> None:
        folder.path.mkdir()
        (folder.path / "mine").write_text("mine", encoding="utf-8")
        finish(folder, *arguments, **options)

    monkeypatch.setattr(OutputFolder, "finish", late)
    with pytest.raises(WriteError, match=r"was created by another program.*lies in .*out.partial: rename it"):
        quantized(TINY_LLAMA, tmp_path / "out", "rtn")
    # hours of work are not thrown away
    assert (tmp_path / "out.partial" / "mezzotint.json").is_file()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_killed_run(tmp_path: Path) -> None:
    """SIGKILL while blocks are being written: another process sees no model, and a new run says what lies there."""
    script = (
        "import os, signal, sys\n"
        "from mezzotint.sweep import sweep\n"
        "streamed = sweep.Sweep._streamed\n"
        "def kill(self, block, streams):\n"
        "    if block.index == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return streamed(self, block, streams)\n"
        "sweep.Sweep._streamed = kill\n"
        "from mezzotint.cli import main\n"
        "main()\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, "quantize", str(TINY_LLAMA), "--out", str(out), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    partial = tmp_path / "out.partial"
    names = {path.name for path in partial.iterdir()}
    assert "model.safetensors" in names
    assert names == {MARKER, "model.safetensors", "shards.written", "work"}
    assert not any(path.name.startswith("spill-") for path in partial.rglob("*"))
    # even with the rest put beside them, the weights are none that anybody reads
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY_LLAMA / name, partial / name)
    with pytest.raises(MezzotintError, match=r"model.safetensors"):
        open_model(partial)
    with pytest.raises(MezzotintError, match="unfinished work") as caught:
        quantized(TINY_LLAMA, out, "rtn")
    assert not isinstance(caught.value, RunError)
    assert not out.exists()
