"""Tensors in memory up to a budget and in a file past it, and whole runs that must not depend on which."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mezzotint.blockwise import batches, streams
from mezzotint.errors import WriteError
from mezzotint.storage.stores import Budget, Store
from runs import TEXT, TINY_LLAMA, assert_same_bits, assert_same_tensors, least_memory, quantized, tiny

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]


def value_of(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype)


def open_files() -> int:
    """Of this process; 0 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@given(
    limit=st.sampled_from([None, 0, 100, 1000]),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "put", "get", "pop"]),
            st.integers(0, 3),
            st.lists(st.integers(0, 9), max_size=3),
            st.sampled_from(DTYPES),
        ),
        max_size=30,
    ),
)
def test_behaves_like_a_dictionary(
    limit: int | None, steps: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    budget = Budget(limit)
    store, twin = Store(budget, tmp_path_factory.mktemp("spill")), {}
    for seed, (action, index, shape, dtype) in enumerate(steps):
        if action == "put":
            twin[index] = value_of(seed, tuple(shape), dtype)
            store.put(index, twin[index].clone())
        elif index not in twin:
            with pytest.raises(KeyError):
                store.get(index)
        elif action == "get":
            assert_same_bits(store.get(index), twin[index])
        else:
            assert_same_bits(store.pop(index), twin.pop(index))
        assert limit is None or budget.used <= limit
    for index, value in twin.items():
        assert_same_bits(store.get(index), value)
    store.close()
    assert budget.used == 0


def test_the_budget_is_shared(tmp_path: Path) -> None:
    budget = Budget(48)
    first, second = Store(budget, tmp_path), Store(budget, tmp_path)
    first.put(0, torch.ones(8))
    second.put(0, torch.ones(8))
    assert (first.spilled_bytes, second.spilled_bytes, budget.used) == (0, 32, 32)
    first.pop(0)
    second.put(0, torch.zeros(8))
    assert budget.used == 32
    torch.testing.assert_close(second.get(0), torch.zeros(8))
    first.close()
    second.close()


def test_places_in_the_file_are_used_again(tmp_path: Path) -> None:
    store = Store(Budget(0), tmp_path)
    for round_number in range(20):
        for index in range(3):
            store.put(index, value_of(round_number, (10 + (round_number + index) % 5,)))
        store.put(3, value_of(round_number, (14,)))
        store.pop(3)
    # a place is made where no free one is large enough: of each size there are at most as many as tensors at a time
    assert store.spilled_bytes <= 4 * sum(range(10, 15)) * 4
    store.close()


def test_the_file_has_no_name(tmp_path: Path) -> None:
    opened = open_files()
    store = Store(Budget(0), tmp_path / "spill")
    (tmp_path / "spill").mkdir()
    store.put(0, torch.ones(1000))
    assert store.spilled_bytes == 4000
    assert list((tmp_path / "spill").iterdir()) == []
    torch.testing.assert_close(store.get(0), torch.ones(1000))
    store.close()
    assert open_files() == opened


def test_a_full_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(Budget(0), tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WriteError, match=r"cannot write 4000 bytes .* raise --memory"):
        store.put(0, torch.ones(1000))
    store.close()


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    store = Store(Budget(0), tmp_path)
    store.put(0, torch.ones(1000))
    os.truncate(next(path for path in Path("/proc/self/fd").iterdir() if "spill-" in str(path.readlink())), 100)
    with pytest.raises(WriteError, match=r"written to .* 4000 bytes were written, 100 are there.*--resume"):
        store.get(0)
    store.close()


@pytest.mark.parametrize(("name", "target"), [("tiny_llama", "loaq"), ("mixtral", "loaq"), ("gpt_neox", "weight")])
def test_memory_does_not_change_the_result(
    name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name, tmp_path)
    spilled: list[int] = []
    close = Store.close

    def spy(store: Store) -> None:
        spilled.append(store.spilled_bytes)
        close(store)

    monkeypatch.setattr(Store, "close", spy)
    monkeypatch.setattr(batches, "BATCH_TOKENS", 64)
    options: dict[str, Any] = {"bits": 3, "settings": {"target.kind": target}}
    free = quantized(model, tmp_path / "free", **options)
    assert sum(spilled) == 0
    tight = quantized(model, tmp_path / "tight", memory=least_memory(model, **options), **options)
    assert sum(spilled) > 0
    assert_same_tensors(tmp_path / "tight", tmp_path / "free")
    for first, second in zip(free["linears"] + free["blocks"], tight["linears"] + tight["blocks"], strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_memory_does_not_change_padded_windows(tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 3, "settings": {"target.kind": "qep"}, "lines": True, "packing": False}
    text = tmp_path / "lines.txt"
    words = TEXT.read_text(encoding="utf-8").split()
    text.write_text("\n".join(" ".join(words[i * 9 : i * 9 + 2 + i]) for i in range(12)), encoding="utf-8")
    quantized(TINY_LLAMA, tmp_path / "free", calibration=text, **options)
    least = least_memory(TINY_LLAMA, calibration=text, **options)
    quantized(TINY_LLAMA, tmp_path / "tight", calibration=text, memory=least, **options)
    assert_same_tensors(tmp_path / "tight", tmp_path / "free")


def test_a_failed_run_gives_its_files_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> tuple[float, float]:
        raise WriteError("broken on purpose")

    monkeypatch.setattr(streams.Streams, "finish_quantized", broken)
    opened = open_files()
    with pytest.raises(WriteError, match="on purpose"):
        quantized(TINY_LLAMA, tmp_path / "out", memory=least_memory(TINY_LLAMA))
    assert open_files() == opened
    assert not list(tmp_path.rglob("spill-*"))
