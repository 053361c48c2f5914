"""Importance matrices of both layouts, and what is wrong with files."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from formats.imatrix_files import write_binary_imatrix, write_gguf_imatrix
from mezzotint.errors import FormatError
from mezzotint.formats.gguf.imatrix import read_imatrix

NAMES = ("blk.0.attn_q.weight", "blk.0.ffn_down.weight", "output.weight")


def squares(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.uniform(0, 9, 32 * (i + 1)).astype(np.float32) for i, name in enumerate(NAMES)}


def test_sums_and_tokens_of_gguf_files(tmp_path: Path) -> None:
    sums = squares()
    write_gguf_imatrix(tmp_path / "i.gguf", sums, {name: [1000.0 + i] for i, name in enumerate(NAMES)})
    found = read_imatrix(tmp_path / "i.gguf").squares
    assert list(found) == sorted(NAMES)
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(found[name].sums, torch.from_numpy(sums[name]), rtol=0, atol=0)
        assert found[name].tokens == 1000 + i


def test_means_of_binary_files(tmp_path: Path) -> None:
    means = squares()
    write_binary_imatrix(tmp_path / "i.dat", means, chunks=7)
    found = read_imatrix(tmp_path / "i.dat").squares
    assert list(found) == list(NAMES)
    for name in NAMES:
        assert found[name].tokens == 7 * 512
        # value * chunks / chunks, two roundings
        mean = found[name].sums / found[name].tokens
        torch.testing.assert_close(mean, torch.from_numpy(means[name]), rtol=2**-23, atol=0)


def test_experts_are_left_out(tmp_path: Path) -> None:
    experts = {"blk.0.ffn_up_exps.weight": np.ones((3, 32))}
    counts = {"blk.0.ffn_up_exps.weight": [4.0, 0.0, 2.0], NAMES[0]: [4.0]}
    write_gguf_imatrix(tmp_path / "i.gguf", {**experts, NAMES[0]: np.ones(32)}, counts)
    assert list(read_imatrix(tmp_path / "i.gguf").squares) == [NAMES[0]]


def test_any_other_file_has_another_checksum(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_binary_imatrix(tmp_path / f"{seed}.dat", squares(seed), chunks=1)
    assert read_imatrix(tmp_path / "0.dat").checksum != read_imatrix(tmp_path / "1.dat").checksum


@pytest.mark.parametrize("kept", [0, 3, 5, 20, 40, 200])
def test_binary_files_cut_short(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "i.dat"
    write_binary_imatrix(path, squares(), chunks=7)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FormatError, match=r"i\.dat is damaged: it is cut short"):
        read_imatrix(path)


@pytest.mark.parametrize("kept", [10, 200, 500])
def test_gguf_files_cut_short(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "i.gguf"
    write_gguf_imatrix(path, squares(), {name: [1.0] for name in NAMES})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FormatError, match="truncated"):
        read_imatrix(path)


def _negative(path: Path) -> None:
    write_binary_imatrix(path, squares() | {NAMES[1]: np.full(64, -1.0)}, chunks=1)


def _infinite(path: Path) -> None:
    write_gguf_imatrix(path, squares() | {NAMES[1]: np.full(64, np.inf)}, {name: [1.0] for name in NAMES})


def _empty(path: Path) -> None:
    path.write_bytes(struct.pack("<3i", 0, 0, 0))


def _text(path: Path) -> None:
    path.write_text("Once upon a time there was not an importance matrix, and it was a text.")


def _no_chunks(path: Path) -> None:
    path.write_bytes(struct.pack("<2i", 1, 3) + b"abc" + struct.pack("<2i", 0, 1) + b"\0" * 4)


def _of_a_model(path: Path) -> None:
    writer = GGUFWriter(path, arch="llama")
    writer.add_tensor("output.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _half(path: Path) -> None:
    whole = path.with_suffix(".whole")
    write_gguf_imatrix(whole, squares(), {name: [1.0] for name in NAMES})
    path.write_bytes(whole.read_bytes().replace(b"output.weight.counts", b"output.weight.countz"))


def _missing(path: Path) -> None:
    """Nothing is there."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_negative, "'blk.0.ffn_down.weight' are negative or not finite"),
        (_infinite, "'blk.0.ffn_down.weight' are negative or not finite"),
        (_empty, "no entry"),
        (_text, "not an importance matrix"),
        (_no_chunks, "'abc' has 1 inputs of 0 chunks"),
        (_of_a_model, "of type None, not 'imatrix'"),
        (_half, "'output.weight' has only one of"),
        (_missing, "does not exist"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "i")
    with pytest.raises(FormatError, match=message):
        read_imatrix(tmp_path / "i")
