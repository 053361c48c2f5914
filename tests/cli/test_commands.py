"""What each command prints, and where: tables or one JSON object on stdout, everything else on stderr."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.cli import tables
from runs import HELD_OUT, TEXT, TINY_LLAMA

SMALL = ("--calibration", str(TEXT), "--samples", "4", "--seqlen", "32", "--device", "cpu")
COMMANDS = ("quantize", "plan", "evaluate", "inspect", "compare", "recipes", "palette", "rotate", "doctor")
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder made by the command itself, in a process of its own."""
    out = tmp_path_factory.mktemp("cli") / "out"
    command = [sys.executable, "-m", "mezzotint", "quantize", str(TINY_LLAMA), "--out", str(out), *SMALL, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["out"] == str(out)
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    return out


def test_a_whole_process(finished: Path) -> None:
    assert {"config.json", "model.safetensors", "mezzotint.json", "README.md"} <= {
        path.name for path in finished.iterdir()
    }
    assert not finished.with_name("out.partial").exists()


def test_quantize_prints_a_table_without_json(mezzotint: Run, tmp_path: Path) -> None:
    answer = mezzotint("quantize", TINY_LLAMA, "--out", tmp_path / "out", *SMALL)
    assert answer.code == 0
    for part in ("bits per weight", "4.157", "size of all tensors", "2.2 MiB", "peak memory", "held-out error"):
        assert part in answer.stdout, answer.stdout
    assert "written to" in answer.stdout


def test_dry_run_writes_nothing(mezzotint: Run, tmp_path: Path) -> None:
    answer = mezzotint("quantize", TINY_LLAMA, "--out", tmp_path / "out", *SMALL, "--dry-run")
    assert answer.code == 0
    assert "default for tiny_llama" in answer.stdout
    planned = mezzotint("quantize", TINY_LLAMA, "--out", tmp_path / "out", *SMALL, "--dry-run", "--json")
    assert planned.last_object["format"] == "compressed-tensors"
    assert len(planned.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_plan(mezzotint: Run) -> None:
    shown = mezzotint("plan", TINY_LLAMA, *SMALL, "--bits", "3", "--keep", "*.0.mlp.down_proj")
    assert shown.code == 0
    for part in ("lm_head", "kept by a rule", "3.150 bits per weight", "samples of 32 tokens", "format", "memory"):
        assert part in " ".join(shown.stdout.split()), shown.stdout
    answer = mezzotint("plan", TINY_LLAMA, *SMALL, "--bits", "3", "--json")
    assert len(answer.stdout.splitlines()) == 1
    plan = answer.last_object
    assert plan.keys() >= {"linears", "bytes", "peak_memory_bytes", "kept", "format", "calibration", "fingerprint"}
    assert len(plan["linears"]) == 21
    assert {linear["grid"]["bits"] for linear in plan["linears"]} == {3}


def test_set_takes_yaml_values(mezzotint: Run) -> None:
    settings = ("grid.group_size=null", "grid.symmetric=true", "rounding.damping=0.05", "target.kind=qep")
    arguments = [part for setting in settings for part in ("--set", setting)]
    linear = mezzotint("plan", TINY_LLAMA, *SMALL, *arguments, "--json").last_object["linears"][0]
    assert (linear["grid"]["group_size"], linear["grid"]["symmetric"]) == (None, True)
    assert (linear["rounding"]["damping"], linear["target"]["kind"]) == (0.05, "qep")


def test_evaluate(mezzotint: Run, finished: Path) -> None:
    arguments = ("--text", HELD_OUT, "--seqlen", "64", "--windows", "4", "--device", "cpu")
    alone = mezzotint("evaluate", TINY_LLAMA, *arguments, "--json").last_object
    assert (alone["tokens"], alone["windows"], alone["kl_nats"]) == (4 * 63, 4, None)
    both = mezzotint("evaluate", finished, "--against", TINY_LLAMA, *arguments, "--json").last_object
    assert both.keys() >= {"perplexity", "kl_nats", "tokens", "reference_perplexity"}
    assert both["reference_perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert 0 < both["kl_nats"] < 0.1
    shown = mezzotint("evaluate", finished, "--against", TINY_LLAMA, *arguments)
    assert "kl_nats" in shown.stdout
    assert f"{both['kl_nats']:.4f}" in shown.stdout


def test_inspect(mezzotint: Run, finished: Path) -> None:
    shown = mezzotint("inspect", finished)
    assert shown.code == 0
    assert "recipe default" in shown.stdout
    assert "4.157 bits per weight" in shown.stdout
    report = mezzotint("inspect", finished, "--json").last_object
    assert report == json.loads((finished / "mezzotint.json").read_text(encoding="utf-8"))


PAPERS = {
    "rtn": "2210.17323",
    "gptq": "2210.17323",
    "qep-rtn": "2504.09629",
    "qep-gptq": "2504.09629",
    "loaq-rtn": "2509.06297",
    "loaq-gptq": "2509.06297",
    "gptaq": "2504.02692",
    "qronos": "2505.11695",
    "default": "2509.06297",
}


def test_recipes(mezzotint: Run) -> None:
    shown = mezzotint("recipes")
    assert shown.code == 0
    papers, name = dict[str, str](), ""
    for row in (line.split("│")[1:-1] for line in shown.stdout.splitlines() if line.startswith("│")):
        name = row[0].strip() or name  # what does not fit goes on in rows without a name
        papers[name] = f"{papers.get(name, '')} {row[2].strip()}"
    found = mezzotint("recipes", "--json").last_object["recipes"]
    assert papers.keys() == found.keys()
    for recipe, number in PAPERS.items():
        assert "arXiv" in papers[recipe]
        assert number in papers[recipe]
        assert papers[recipe].strip() == found[recipe]["paper"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, mezzotint: Run) -> None:
    answer = mezzotint(command, "--help")
    assert answer.code == 0
    assert "--json" in answer.stdout
    assert f"mezzotint {command}" in answer.stdout or f" {command} " in answer.stdout
    if command == "quantize":
        for option in (
            "--out",
            "--recipe",
            "--bits",
            "--for",
            "--calibration",
            "--keep",
            "--set",
            "--seed",
            "--memory",
        ):
            assert option in answer.stdout


def test_rotate(mezzotint: Run, tmp_path: Path) -> None:
    answer = mezzotint("rotate", TINY_LLAMA, "--out", tmp_path / "turned", "--residual", "none", "--json")
    assert answer.code == 0
    result = answer.last_object
    assert set(result) == {"out", "seconds", "output_bytes", "difference"}
    assert result["difference"] < 1e-6
    assert (tmp_path / "turned" / "tokenizer.json").is_file()
    again = mezzotint("rotate", TINY_LLAMA, "--out", tmp_path / "turned")
    assert again.code == 2


def test_without_a_command(mezzotint: Run) -> None:
    answer = mezzotint()
    assert all(command in answer.stdout + answer.stderr for command in COMMANDS)
    assert mezzotint("quantise").code == 2
    assert mezzotint("quantize", TINY_LLAMA).code == 2  # no --out


def test_the_same_json_for_the_same_seed(mezzotint: Run, tmp_path: Path) -> None:
    first, second = (
        mezzotint("quantize", TINY_LLAMA, "--out", tmp_path / name, *SMALL, "--seed", "7", "--json").last_object
        for name in ("one", "two")
    )
    assert first["plan"] == second["plan"]
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**20, "5.0 MiB"), (3 * 2**29, "1.50 GiB")],
)
def test_bytes_for_people(nbytes: int, text: str) -> None:
    assert tables.size(nbytes) == text


def test_evaluate_keeps_the_reference(mezzotint: Run, finished: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", finished, "--against", TINY_LLAMA, "--text", HELD_OUT, "--device", "cpu", "--json")
    sizes = ("--seqlen", "64", "--windows", "4")
    plain = mezzotint(*arguments, *sizes).last_object
    cache = tmp_path / "states"
    first = mezzotint(*arguments, *sizes, "--cache", cache).last_object
    (kept,) = cache.iterdir()
    written = kept.stat().st_mtime_ns
    second = mezzotint(*arguments, *sizes, "--cache", cache).last_object
    assert first == second == plain
    assert kept.stat().st_mtime_ns == written
    mezzotint(*arguments, "--seqlen", "64", "--windows", "3", "--cache", cache)
    assert len(list(cache.iterdir())) == 2  # other windows are another reference


def test_palette(mezzotint: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = {grid["name"]: grid for grid in mezzotint("palette", "--json").last_object["grids"]}
    assert grids.keys() >= {"uniform-4", "lookup-3", "nf4", "trellis-3.25", "trellis-6-best"}
    for grid in grids.values():
        assert grid["distortion"] > 0
        assert grid["ratio_to_bound"] == pytest.approx(grid["distortion"] * 4 ** grid["bits"])
        assert grid["ratio_to_bound"] > 1, "no code is better than the bound"
        scales = 1.0 if grid["kind"] == "gguf" else 0.02  # its blocks have scales of their own, not one a row
        assert grid["bits"] <= grid["bits_with_side_data"] <= grid["bits"] + scales
        assert grid["decode_rate"] > 0
    assert "half-tcq-3.25" in grids["trellis-3.25-best"]["aliases"]
    assert "vllm" in grids["uniform-4"]["engines"]
    assert "sglang" in grids["uniform-4"]["engines"]
    assert "sglang" not in grids["trellis-3"]["engines"]
    assert grids["gguf-q4_k"]["engines"] == ["transformers", "vllm", "vllm-cpu", "llama.cpp", "mezzotint"]
    assert grids["gguf-q4_k"]["bits_with_side_data"] == 4.5
    monkeypatch.setattr("mezzotint.jobs.palette._decode_rate", lambda *_: 1e9)  # measured above
    shown = " ".join(mezzotint("palette").stdout.split())
    assert "trellis-1.125" in shown


@pytest.mark.parametrize("step", [1.0, pytest.param(0.125, marks=pytest.mark.slow)])
def test_the_committed_distortions_are_what_is_measured(step: float) -> None:
    """Of trellises and vector grids those with so many steps of bits; all other grids."""
    from mezzotint.jobs.palette import _committed, gaussian_distortion, members

    weights = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    for name, grid in members():
        if grid.kind in ("trellis", "vector") and grid.bits % step:
            continue
        if grid.kind == "trellis" and grid.states == 16:
            continue  # the table's own script measures those; a check here would take minutes
        rows = weights[:64] if grid.kind == "trellis" else weights
        found = gaussian_distortion(grid.resolve((1024, 1024), torch.float16), rows)
        # 2^16 weights: the mean of squares has a standard error of sqrt(2 / 2^16) = 0.6 %
        assert found == pytest.approx(_committed(name, grid), rel=0.03 if grid.kind == "trellis" else 0.005), name


def test_warnings_are_told(mezzotint: Run, damaged: Path, tmp_path: Path) -> None:
    (damaged / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    answer = mezzotint("quantize", damaged, "--out", tmp_path / "out", "--recipe", "rtn", *SMALL, "--json")
    assert answer.code == 0
    assert "warning: The card has no licence" in answer.stderr
    assert answer.last_object["warnings"][0] in answer.stderr.replace("\n", "")


@pytest.mark.parametrize("command", ["quantize", "plan", "evaluate", "inspect"])
def test_help_has_what_everyone_needs_first(command: str, mezzotint: Run) -> None:
    first, rest = mezzotint(command, "--help").stdout.split("More options")
    assert "--json" in first
    assert "--device" in rest
    assert "--trust-remote-code" in rest
    if command in ("quantize", "plan"):
        for option in ("--recipe", "--bits", "--size", "--for", "--calibration", "--keep", "--set"):
            assert option in first
