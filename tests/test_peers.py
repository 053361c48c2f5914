"""The comparison with other quantizers, by one made up here: what is counted, handed over and written down."""

import argparse
import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.__main__ import call_here
from benchmarks.peers import __main__ as peers
from benchmarks.peers import table
from benchmarks.peers.workers import handover
from safetensors.torch import load_file

from runs import HELD_OUT, TEXT, TINY_LLAMA

PROTOCOL = {"calibration": str(TEXT), "samples": 4, "seqlen": 32}
PROTOCOL |= {"text": str(HELD_OUT), "eval_seqlen": 32, "eval_windows": 2}
ROW = {"peer": "made-up", "method": "half", "bits": 8, "settings": {"factor": 0.5}, "group_size": 64}
WEIGHTS = 3 * 256 * 256  # what WORKER quantizes
CONFIG = {"limit_seconds": 60, "eval_precision": "float32"}

WORKER = """
from pathlib import Path
import torch
from handover import run
from safetensors.torch import load_file

def quantize(job, tokens):
    assert tokens.shape == (4, 32) and tokens.dtype == torch.int64
    return load_file(str(Path(job["model"]) / "model.safetensors"))

def unpack(job, tensors):
    for name, values in tensors.items():
        if name.endswith("q_proj.weight"):
            yield name, values * job["settings"]["factor"], [values.to(torch.int8), values[:, :1].float()]

run(quantize, unpack, ["safetensors"])
"""


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """A peer whose worker is WORKER, in an environment that is ours."""
    workers, python = tmp_path / "workers", tmp_path / "environments" / "made-up" / "bin" / "python"
    workers.mkdir()
    shutil.copyfile(handover.__file__, workers / "handover.py")
    (workers / "made_up_worker.py").write_text(WORKER)
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(peers, "HERE", tmp_path)
    monkeypatch.setattr(peers, "call", call_here)
    return argparse.Namespace(model=TINY_LLAMA, environments=tmp_path / "environments", cache=tmp_path)


def measured(options: argparse.Namespace, tmp_path: Path, **config: Any) -> dict[str, Any]:
    handed = peers.hand_over(TINY_LLAMA, PROTOCOL, tmp_path) | {"weights": WEIGHTS}
    return peers.measured(options, {**CONFIG, **config}, PROTOCOL, ROW, handed)


def test_a_row_has_what_the_peer_stores_and_how_far_its_weights_are(
    options: argparse.Namespace, tmp_path: Path
) -> None:
    found = measured(options, tmp_path)
    assert found["status"] == "done"
    made = found["quantize"]
    assert made["weights"] == WEIGHTS
    assert made["bits_per_weight"] == 8 + 32 / 256
    assert made["seconds"] > 0
    assert made["peak_rss_bytes"] > 10**8
    assert {"torch", "safetensors"} < set(made["versions"])
    assert found["evaluate"]["kl_nats"] > 0.01
    assert found["evaluate"]["tokens"] == 2 * 31


def test_a_failure_is_a_row_that_says_why(options: argparse.Namespace, tmp_path: Path) -> None:
    worker = tmp_path / "workers" / "made_up_worker.py"
    worker.write_text(WORKER.replace("values * job", "values[1:] * job"))
    found = measured(options, tmp_path)
    assert found["status"] == "failed"
    assert found["message"].startswith("ended with 1: ValueError: model.layers.")
    assert "(255, 256) handed over, the original has (256, 256)" in found["message"]

    worker.write_text(WORKER.replace("q_proj.weight", "0.self_attn.q_proj.weight"))
    found = measured(options, tmp_path)
    assert found == {"status": "failed", "message": f"it quantized {WEIGHTS // 3} weights of {WEIGHTS}"}

    worker.write_text(WORKER.replace("    return load", "    while True: pass\n    return load"))
    found = measured(options, tmp_path, limit_seconds=1)
    assert found == {"status": "failed", "message": "cut: it took longer than 1 seconds of processor"}


def test_a_peer_without_environment_is_no_row(options: argparse.Namespace, tmp_path: Path) -> None:
    shutil.rmtree(options.environments)
    with pytest.raises(SystemExit, match="make peers"):
        measured(options, tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    name = "model.norm.weight"
    values = load_file(str(TINY_LLAMA / "model.safetensors"))[name].clone()
    values[3] = torch.inf
    with pytest.raises(ValueError, match=f"{name}: not all values are finite"):
        handover.write_dense(TINY_LLAMA, {name: values}, tmp_path / "out")
    with pytest.raises(ValueError, match="no such tensor"):
        handover.write_dense(TINY_LLAMA, {"lm_head.bias": values}, tmp_path / "out")


def test_peers_get_the_windows_that_mezzotint_calibrates_on(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    handed = peers.hand_over(TINY_LLAMA, PROTOCOL, tmp_path)
    tokens = np.load(handed["tokens"])
    assert tokens.shape == (4, 32)
    assert handed["weights"] == 3 * 256 * (256 + 128 + 128 + 256 + 3 * 768)
    text = TEXT.read_text(encoding="utf-8")
    decoded = AutoTokenizer.from_pretrained(str(TINY_LLAMA)).decode(tokens[0][1:-1], skip_special_tokens=True)
    assert decoded.strip()[:40] in text


def test_a_row_that_another_run_appended_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    assert peers.rows_of(file) == []
    peers.append(file, {"model": "ours"})
    file.write_text(json.dumps([*peers.rows_of(file), {"model": "theirs"}]))
    assert [row["model"] for row in peers.append(file, {"model": "last"})] == ["ours", "theirs", "last"]
    assert peers.rows_of(file)[1:] == [{"model": "theirs"}, {"model": "last"}]


def test_rows_are_told_apart_and_none_is_without_a_note() -> None:
    config = tomllib.loads((Path(peers.__file__).parent / "peers.toml").read_text(encoding="utf-8"))
    rows = [json.dumps(row) for row in peers.expanded(config)]
    assert len(set(rows)) == len(rows) == len(config["rows"]) * len(config["bits"])
    assert all(row["note"] for row in config["rows"])
    palette = [row for row in peers.expanded(config) if row["method"] == "palette"]
    assert all(row["group_size"] == peers.TILES and row["stored"] > row["bits"] for row in palette)


def test_every_peer_has_an_environment_and_a_worker() -> None:
    config = tomllib.loads((Path(peers.__file__).parent / "peers.toml").read_text(encoding="utf-8"))
    here = Path(peers.__file__).parent
    for peer in {row["peer"] for row in config["rows"]} - {peers.OURS}:
        assert (here / "environments" / f"{peer}.txt").is_file()
        assert (here / "workers" / f"{peer.replace('-', '_')}_worker.py").is_file()


def test_the_table_has_failures_and_orders_the_rest_by_divergence() -> None:
    def row(method: str, bits: int, processor: str = "A", **found: Any) -> dict[str, Any]:
        settings = {"row": {"peer": "p", "method": method, "bits": bits}}
        return {"model": "M", "settings": settings, "machine": {"processor": processor}, **found}

    def done(kl: float) -> dict[str, Any]:
        made = {"cpu_seconds": 10.0, "seconds": 12.0, "peak_rss_bytes": 2**30, "bits_per_weight": 3.25, "versions": {}}
        measures = {"kl_nats": kl, "kl_stderr": 0.01, "perplexity": 30.0, "reference_perplexity": 20.0}
        return {"status": "done", "quantize": made, "evaluate": measures}

    rows = [
        row("worse", 3, **done(0.5)),
        row("crashing", 3, status="failed", message="ended with 1: no accelerator"),
        row("better", 3, "B", **done(0.25)),
        row("worse", 4, **done(0.1)),
    ]
    methods = [{"peer": "p", "method": method} for method in ("worse", "crashing", "better")]
    lines = table.measured(rows, {"bits": [3, 4], "rows": methods})
    starts = [line for line in lines if line.startswith(("| p ", "###", "Not"))]
    assert [start.split(" | ")[1] for start in starts if start.startswith("|")] == [
        "worse",
        "better",
        "worse",
        "crashing",
    ]
    assert starts[0] == "### 4 bits"
    assert starts[2] == "Not measured yet: p crashing, p better."
    assert "0.250 ± 0.010 | 30.0 | 10\\* | 1024 |" in starts[4]
    assert "0.500 ± 0.010 | 30.0 | 10 | 1024 |" in starts[5]
    assert "of one thread of A; with a star, of B." in lines[0]
    assert "failed: ended with 1: no accelerator" in starts[6]
