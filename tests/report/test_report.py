"""What ``mezzotint.json`` says, against what lies in the folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.errors import ModelError
from mezzotint.report.report import read_report
from runs import TINY_LLAMA, opened, quantized, request_of, stock, windows_of
from twins import quantized_twin, run

PROMISED = {
    "out", "bits_per_weight", "bits_per_weight_without_side_data", "seconds", "cpu_seconds", "peak_rss_bytes",
    "output_bytes", "linears", "decisions",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("report") / "out"
    return out, quantized(TINY_LLAMA, out, "gptq", bits=3, seed=5)


def test_the_contract(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    assert report.keys() >= PROMISED
    assert report["out"] == str(out)
    json.dumps(report, allow_nan=False)
    assert 0 < report["seconds"] < 600
    assert 0 < report["cpu_seconds"] < 600
    assert set(report["times"]) == {"plan", "calibration", "sweep"}
    assert sum(report["times"].values()) == pytest.approx(report["seconds"])
    assert report["peak_rss_bytes"] > 10**8
    assert report["seed"] == 5
    assert report["recipe"]["name"] == "gptq"
    assert report["recipe"]["grid"]["bits"] == 3
    assert report["versions"]["torch"] == torch.__version__
    assert report["model"] == "tiny_llama"
    assert report["bits_per_weight_without_side_data"] == 3
    sizes = [shape[0] * shape[1] for shape in (linear["shape"] for linear in report["plan"]["linears"])]
    assert report["bits_per_weight"] == 3 + (16 + 3) / 128 + 128 * len(sizes) / sum(sizes)  # and a shape for each


def test_the_file_is_the_report(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    assert {"out": str(out), **read_report(out)} == json.loads(json.dumps(report))


def test_nothing_names_this_machine(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    for name in ("mezzotint.json", "config.json"):
        assert str(out.parent) not in (out / name).read_text(encoding="utf-8")


def test_each_matrix(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    source, request = opened(TINY_LLAMA), request_of(TINY_LLAMA, seed=5)
    original, twin = stock(TINY_LLAMA, torch.float64), quantized_twin(TINY_LLAMA, out)
    inputs = [run(twin, source, windows.tokens) for windows in windows_of(source, request)]
    assert [linear["name"] for linear in report["linears"]] == [p["name"] for p in report["plan"]["linears"]]
    for linear in report["linears"]:
        parameter = f"{linear['name']}.weight"
        w, v = (model.get_parameter(parameter).detach() for model in (original, twin))
        assert linear["bits_per_weight"] == 3 + (16 + 3) / 128 + 128 / w.numel()
        assert linear["tokens"] == 7 * 32
        assert linear["weight_error"] == pytest.approx(float((v - w).square().sum() / w.square().sum()), rel=1e-4)
        for name, seen in zip(("h_error", "h_error_held_out"), inputs, strict=True):
            x = seen[linear["name"]].t()
            # inputs in float32 differ by a relative 1e-6 from these, and errors are sums of squares
            assert linear[name] == pytest.approx(float(((v - w) @ x).square().sum() / (w @ x).square().sum()), rel=1e-3)
        assert linear["h_error"] < linear["weight_error"]
        assert linear["seconds"] >= 0
    assert report["decisions"] == {}


def test_the_plan_in_the_report(finished: tuple[Path, dict[str, Any]]) -> None:
    plan = finished[1]["plan"]
    assert plan.keys() >= {"linears", "kept", "bytes", "format", "peak_memory_bytes", "calibration", "fingerprint"}
    first = plan["linears"][0]
    assert (first["name"], first["block"], first["shape"]) == ("model.layers.0.self_attn.q_proj", 0, [256, 256])
    assert first["grid"]["kind"] == "uniform"
    assert (first["grid"]["bits"], first["grid"]["group_size"], first["grid"]["scale_dtype"]) == (3, 128, "bfloat16")
    assert first["rounding"]["kind"] == "gptq"
    assert first["target"] == {"kind": "weight"}
    assert plan["calibration"] == {"source": str(plan["calibration"]["source"]), "samples": 8, "seqlen": 32}


def test_without_statistics(tmp_path: Path) -> None:
    report = quantized(TINY_LLAMA, tmp_path / "out", "rtn")
    for linear in report["linears"]:
        assert (linear["h_error"], linear["h_error_held_out"], linear["tokens"]) == (None, None, 0)
        assert linear["weight_error"] > 0
    assert [(b["index"], b["error"], b["relative_error"]) for b in report["blocks"]] == [
        (i, None, None) for i in (0, 1, 2)
    ]


def test_the_seed_repeats_and_matters(tmp_path: Path) -> None:
    errors = [
        [x["h_error"] for x in quantized(TINY_LLAMA, tmp_path / str(i), "gptq", seed=seed)["linears"]]
        for i, seed in enumerate((3, 3, 4))
    ]
    assert errors[0] == errors[1] != errors[2]


def test_folders_without_a_report(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no mezzotint.json. Give a folder that `mezzotint quantize` made"):
        read_report(tmp_path)
    (tmp_path / "mezzotint.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="is not valid JSON"):
        read_report(tmp_path)
