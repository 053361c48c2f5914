"""`mezzotint doctor`: what it prints, that it prints no paths or secrets, and that nothing that is missing stops it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mezzotint.process import machine

SCRIPT = "import sys; sys.modules.update(dict.fromkeys({missing!r})); from mezzotint.cli import main; main()"


def without(*missing: str, arguments: tuple[str, ...] = ("doctor",)) -> subprocess.CompletedProcess[str]:
    """Run a command in a process in which modules cannot be imported."""
    command = [sys.executable, "-c", SCRIPT.format(missing=missing), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_text_is_fenced(mezzotint: Callable[..., Any]) -> None:
    answer = mezzotint("doctor")
    lines = answer.stdout.splitlines()
    assert answer.code == 0
    assert (lines[0], lines[-1]) == ("```text", "```")
    names = {line.split("  ")[0] for line in lines}
    assert {"mezzotint", "Python", "torch", "processor", "cores", "kernels", "memory", "GPU", "vllm"} <= names
    assert "free, cache" in names


def test_json(mezzotint: Callable[..., Any]) -> None:
    found = mezzotint("doctor", "--json").last_object
    assert found["versions"]["torch"].startswith("2.")
    assert found["kernels"]["loaded"]
    assert found["kernels"]["used"] in found["kernels"]["available"]
    assert found["processor"]["threads"] >= 1
    assert all(place["free_bytes"] > 0 for place in found["disk"].values())
    assert found["warnings"] == []


def test_no_secret_and_no_path_is_shown(mezzotint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    shown = mezzotint("doctor").stdout
    assert "hf_secret" not in shown
    assert str(Path.home()) not in shown
    assert str(Path.cwd()) not in shown
    assert [line.split() for line in shown.splitlines() if line.startswith("OMP")] == [["OMP_NUM_THREADS", "3"]]


@pytest.mark.parametrize("missing", [("torch",), ("transformers", "gguf", "huggingface_hub")], ids=" ".join)
def test_what_is_missing_does_not_stop_it(missing: tuple[str, ...]) -> None:
    done = without(*missing)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "```"


def test_gpus(mezzotint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(index: int) -> SimpleNamespace:
        if index == 1:
            raise RuntimeError("CUDA error: busy\nmore lines")
        return SimpleNamespace(name="A GPU", total_memory=2**33, major=9, minor=0)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    shown = [line.split(maxsplit=1)[1] for line in mezzotint("doctor").stdout.splitlines() if line.startswith("GPU")]
    assert shown == ["A GPU, 8.00 GiB, compute capability 9.0", "RuntimeError: CUDA error: busy"]


def test_missing_kernels_are_told() -> None:
    done = without("mezzotint.kernels._native", arguments=("doctor", "--json"))
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)["kernels"]
    assert not kernels["loaded"]
    assert "compiled kernels" in kernels["error"]
    assert "warning: the compiled kernels cannot be loaded" in done.stderr


def test_other_commands_say_that_kernels_are_missing() -> None:
    done = without("mezzotint.kernels._native", arguments=("plan", "nowhere"))
    assert done.returncode == 2
    assert "error: the compiled kernels of mezzotint cannot be loaded" in done.stderr
    assert "make venv" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("_MEMINFO", "_CPUINFO"):
        monkeypatch.setattr(machine, name, tmp_path / "nothing")
    monkeypatch.setattr(machine, "_LIMITS", (tmp_path / "nothing",))
    assert machine.total_memory_bytes() is None
    assert machine.available_memory_bytes() is None
    assert machine.memory_limit_bytes() is None
    assert machine.processor_name()
    assert machine.free_disk_bytes(tmp_path / "not" / "there") == machine.free_disk_bytes(tmp_path)


def test_files_of_the_system_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mem").write_text("MemTotal:       2048 kB\nMemAvailable:   1024 kB\n")
    (tmp_path / "cpu").write_text("processor\t: 0\nmodel name\t: A: fast one\n")
    (tmp_path / "limit").write_text("1048576\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "mem")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpu")
    monkeypatch.setattr(machine, "_LIMITS", (tmp_path / "nothing", tmp_path / "limit"))
    assert machine.total_memory_bytes() == 2 * 2**20
    assert machine.available_memory_bytes() == 2**20
    assert machine.memory_limit_bytes() == 2**20
    assert machine.processor_name() == "A: fast one"


@pytest.mark.parametrize("text", ["max\n", f"{2**63 - 4096}\n"])
def test_no_limit(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "limit").write_text(text)
    monkeypatch.setattr(machine, "_LIMITS", (tmp_path / "limit",))
    assert machine.memory_limit_bytes() is None
