"""Killed at any operation on a file and at any step, a run is continued to the same bytes."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.killed import finished, finished_together, killed, killed_together
from mezzotint.errors import MezzotintError
from mezzotint.models import open_model
from mezzotint.storage.folder import MARKER
from runs import TINY_LLAMA, quantized, tiny

TIMES = {"seconds", "cpu_seconds", "peak_rss_bytes", "by_rank", "times"}
PALETTE = {"recipe": "palette", "settings": {"allocation.windows": 2, "allocation.guard": True}}


def contents(folder: Path) -> dict[str, Any]:
    """Every file, without what a clock has measured."""
    found: dict[str, Any] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if "mezzotint.json" in found:
        report = json.loads(found["mezzotint.json"])
        for record in (report, *report["linears"], *report["blocks"]):
            for name in TIMES & record.keys():
                del record[name]
        found["mezzotint.json"] = report
        found["README.md"] = re.sub(rb"; \d+ s\.", b"", found["README.md"])
    return found


def assert_same(out: Path, whole: Path) -> None:
    """The same files with the same bytes, and nothing else beside them."""
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    actual, expected = contents(out), contents(whole)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] == value, name


def is_finished(out: Path) -> bool:
    """The run was killed behind its last operation, or ended."""
    return out.exists() and not (out / MARKER).exists()


# ---- in turn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kills"),
    [
        (
            {"recipe": "default"},
            [
                "mkdir *.partial/work",
                "open *.partial/work/windows.bin.tmp",
                "step curvature",
                "rename *.partial/work/curvature.bin.tmp",
                "pwrite",
                "remove *.partial/work/values-*.bin",
                "remove *.partial/shards.written",
                "rename *.partial/tokenizer.json.tmp",
                "remove *.partial/work/state.json",
                "remove */mezzotint.unfinished.json",
            ],
        ),
        (
            {"recipe": "gptq", "settings": {"compensation.kind": "lora", "compensation.rank": 2, "grid.bits": 4}},
            ["step quantizing", "rename *.partial/adapter/adapter_model.safetensors.tmp"],
        ),
        (
            {"recipe": "rtn", "engine": "llama.cpp", "settings": {"grid.kind": "gguf"}, "bits": None},
            ["rename *.partial/model.gguf.tmp", "remove *.partial/model.safetensors", "rename *.partial"],
        ),
    ],
    ids=["default", "lora", "gguf"],
)
def test_kills_in_turn(arguments: dict[str, Any], kills: list[str], tmp_path: Path) -> None:
    """One run, killed again and again, each time further on."""
    arguments = {"samples": 4, "model": tiny("llama", tmp_path), **arguments}
    finished(tmp_path / "whole" / "out", **arguments)
    out = tmp_path / "killed" / "out"
    for kill in kills:
        assert killed(out, kill, **arguments), f"ended before {kill!r}"
        assert not is_finished(out)
        if not (out / MARKER).exists():
            with pytest.raises(MezzotintError):
                open_model(out.with_name("out.partial") if out.with_name("out.partial").exists() else out)
    finished(out, **arguments)
    assert_same(out, tmp_path / "whole" / "out")


@pytest.mark.parametrize("kind", ["convert", "rotate"])
def test_what_takes_seconds_is_made_anew(kind: str, tmp_path: Path) -> None:
    model, arguments = TINY_LLAMA, {}
    if kind == "convert":
        quantized(TINY_LLAMA, tmp_path / "q", "rtn", format="mezzotint", bits=4)
        model, arguments = tmp_path / "q", {"form": "compressed-tensors"}
    finished(tmp_path / "whole" / "out", kind, model=model, **arguments)
    out = tmp_path / "killed" / "out"
    for kill in (
        "rename *.partial/mezzotint.unfinished.json.tmp", "pwrite", "rename *.partial",
        "remove */mezzotint.unfinished.json",
    ):  # fmt: skip
        assert killed(out, kill, kind=kind, model=model, **arguments), f"ended before {kill!r}"
        assert not is_finished(out)
    finished(out, kind, model=model, **arguments)
    assert_same(out, tmp_path / "whole" / "out")


# ---- everywhere -----------------------------------------------------------------------------------------------------


def moments(names: list[str], count: int) -> list[int]:
    """Numbers of operations: the first of each name, numbers in it apart, and others evenly between."""
    firsts = {re.sub(r"[0-9a-f]{32}|\d+", "#", name): number for number, name in reversed([*enumerate(names, 1)])}
    chosen = sorted(firsts.values())
    if len(chosen) > count:
        return [chosen[i * len(chosen) // count] for i in range(count)]
    rest = [number for number in range(1, len(names) + 1) if number not in firsts.values()]
    more = count - len(chosen)
    return sorted({*chosen, *(rest[i * len(rest) // more] for i in range(more if rest else 0))})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ranks", "count", "arguments"),
    [
        ("quantize", 1, 80, {"samples": 4, "recipe": "default"}),
        ("quantize", 2, 40, {"samples": 4, "recipe": "default"}),
        ("quantize", 1, 40, {"samples": 4, **PALETTE}),
        ("quantize", 2, 10, {"samples": 4, **PALETTE}),
        ("convert", 1, 30, {"form": "compressed-tensors"}),
    ],
    ids=["default", "default-2", "palette", "palette-2", "convert"],
)
def test_two_hundred_kills(
    kind: str,
    ranks: int,
    count: int,
    arguments: dict[str, Any],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """A run killed at each of many moments; then the continued one killed at another, and continued again."""
    chance, kills = random.Random(0), 0
    if kind == "convert":
        quantized(TINY_LLAMA, tmp_path / "q", "rtn", format="mezzotint", bits=4)
        arguments = {**arguments, "model": tmp_path / "q"}
    whole = tmp_path / "whole" / "out"

    def end(out: Path) -> list[list[str]]:
        return [finished(out, kind, **arguments)] if ranks == 1 else finished_together(out, **arguments)

    def kill(out: Path, rank: int, number: int) -> bool:
        if ranks == 1:
            return killed(out, "*", number, kind=kind, **arguments)
        return killed_together(out, "*", number, rank, **arguments)

    operations = end(whole)
    for rank, names in enumerate(operations):
        for number in moments(names, count // ranks):
            out = tmp_path / f"{rank}-{number}" / "out"
            assert kill(out, rank, number)
            kills += 1
            if number % 2 and not is_finished(out):
                kills += kill(out, rank, chance.randrange(1, len(names)))
            if not is_finished(out):
                end(out)
            assert_same(out, whole)
    record_property("operations", [len(names) for names in operations])
    record_property("kills", kills)


def test_moments() -> None:
    assert moments(["a", "open 1", "open 2", "b", "b", "c"], 5) == [1, 2, 3, 4, 6]
    assert moments(["a", "b", "c"], 2) == [1, 2]
    assert moments(["a", "a"], 9) == [1, 2]
