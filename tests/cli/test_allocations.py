"""What `plan` and `quantize` show of an allocation."""

from collections.abc import Callable
from pathlib import Path

from cli.conftest import SMALL, Answer
from runs import TINY_LLAMA

BUDGET = ("--recipe", "palette", "--bits", "3.6", "--set", "allocation.windows=2")


def test_the_plan_shows_the_frontier(mezzotint: Callable[..., Answer], tmp_path: Path) -> None:
    answer = mezzotint("plan", TINY_LLAMA, *SMALL, *BUDGET, "--plot", tmp_path / "f.svg", "--json")
    assert answer.code == 0, answer.stderr
    found = answer.last_object
    assert {"frontier", "predicted_kl_nats", "linears", "bytes", "peak_memory_bytes"} <= found.keys()
    assert found["budget"] == {"bits": 3.6}
    assert (tmp_path / "f.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
    shown = mezzotint("plan", TINY_LLAMA, *SMALL, *BUDGET)
    assert "3.5 bits everywhere" in shown.stdout
    assert f"{found['predicted_kl_nats']:.4f}" in shown.stdout


def test_a_dry_run_plans_it_too(mezzotint: Callable[..., Answer], tmp_path: Path) -> None:
    answer = mezzotint("quantize", TINY_LLAMA, *SMALL, *BUDGET, "--out", tmp_path / "out", "--dry-run", "--json")
    assert answer.code == 0, answer.stderr
    assert answer.last_object["chosen"]["bits_per_weight"] <= 3.6
    assert not (tmp_path / "out").exists()


def test_a_picture_of_no_allocation_is_refused(mezzotint: Callable[..., Answer], tmp_path: Path) -> None:
    answer = mezzotint("plan", TINY_LLAMA, "--plot", tmp_path / "f.svg")
    assert answer.code == 2
    assert "bits that are allocated" in answer.stderr
