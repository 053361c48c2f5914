"""Several processes that share a run: what they tell each other, and that they make what one makes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.errors import MezzotintError, RankError
from mezzotint.process.ranks import ALONE, WHOLE, Ranks, dealt
from mezzotint.recipes.recipe import Rule, load_recipe
from mezzotint.storage import keeper
from mezzotint.storage.work import Work
from runs import TEXT, TINY_LLAMA, assert_same_bits, quantized, tensors_of, tiny
from together import quantized_together, together

# On these models a change in the last bits of a gram turns about one code in a thousand; each code that turns changes
# the inputs of all matrices behind it.
DIFFERENT = 0.02
ERROR = 0.01  # of a block, relative
SPLIT: dict[str, Any] = {"samples": 96, "seqlen": 64}  # two batches to fit on, and one that is held out
RECIPES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "default": ("llama", "default", {**SPLIT, "settings": {"curvature.block_size": 16}}),
    "rtn": ("llama", "rtn", {}),
    "auto": ("llama", "qep-gptq", {"settings": {"target.alpha": "auto"}}),
    "awq": ("llama", "awq", SPLIT),
    "trellis": ("llama", "qep-trellis", {**SPLIT, "bits": 2.5}),
    "quip": ("llama", "quip", {"bits": 3}),
    "gguf": ("llama", "gptq", {"engine": "llama.cpp", "settings": {"grid.kind": "gguf"}}),
    "embeddings": ("llama", "loaq-gptq", {"settings": {"embeddings.kind": "uniform"}, "engine": "mezzotint"}),
    "experts": ("mixtral", "qep-gptq", {"samples": 16}),
    "adapter": ("llama", "gptq", {"settings": {"compensation.kind": "lora", "compensation.rank": 2}}),
    "submodules": ("llama", "lpcd-gptq", {**SPLIT, "settings": {"submodules.parts": ["qk", "vo", "updown"]}}),
    "allocation": (
        "llama",
        "gptq",
        {
            "bits": 3.6,
            "settings": {"allocation.kind": "knapsack", "allocation.windows": 2, "allocation.guard": True}
            | {"grid.group_size": 32},
        },
    ),
    "head": (
        "llama",
        load_recipe("qep-gptq").with_rules([Rule(match="lm_head", keep=False)]),
        {**SPLIT, "memory": 2**30},
    ),
}
QUICK = ("default", "trellis", "submodules", "head")
SLOW = tuple(name for name in RECIPES if name not in QUICK)


def made_by(ranks: tuple[int, ...], names: tuple[str, ...], folder: Path) -> Path:
    """Some recipes by so many ranks: folders ``NAME-RANKS``."""
    models = {name: tiny(name, folder) for name in dict.fromkeys(RECIPES[name][0] for name in names)}
    for size in ranks:
        jobs = [
            (models[RECIPES[name][0]], folder / f"{name}-{size}", RECIPES[name][1], RECIPES[name][2]) for name in names
        ]
        if size == 1:
            quantized_together(ALONE, jobs)
            continue
        for answer in together(size, quantized_together, jobs):
            assert isinstance(answer, list), answer
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by((1, 2, 3), QUICK, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def made_slowly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by((1, 2, 3), SLOW, tmp_path_factory.mktemp("slowly"))


def assert_alike(folder: Path, single: Path) -> None:
    """The same files and tensors, of which few codes differ, and blocks that lose as much."""
    assert {path.name for path in folder.iterdir()} == {path.name for path in single.iterdir()}
    if (folder / "model.gguf").exists():
        pairs = [
            tuple(
                torch.frombuffer(bytearray((f / "model.gguf").read_bytes()), dtype=torch.uint8)
                for f in (folder, single)
            )
        ]
    else:
        found, expected = tensors_of(folder), tensors_of(single)
        assert found.keys() == expected.keys()
        pairs = [(value.view(torch.uint8), expected[name].view(torch.uint8)) for name, value in found.items()]
    different = sum(int((a != b).sum()) for a, b in pairs)
    assert different <= DIFFERENT * sum(a.numel() for a, _ in pairs)
    reports = [json.loads((f / "mezzotint.json").read_text()) for f in (folder, single)]
    for a, b in zip(*(report["blocks"] for report in reports), strict=True):
        assert (a["relative_error"] is None) == (b["relative_error"] is None)
        assert a["relative_error"] is None or a["relative_error"] == pytest.approx(b["relative_error"], rel=ERROR)
    for a, b in zip(*(report["linears"] for report in reports), strict=True):
        assert a["name"] == b["name"]
        assert a["tokens"] == b["tokens"]
        assert a["bits_per_weight"] == b["bits_per_weight"]
        assert a["weight_error"] == pytest.approx(b["weight_error"], rel=ERROR)
        assert a["decisions"].keys() == b["decisions"].keys()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", QUICK)
def test_several_ranks_make_what_one_makes(name: str, ranks: int, made: Path) -> None:
    assert_alike(made / f"{name}-{ranks}", made / f"{name}-1")
    assert json.loads((made / f"{name}-{ranks}" / "mezzotint.json").read_text())["ranks"] == ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", SLOW)
def test_and_with_every_other_stage(name: str, ranks: int, made_slowly: Path) -> None:
    assert_alike(made_slowly / f"{name}-{ranks}", made_slowly / f"{name}-1")


# ---- parts ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 8), max_size=30), st.integers(1, 5))
def test_dealt(sizes: list[int], hands: int) -> None:
    found = dealt(sizes, hands)
    assert len(found) == hands
    assert sorted(index for hand in found for index in hand) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in hand) for hand in found]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def _exchanges(ranks: Ranks) -> dict[str, Any]:
    own = torch.full((2 + ranks.number, 3), ranks.number, dtype=torch.int16)
    summed = torch.randn(1000, 7, generator=torch.Generator().manual_seed(ranks.number))
    ranks.add_([summed])
    tensors = {"a": torch.arange(3), "b": torch.tensor([True, False])}
    return {
        "told": ranks.told({"x": [ranks.number]}),
        "each": ranks.each({"rank": ranks.number, "text": "\n" * ranks.number}),
        "given": ranks.given(tensors if ranks.first else None),
        "total": ranks.total(1.0, 10.0**ranks.number),
        "joined": ranks.joined(own),
        "columns": ranks.joined(own.T, 1),
        "shares": [ranks.share(rows, 16).rows for rows in (160, 40, 32)],
        "summed": summed,
    }


def test_exchanges() -> None:
    answers = together(3, _exchanges)
    for number, answer in enumerate(answers):
        assert answer["told"] == {"x": [0]}
        assert answer["each"] == [{"rank": n, "text": "\n" * n} for n in range(3)]
        assert_same_bits(answer["given"]["a"], torch.arange(3))
        assert_same_bits(answer["given"]["b"], torch.tensor([True, False]))
        assert answer["total"] == (3.0, 111.0)
        rows = torch.tensor([0] * 2 + [1] * 3 + [2] * 4, dtype=torch.int16)[:, None].expand(-1, 3)
        assert_same_bits(answer["joined"], rows.contiguous())
        assert_same_bits(answer["columns"], rows.T.contiguous())
        starts = [0, 48, 96, None], [0, 16, 32, None]
        expected = [slice(bounds[number], bounds[number + 1]) for bounds in starts]
        assert answer["shares"] == [*expected, WHOLE.rows]
        assert_same_bits(answer["summed"], answers[0]["summed"])
    parts = [torch.randn(1000, 7, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    torch.testing.assert_close(answers[0]["summed"], torch.stack(parts).sum(0))


def _late(ranks: Ranks) -> Any:
    if ranks.number == 1:
        time.sleep(3)
    return ranks.each(1)


def test_a_rank_that_does_not_answer() -> None:
    first, _ = together(2, _late, seconds=1)
    assert isinstance(first, RankError)
    assert "rank 0 of 2 got no answer" in str(first)
    assert "--resume" in str(first)


# ---- refused, stopped, killed ---------------------------------------------------------------------------------------


def _refused(_: Ranks, recipe: str, options: dict[str, Any], out: Path) -> str:
    with pytest.raises(MezzotintError) as caught:
        quantized(TINY_LLAMA, out, recipe, **options)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("recipe", "options", "told"),
    [
        ("palette", {"bits": 0.1}, "--bits is 0.1; with this menu"),
        ("gptq", {"samples": 10**6}, "windows"),
    ],
)
def test_what_cannot_be_shared_is_refused(recipe: str, options: dict[str, Any], told: str, tmp_path: Path) -> None:
    first, second = together(2, _refused, recipe, options, tmp_path / "out")
    assert told in first
    # one message is enough, and what every rank finds by itself they say alike
    assert second.startswith("RankError") or second == first
    assert list(tmp_path.iterdir()) == []


def _elsewhere(ranks: Ranks, folder: Path) -> str:
    os.chdir(folder / str(ranks.number))
    return _refused(ranks, "gptq", {}, Path("out"))


def test_a_rank_that_does_not_see_the_output(tmp_path: Path) -> None:
    for number in "01":
        (tmp_path / number).mkdir()
    for answer in together(2, _elsewhere, tmp_path):
        assert "rank 1 does not see" in answer
        assert "file system that all hosts share" in answer
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["0", "1"]


def _stopped(ranks: Ranks, model: Path, out: Path, after: int, number: int) -> Any:
    """A run of which one rank dies behind some matrices."""
    keeper.OVERHEAD = float("inf")  # save behind every group

    def record(work: Work, *arguments: Any, **values: Any) -> None:
        kept(work, *arguments, **values)
        if ranks.number == number and len(work.records) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    kept, Work.record = Work.record, record
    return quantized(model, out, "loaq-gptq", resume=True)


def test_a_dead_rank_ends_the_run_and_others_continue_it(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path)
    for answer in together(2, quantized_together, [(model, tmp_path / "whole", "loaq-gptq", {})]):
        assert isinstance(answer, list), answer
    out = tmp_path / "out"
    first, second = together(2, _stopped, model, out, 5, 1)
    assert second is None
    assert isinstance(first, RankError)
    assert f"The work so far lies in {out}.partial; the same command with --resume continues it." in first.__notes__
    first, *_ = together(3, _stopped, model, out, 9, 0)
    assert first is None
    assert not out.exists()
    state = json.loads((tmp_path / "out.partial" / "work" / "state.json").read_text())["state"]
    assert len(state["streams"]) == 3
    quantized(model, out, "loaq-gptq", resume=True)
    assert_alike(out, tmp_path / "whole")


def test_the_same_ranks_continue_to_the_same_bytes(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path)
    job = (model, tmp_path / "whole", "loaq-gptq", {})
    together(2, quantized_together, [job])
    together(2, _stopped, model, tmp_path / "out", 10, 1)
    together(2, quantized_together, [(model, tmp_path / "out", "loaq-gptq", {"resume": True})])
    for name, value in tensors_of(tmp_path / "whole").items():
        assert_same_bits(tensors_of(tmp_path / "out")[name], value)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """The command line as people start it: a killed rank, and the run continued by two others."""
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "mezzotint", "quantize", str(TINY_LLAMA), "--out", str(out), "--recipe", "qep-gptq", "--bits", "4",
        "--calibration", str(TEXT), "--samples", "256", "--seqlen", "32", "--device", "cpu", "--json", "--resume",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "out.partial" / "work" / "log.jsonl"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not (log.exists() and log.stat().st_size):
            assert run.poll() is None, run.stderr and run.stderr.read()
            time.sleep(0.01)
        os.kill(_pid_of_rank(run.pid, 1), signal.SIGKILL)
        answer, said = run.communicate(timeout=60)
    assert run.returncode == 1
    assert answer == ""
    assert said.count("the same command with --resume continues it") == 1
    assert not out.exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["ranks"] for line in done.stdout.splitlines()] == [2]
    assert "error" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def _pid_of_rank(agent: int, number: int) -> int:
    """Of the process that torchrun started as this rank."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found = path.read_bytes().split(b"\0")
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone, or another user's
            continue
        if parent == agent and f"RANK={number}".encode() in found:
            return int(path.parent.name)
    raise AssertionError(f"no rank {number}")
