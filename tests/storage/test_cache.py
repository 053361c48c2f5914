"""What is computed once is read the next time, and what is damaged, foreign or too much never matters."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mezzotint.errors import ConfigError
from mezzotint.storage import cache as module
from mezzotint.storage.cache import LIMIT, Cache

VALUES = {"a": torch.arange(4.0), "b": torch.tensor([True, False])}


class Made:
    """Counts how often it is asked."""

    def __init__(self, tensors: Mapping[str, Tensor] = VALUES) -> None:
        self.times = 0
        self._tensors = tensors

    def __call__(self) -> Mapping[str, Tensor]:
        self.times += 1
        return self._tensors


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(LIMIT, "10000")
    return tmp_path / "mezzotint" / "computed"


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor] = VALUES) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_what_was_made_is_read(folder: Path) -> None:
    made = Made()
    same(Cache().tensors("x", {"model": 1}, made))
    same(Cache().tensors("x", {"model": 1}, made))
    assert made.times == 1
    for kind, depends_on in (("x", {"model": 2}), ("y", {"model": 1})):
        Cache().tensors(kind, depends_on, made)
    assert made.times == 3
    assert len(Cache().files()) == 3


@pytest.mark.parametrize("what", ["program", "torch"])
def test_another_version_computes_again(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made()
    Cache().tensors("x", {}, made)
    if what == "program":
        monkeypatch.setattr(module, "_program", lambda: "another")
    else:
        monkeypatch.setattr(torch, "__version__", "another")
    Cache().tensors("x", {}, made)
    assert made.times == 2


@pytest.mark.parametrize("damage", [b"", b"x" * 100, None])
def test_a_file_that_cannot_be_read_is_made_again(damage: bytes | None, folder: Path) -> None:
    made = Made()
    Cache().tensors("x", {}, made)
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-3] if damage is None else damage)
    same(Cache().tensors("x", {}, made))
    same(Cache().tensors("x", {}, made))
    assert made.times == 2


def test_the_least_recently_used_goes_first(folder: Path) -> None:
    def ask(number: int) -> int:
        made = Made({"a": torch.full((500,), float(number))})  # 2000 bytes and a header
        Cache().tensors("x", {"number": number}, made)
        return made.times

    for number in range(4):
        ask(number)
        for path, age in zip(sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime), range(9, 0, -1), strict=False):
            os.utime(path, (path.stat().st_mtime - age, path.stat().st_mtime - age))
    assert ask(0) == 0  # it is young again
    ask(4)
    assert sum(size for _, size in Cache().files()) <= 10000
    assert [ask(number) for number in (0, 4, 1)] == [0, 0, 1]


@pytest.mark.parametrize("limit", ["0", "20"])
def test_nothing_larger_than_the_limit_is_kept(limit: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, limit)
    made = Made()
    same(Cache().tensors("x", {}, made))
    same(Cache().tensors("x", {}, made))
    assert made.times == 2
    assert Cache().files() == []


def test_a_place_that_cannot_be_written_is_no_fault(folder: Path) -> None:
    folder.parent.touch()  # a file where the folder would be
    made = Made()
    same(Cache().tensors("x", {}, made))
    assert made.times == 1


def test_clearing_removes_everything_of_the_cache_and_nothing_else(folder: Path) -> None:
    Cache().tensors("x", {}, Made())
    (folder.parent / "latency.json").write_text("{}")
    size = sum(size for _, size in Cache().files())
    assert Cache().clear() == size > 0
    assert Cache().files() == []
    assert (folder.parent / "latency.json").exists()


def test_a_limit_that_is_no_number_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "2GB")
    with pytest.raises(ConfigError, match=r"MEZZOTINT_CACHE_BYTES is '2GB'. Give a number of bytes"):
        Cache()
