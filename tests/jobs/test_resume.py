"""Interrupted runs end with the same bytes as uninterrupted ones, or say why they cannot."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.blockwise.streams import Streams
from mezzotint.errors import ConfigError, OutputError, VanishedError, WriteError
from mezzotint.jobs import run
from mezzotint.storage import keeper, saved, work
from mezzotint.storage.folder import MARKER, OutputFolder, differences
from mezzotint.storage.saved import Saved, save
from mezzotint.sweep import calibrate
from mezzotint.sweep.solve import Solver
from runs import TEXT, assert_same_bits, quantized, tiny

RECIPE = "loaq-gptq"


class _StoppedError(Exception):
    """Ends a run at a chosen moment."""


def stop_after(count: int, model: Path, out: Path, recipe: Any = RECIPE, **options: Any) -> None:
    """Run until so many matrices are done, those of earlier processes included."""

    def listener(event: Any) -> None:
        if event.stage == "quantizing" and event.done == count:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        quantized(model, out, recipe, listener=listener, resume=True, **options)


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def weights_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors*"))}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of seven matrices."""
    return tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(llama: Path) -> Path:
    """What an uninterrupted run makes of it."""
    quantized(llama, llama.parent / "whole", RECIPE)
    return llama.parent / "whole"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the state after every group, whatever it costs."""
    monkeypatch.setattr(keeper, "OVERHEAD", float("inf"))


def assert_same(out: Path, whole: Path) -> None:
    """Same files, the same bytes of tensors, and a report that says the same of every matrix and block."""
    assert weights_bytes(out) == weights_bytes(whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert not partial(out).exists()
    reports = [json.loads((folder / "mezzotint.json").read_text()) for folder in (out, whole)]
    for kind in ("linears", "blocks"):
        first, second = ([{**record, "seconds": 0} for record in report[kind]] for report in reports)
        assert first == second


# ---- stopped at every place -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("name", "recipe", "counts", "settings"),
    [
        ("llama", RECIPE, (1, 4, 5, 7, 12), {}),
        ("llama", "rtn", (9,), {}),
        ("llama", "qep-gptq", (11,), {"grid.kind": "trellis", "transform.kind": "hadamard", "grid.bits": 2.5}),
        ("mixtral", "qep-gptq", (3, 9, 20), {}),
        ("gpt2", "loaq-gptq", (3, 6), {}),
        ("llama", "awq", (2, 5, 9), {}),
        ("llama", "lpcd-gptq", (3, 10), {}),
        ("llama", "default", (5,), {"curvature.block_size": 16}),
        ("llama", "gptq", (4, 9), {"compensation.kind": "lora", "compensation.rank": 2}),
    ],
)
def test_stopped_after_some_matrices(
    name: str, recipe: str, counts: tuple[int, ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny(name, tmp_path)
    quantized(model, tmp_path / "whole", recipe, settings=settings)
    for count in counts:
        stop_after(count, model, tmp_path / "out", recipe, settings=settings)
    report = quantized(model, tmp_path / "out", recipe, resume=True, settings=settings)
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert report["times"]["before"] > 0


@pytest.mark.usefixtures("eager")
def test_finished_groups_are_not_solved_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(7 + 5, llama, tmp_path / "out")  # in the third group of the second block: q, k, v, o, gate
    solved: list[str] = []
    solve = Solver.solve

    def spy(solver: Solver, weights: Any, *arguments: Any, **options: Any) -> Any:
        solved.extend(matrix.name for matrix, _ in weights)
        return solve(solver, weights, *arguments, **options)

    kept: list[int] = []
    run_original = Streams.run_original

    def watched(streams: Streams, block: int, module: Any, wanted: Any) -> None:
        kept.extend(wanted)
        run_original(streams, block, module, wanted)

    monkeypatch.setattr(Solver, "solve", spy)
    monkeypatch.setattr(Streams, "run_original", watched)
    quantized(llama, tmp_path / "out", RECIPE, resume=True)
    assert kept == [2, 3]  # inputs of the others are not wanted again
    assert [name.removeprefix("model.layers.") for name in solved[:3]] == [
        "1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj",
    ]  # fmt: skip
    assert len(solved) == 3


def test_groups_behind_a_border_that_was_not_saved(
    llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where saving hidden states takes long and weights do not, a block may be over before its border is due."""
    with monkeypatch.context() as patched:
        patched.setattr(keeper.Keeper, "_due", lambda _, kind: kind == "group")
        stop_after(12, llama, tmp_path / "out")
    quantized(llama, tmp_path / "out", RECIPE, resume=True)
    assert_same(tmp_path / "out", whole)


@pytest.mark.usefixtures("eager")
def test_memory_and_place_of_the_text_may_change(llama: Path, whole: Path, tmp_path: Path) -> None:
    stop_after(9, llama, tmp_path / "out")
    text = Path(shutil.copy(TEXT, tmp_path / "moved.txt"))
    quantized(llama, tmp_path / "out", RECIPE, resume=True, memory=2**30, calibration=text)
    assert_same(tmp_path / "out", whole)


def test_sampled_text_is_not_sampled_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"calibration": "self", "samples": 2, "seqlen": 8}
    quantized(llama, tmp_path / "whole", RECIPE, **options)
    stop_after(9, llama, tmp_path / "out", **options)
    monkeypatch.setattr(calibrate, "sample_windows", None)
    quantized(llama, tmp_path / "out", RECIPE, resume=True, **options)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_the_curvature_is_not_measured_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(llama, tmp_path / "whole", "default")
    stop_after(9, llama, tmp_path / "out", "default")
    monkeypatch.setattr(run, "planned_curvature", None)
    quantized(llama, tmp_path / "out", "default", resume=True)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_stopped_at_the_rename(llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise _StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "finish", stop)
        with pytest.raises(_StoppedError):
            quantized(llama, tmp_path / "out", RECIPE)
    quantized(llama, tmp_path / "out", RECIPE, resume=True)
    assert_same(tmp_path / "out", whole)


@pytest.mark.usefixtures("eager")
def test_a_gguf_file(llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"engine": "llama.cpp", "settings": {"grid.kind": "gguf"}}
    quantized(llama, tmp_path / "whole", "rtn", **options)
    stop_after(9, llama, tmp_path / "out", "rtn", **options)
    quantized(llama, tmp_path / "out", "rtn", resume=True, **options)
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (tmp_path / "whole" / "model.gguf").read_bytes()


@pytest.mark.usefixtures("eager")
@pytest.mark.slow
def test_an_allocation_with_two_candidates(llama: Path, tmp_path: Path) -> None:
    settings = {"allocation.kind": "knapsack", "allocation.windows": 2, "allocation.guard": True, "grid.group_size": 32}
    options: dict[str, Any] = {"bits": 3.6, "settings": settings}
    quantized(llama, tmp_path / "whole", "gptq", **options)
    seen: set[int] = set()

    def listener(event: Any) -> None:
        seen.add(event.done if event.stage == "quantizing" else 0)
        if {14, 3} <= seen and event.done == 3:  # in the second candidate
            raise _StoppedError

    with pytest.raises(_StoppedError):
        quantized(llama, tmp_path / "out", "gptq", listener=listener, **options)
    assert {path.name for path in partial(tmp_path / "out").iterdir()} == {MARKER, "allocated", "uniform.partial"}
    quantized(llama, tmp_path / "out", "gptq", resume=True, **options)
    assert weights_bytes(tmp_path / "out") == weights_bytes(tmp_path / "whole")
    assert not partial(tmp_path / "out").exists()


def test_nothing_to_resume_starts(llama: Path, whole: Path, tmp_path: Path) -> None:
    quantized(llama, tmp_path / "out", RECIPE, resume=True)
    assert_same(tmp_path / "out", whole)


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and beside it a run of it that was stopped in its second block."""
    folder = tmp_path_factory.mktemp("stopped")
    tiny("llama", folder).rename(folder / "model")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keeper, "OVERHEAD", float("inf"))
        stop_after(12, folder / "model", folder / "out")
    return folder


@pytest.fixture
def again(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(stopped, tmp_path / "again"))


def edited(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(data: bytearray) -> None:
    data[-100] ^= 1


def flip_first(data: bytearray) -> None:
    """A bit of the first tensor of a safetensors file."""
    data[data.index(b"]}}") + 20] ^= 1


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bits": 3}, r"recipe.grid.bits \(was null, is 3\)"),
        ({"recipe": "gptq"}, r"recipe.name \(was \"loaq-gptq\", is \"gptq\"\)"),
        ({"settings": {"rounding.damping": 0.02}}, r"recipe.rounding.damping \(was null, is 0.02\)"),
        ({"seed": 1}, r"seed \(was 0, is 1\)"),
        ({"samples": 9}, r"calibration.samples \(was 8, is 9\)"),
        ({"keep": ["*.0.mlp.*"]}, "recipe.rules"),
        ({"engine": "mezzotint"}, "engine"),
        ({"precision": "bfloat16"}, r"precision \(was \"float32\", is \"bfloat16\"\)"),
    ],
)
def test_another_request_is_refused(changes: dict[str, Any], told: str, again: Path) -> None:
    before = contents(again)
    with pytest.raises(ConfigError, match=told):
        quantized(again / "model", again / "out", **{"recipe": RECIPE, **changes}, resume=True)
    assert contents(again) == before


def test_another_model_is_refused(again: Path) -> None:
    edited(again / "model" / "model.safetensors", flip)
    with pytest.raises(ConfigError, match=r"model.model.safetensors \(was \[\d+, \d+\], is \[\d+, \d+\]\)"):
        quantized(again / "model", again / "out", RECIPE, resume=True)


def test_another_text_is_refused(again: Path) -> None:
    text = again / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8").replace("the", "thy"), encoding="utf-8")
    before = contents(again / "out.partial")
    with pytest.raises(ConfigError, match=r"the calibration text from .*text.txt.* changed"):
        quantized(again / "model", again / "out", RECIPE, resume=True, calibration=text)
    assert contents(again / "out.partial") == before


def test_without_resume_the_work_is_refused(again: Path) -> None:
    with pytest.raises(OutputError, match=r"unfinished work of an earlier run. Continue it with --resume"):
        quantized(again / "model", again / "out", RECIPE)


@pytest.mark.parametrize(
    ("pattern", "change", "told"),
    [
        (
            "work/streams-00001.bin",
            lambda data: data.__delitem__(slice(-8, None)),
            r"streams-00001.bin is truncated: \d+ of",
        ),
        ("work/streams-00001.bin", flip, r"streams-00001.bin is damaged at 'original.\d'"),
        ("work/values-00001-0.bin", flip, r"values-00001-0.bin is damaged at 'model.layers.1.self_attn.v_proj'"),
        ("work/state.json", flip, r"state.json is damaged"),
        ("work/state.json", lambda data: data.__delitem__(slice(-9, None)), r"state.json is damaged"),
        ("work/log.jsonl", lambda data: data.__delitem__(slice(-5000, None)), r"log.jsonl is truncated or damaged"),
        ("model.safetensors", flip_first, r"model.safetensors is damaged: the bytes of model.layers.0"),
        ("shards.written", lambda data: data.clear(), r"shards.written is truncated"),
        ("shards.written", None, r"shards.written is missing"),
        ("work/streams-00001.bin", None, r"streams-00001.bin is missing"),
    ],
)
def test_damaged_work_is_named(pattern: str, change: Callable[[bytearray], Any] | None, told: str, again: Path) -> None:
    if change is None:
        (again / "out.partial" / pattern).unlink()
    else:
        edited(again / "out.partial" / pattern, change)
    with pytest.raises(OutputError, match=told + r".*emove .*start anew"):
        quantized(again / "model", again / "out", RECIPE, resume=True)
    assert (again / "out.partial").exists()


# ---- disks and shards -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("what", ["shards", "streams", "state"])
def test_a_full_disk_stops_and_resumes(
    what: str, llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"shards": (os, "pwrite"), "streams": (saved, "replacing"), "state": (work, "write_json")}

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def listener(event: Any) -> None:
        if event.done == 11:
            patched.setattr(*places[what], full)

    with monkeypatch.context() as patched, pytest.raises(WriteError, match=r"(?i)no space (left|to)") as caught:
        quantized(llama, tmp_path / "out", RECIPE, listener=listener)
    assert "the same command with --resume continues it" in caught.value.__notes__[-1]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    quantized(llama, tmp_path / "out", RECIPE, resume=True)
    assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize(("done", "how"), [(9, "gone"), (9, "short"), (14, "gone")])
def test_a_shard_that_vanishes(done: int, how: str, llama: Path, whole: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    weights = model / "model.safetensors"

    def listener(event: Any) -> None:
        if event.done == done and weights.exists():
            weights.rename(model / "away")
            if how == "short":
                weights.write_bytes((model / "away").read_bytes()[:1000])

    told = r"model.safetensors (cannot be opened any more|is truncated to 1000 bytes).*(Restore it|[Pp]ut it back)"
    with pytest.raises(VanishedError, match=told):
        quantized(model, tmp_path / "out", RECIPE, listener=listener)
    (model / "away").replace(weights)
    quantized(model, tmp_path / "out", RECIPE, resume=True)
    assert_same(tmp_path / "out", whole)


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_saved_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(True), "c": torch.zeros(0, 2), "d": torch.arange(5)}
    index = json.loads(json.dumps(save(tmp_path / "x.bin", tensors.items())))
    found = Saved(tmp_path, [index])
    assert found.names == tuple(tensors)
    assert "e" not in found
    for name, value in tensors.items():
        assert_same_bits(found.read(name), value)


def test_differences() -> None:
    assert differences({"a": 1, "b": {"c": [1]}}, {"b": {"c": [2]}, "a": 1}) == ["b.c (was [1], is [2])"]
    assert differences({"a": 1}, {"a": 1, "d": {"e": 0}}) == ['d (was null, is {"e": 0})']
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []
