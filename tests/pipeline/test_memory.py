"""Promised memory against what processes take."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.make_random_llama import make_random_llama

from mezzotint.core import panels
from mezzotint.errors import ConfigError
from mezzotint.pipeline import costs
from mezzotint.pipeline.memory import BASE_BYTES, Phases
from mezzotint.pipeline.plan import make_plan
from pipeline.runs import TEXT, TINY_LLAMA, least_memory, opened, plan_of, quantized, request_of


def test_a_phase_takes_what_is_in_memory() -> None:
    phase = Phases(fixed=100, spilled=50, waiting=30, passing=10)
    assert phase.peak(20, keep_runs=True) == 150
    assert phase.peak(20, keep_runs=False) == 130
    assert phase.peak(1000, keep_runs=True) == 180


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "qep-gptq", "default", "qep-trellis"])
def test_more_memory_is_used_up_to_what_there_is(recipe: str) -> None:
    options: dict[str, Any] = {"samples": 256, "seqlen": 128}
    least = least_memory(TINY_LLAMA, recipe, **options)
    promised = [plan_of(TINY_LLAMA, recipe, memory=least + more, **options).costs for more in (0, 10**6, 10**7, 10**9)]
    peaks = [one.peak_memory_bytes for one in promised]
    assert peaks == sorted(peaks)
    assert all(peak <= least + more for peak, more in zip(peaks, (0, 10**6, 10**7, 10**9), strict=True))
    assert all(one.least_memory_bytes == least for one in promised)


def test_what_is_free_on_a_gpu_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(TINY_LLAMA, "qep-gptq", samples=256, seqlen=128)

    def with_free(nbytes: int, memory: int | None = None) -> costs.Costs:
        monkeypatch.setattr(costs, "free_device_bytes", lambda device: nbytes if device == "cuda" else None)
        return make_plan(opened(TINY_LLAMA), replace(request, device="cuda", memory=memory)).costs

    plenty = with_free(2**40)
    assert make_plan(opened(TINY_LLAMA), request).costs.stream_bytes is None
    least = plenty.least_memory_bytes
    for more in (2**20, 2**23):
        # nine tenths of what is free may be used, and what Python takes lies elsewhere
        found = with_free(int((least + more - BASE_BYTES) / 0.9))
        assert found.stream_bytes is not None
        assert found.peak_memory_bytes <= least + more
    assert with_free(2**40, memory=least + 5).peak_memory_bytes <= least + 5  # the smaller limit counts
    with pytest.raises(ConfigError, match=r"the GPU has 1MiB free.* needs at least \d+MiB"):
        with_free(2**20)


def test_blocks_cost_nothing(tmp_path: Path) -> None:
    peaks = []
    for layers in (1, 4):
        make_random_llama(tmp_path / str(layers), preset="quarter", layers=layers)
        peaks.append(least_memory(tmp_path / str(layers), "qep-gptq"))
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("recipe", [pytest.param("gptq", marks=pytest.mark.slow), "default"])
def test_sums_in_files_give_the_same(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order of sums, which may turn a code that lies on the border of two, and then those behind it."""
    held = quantized(TINY_LLAMA, tmp_path / "held", recipe)
    monkeypatch.setattr(panels, "PANEL_BYTES", 2**17)
    least = least_memory(TINY_LLAMA, recipe)
    assert plan_of(TINY_LLAMA, recipe, memory=least).costs.panels
    assert not plan_of(TINY_LLAMA, recipe, memory=2 * least).costs.panels
    made: list[int] = []
    whole = panels.StoredSquare.__init__

    def counted(self: Any, width: int, *rest: Any) -> None:
        made.append(width)
        whole(self, width, *rest)

    monkeypatch.setattr(panels.StoredSquare, "__init__", counted)
    filed = quantized(TINY_LLAMA, tmp_path / "filed", recipe, memory=least)
    assert set(made) == {256, 768}
    assert [block["error"] for block in filed["blocks"]] == pytest.approx(
        [block["error"] for block in held["blocks"]], rel=0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["least", "some", "1TiB"])
@pytest.mark.parametrize("recipe", ["gptq", "qep-gptq", "default"])
def test_the_promise_is_kept(recipe: str, limit: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_random_llama(model, preset="quarter", layers=2)
    least = least_memory(model, recipe, samples=32, seqlen=512, calibration=TEXT)
    memory = {"least": str(least), "some": str(least + 2**27)}.get(limit, limit)
    command = [
        sys.executable, "-m", "mezzotint", "quantize", str(model), "--out", str(tmp_path / "out"), "--recipe", recipe,
        "--calibration", str(TEXT), "--samples", "32", "--seqlen", "512", "--memory", memory, "--device", "cpu",
        "--set", "grid.bits=4", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["peak_rss_bytes"] == pytest.approx(report["promised_peak_memory_bytes"], rel=0.15)
