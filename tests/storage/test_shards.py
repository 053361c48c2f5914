"""The writer of safetensors files: any order, any thread, any end."""

import errno
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.core.dtypes import SAFETENSORS_NAMES
from mezzotint.core.plans import TensorSpec
from mezzotint.errors import ModelError, OutputError
from mezzotint.storage import shards
from mezzotint.storage.checksums import FILE as CHECKSUMS
from mezzotint.storage.shards import JOURNAL, ShardWriter

INDEX = "model.safetensors.index.json"


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]


def some_tensors(count: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtypes = [torch.bfloat16, torch.int32, torch.float32, torch.uint8, torch.int64, torch.float16]
    return {
        f"tensor.{i}": torch.randint(0, 100, (3 + i, 5), generator=generator).to(dtypes[i % len(dtypes)])
        for i in range(count)
    }


def read(folder: Path) -> dict[str, Tensor]:
    """As transformers does: by the index if there is one."""
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = {name: load_file(folder / name) for name in set(weight_map.values())}
        return {name: files[file][name] for name, file in weight_map.items()}
    return load_file(folder / "model.safetensors")


def assert_holds(folder: Path, tensors: dict[str, Tensor]) -> None:
    found = read(folder)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(data=st.data(), shard_bytes=st.integers(1, 2000))
def test_any_tensors_in_any_order(data: st.DataObject, shard_bytes: int, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("shards")
    shapes = data.draw(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=8))
    dtypes = st.sampled_from(sorted(SAFETENSORS_NAMES, key=str))
    tensors = {}
    for i, shape in enumerate(shapes):
        dtype = data.draw(dtypes)
        size = shape[0] * shape[1] * dtype.itemsize
        raw = torch.randint(0, 2, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        tensors[f"n{i}é"] = raw.view(dtype).reshape(shape)
    with ShardWriter(folder, specs_of(tensors), shard_bytes=shard_bytes) as writer:
        for name in data.draw(st.permutations(list(tensors))):
            writer.put(name, tensors[name])
    assert_holds(folder, tensors)
    assert not (folder / JOURNAL).exists()


def test_scalars_and_views(tmp_path: Path):
    tensors = {"scalar": torch.tensor(3.0), "view": torch.arange(12).reshape(3, 4).t(), "row": torch.ones(4, 4)[1]}
    with ShardWriter(tmp_path, specs_of(tensors)) as writer:
        for name, value in tensors.items():
            writer.put(name, value)
    assert_holds(tmp_path, tensors)


@pytest.mark.parametrize("shard_bytes", [1, 60, 100, 5e9])
def test_bytes_depend_on_nothing_but_the_tensors(shard_bytes: float, tmp_path: Path):
    tensors = some_tensors()
    for folder, order in (("a", list(tensors)), ("b", list(tensors)[::-1])):
        (tmp_path / folder).mkdir()
        with ShardWriter(tmp_path / folder, specs_of(tensors), shard_bytes=shard_bytes) as writer:
            for name in order:
                writer.put(name, tensors[name])
            assert writer.total_bytes == sum(f.stat().st_size for f in (tmp_path / folder).glob("*.safetensors"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_names_index_and_limits_of_shards(tmp_path: Path):
    tensors = {"a": torch.zeros(10), "b": torch.zeros(10), "big": torch.zeros(100), "c": torch.zeros(10)}
    with ShardWriter(tmp_path, specs_of(tensors), shard_bytes=80) as writer:
        for name, value in tensors.items():
            writer.put(name, value)
    index = json.loads((tmp_path / INDEX).read_text())
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index == {
        "metadata": {"total_size": 520},
        "weight_map": {"a": names[0], "b": names[0], "big": names[1], "c": names[2]},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, INDEX, CHECKSUMS])


def test_header_is_aligned_and_says_pt(tmp_path: Path):
    tensors = {"odd": torch.zeros(3, dtype=torch.uint8), "wide": torch.zeros(3, dtype=torch.int64)}
    with ShardWriter(tmp_path, specs_of(tensors)) as writer:
        for name, value in tensors.items():
            writer.put(name, value)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert header["wide"]["data_offsets"] == [0, 24]  # before the narrow one, so that both are aligned
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_threads(tmp_path: Path):
    tensors = some_tensors(60)
    with ShardWriter(tmp_path, specs_of(tensors), shard_bytes=500) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: writer.put(name, tensors[name]), tensors))
    assert_holds(tmp_path, tensors)


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["copies", "refuses", "answers nothing"])
def test_copy(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: int) -> int:
        raise OSError(errno.EXDEV, "other file system")

    if kernel != "copies":
        monkeypatch.setattr(os, "copy_file_range", refuse if kernel == "refuses" else lambda *_: 0, raising=False)
    monkeypatch.setattr(shards, "_CHUNK", 1000)  # several chunks
    tensors = {"a": torch.randn(700), "b": torch.randn(31, 7).to(torch.bfloat16)}
    source = tmp_path / "source.bin"
    prefix = b"prefix"
    source.write_bytes(prefix + b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors.values()) + b"more")
    offsets = {"a": len(prefix), "b": len(prefix) + 2800}
    with ShardWriter(tmp_path, specs_of(tensors)) as writer:
        for name in ("b", "a"):
            writer.copy(name, source, offsets[name])
    assert_holds(tmp_path, tensors)


def test_copy_of_a_truncated_file_names_it(tmp_path: Path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"x" * 50)
    writer = ShardWriter(tmp_path, [TensorSpec("a", torch.float32, (20,))])
    with pytest.raises(ModelError, match=r"source.bin is truncated: a takes 80 bytes from 10, 40 are there"):
        writer.copy("a", source, 10)
    assert writer.missing == ("a",)
    writer.copy("a", Path("/dev/zero"), 0)
    writer.close()
    assert_holds(tmp_path, {"a": torch.zeros(20)})


# ---- wrong use and wrong disks --------------------------------------------------------------------------------------


def test_wrong_values_are_our_own_faults(tmp_path: Path):
    spec = TensorSpec("a", torch.float32, (2,))
    with pytest.raises(AssertionError, match="listed twice"):
        ShardWriter(tmp_path, [spec, spec])
    writer = ShardWriter(tmp_path, [spec])
    with pytest.raises(AssertionError, match=r"the header says torch\.float32"):
        writer.put("a", torch.zeros(2, dtype=torch.int32))
    with pytest.raises(AssertionError, match=r"the header says \(2,\)"):
        writer.put("a", torch.zeros(3))
    writer.put("a", torch.zeros(2))
    with pytest.raises(AssertionError, match="written twice"):
        writer.put("a", torch.zeros(2))
    writer.close()
    writer.close()
    with pytest.raises(AssertionError, match="after close"):
        writer.put("a", torch.zeros(2))


def test_close_names_what_is_missing(tmp_path: Path):
    tensors = some_tensors(9)
    writer = ShardWriter(tmp_path, specs_of(tensors))
    writer.put("tensor.4", tensors["tensor.4"])
    with pytest.raises(OutputError, match=r"8 of 9 tensors were never written: tensor.0, .*tensor.5, \.\.\."):
        writer.close()


def test_unfinished_files_are_no_safetensors(tmp_path: Path):
    tensors = some_tensors()
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, specs_of(tensors)) as writer:  # noqa: PT012
        for name, value in tensors.items():
            writer.put(name, value)
        raise KeyboardInterrupt
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "model.safetensors")


def test_full_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = ShardWriter(tmp_path, [TensorSpec("a", torch.float32, (1000,))])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"4,000 bytes are needed, [\d,]+ are available.*choose another --out"):
        writer.put("a", torch.zeros(1000))
    monkeypatch.undo()
    writer.put("a", torch.zeros(1000))  # there is space again
    writer.close()
    assert_holds(tmp_path, {"a": torch.zeros(1000)})


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = ShardWriter(tmp_path, [TensorSpec("a", torch.float32, (2,))])

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        writer.put("a", torch.zeros(2))
    assert not isinstance(caught.value, OutputError)


def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    tensors = some_tensors()
    with ShardWriter(tmp_path, specs_of(tensors)) as writer:
        for name, value in tensors.items():
            writer.put(name, value)
    assert_holds(tmp_path, tensors)


LIMITED = """
import resource, sys, torch
from pathlib import Path
from mezzotint.core.plans import TensorSpec
from mezzotint.errors import OutputError
from mezzotint.storage.shards import ShardWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    ShardWriter(Path(sys.argv[1]), [TensorSpec("a", torch.float32, (100_000,))])
except OutputError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow  # starts an interpreter
def test_file_size_limit_shows_at_once(tmp_path: Path):
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert "bytes are needed" in done.stderr


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_system_that_cannot_reserve(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: int) -> None:
        raise OSError(code, "not here")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    tensors = some_tensors()
    with ShardWriter(tmp_path, specs_of(tensors)) as writer:
        for name, value in tensors.items():
            writer.put(name, value)
    assert_holds(tmp_path, tensors)


def test_reserving_more_than_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match="no space to write"):
        ShardWriter(tmp_path, specs_of(some_tensors()))


# ---- resuming -------------------------------------------------------------------------------------------------------


def whole(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> dict[str, bytes]:
    folder.mkdir()
    with ShardWriter(folder, specs_of(tensors), shard_bytes=shard_bytes) as writer:
        for name, value in tensors.items():
            writer.put(name, value)
    return contents(folder)


@given(stop=st.integers(0, 12), recorded=st.integers(0, 12), shard_bytes=st.integers(1, 600))
def test_resumed_writer_ends_with_the_same_bytes(
    stop: int, recorded: int, shard_bytes: int, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("resumed")
    tensors = some_tensors(12)
    expected = whole(folder / "whole", tensors, shard_bytes)
    (folder / "killed").mkdir()
    writer = ShardWriter(folder / "killed", specs_of(tensors), shard_bytes=shard_bytes)
    for i, (name, value) in enumerate(list(tensors.items())[:stop]):
        if i == recorded:
            writer.checkpoint()
        writer.put(name, value)
    writer.release()
    with ShardWriter(folder / "killed", specs_of(tensors), shard_bytes=shard_bytes, resume=True) as writer:
        # only what was recorded counts: the rest may not have reached the disk
        assert len(writer.missing) == 12 - (recorded if recorded < stop else 0)
        for name in writer.missing:
            writer.put(name, tensors[name])
    assert contents(folder / "killed") == expected


def test_torn_journal_line_does_not_count(tmp_path: Path):
    tensors = some_tensors()
    writer = ShardWriter(tmp_path, specs_of(tensors))
    writer.put("tensor.0", tensors["tensor.0"])
    writer.checkpoint()
    writer.release()
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(b'"tensor.1')
    writer = ShardWriter(tmp_path, specs_of(tensors), resume=True)
    assert "tensor.1" in writer.missing
    assert "tensor.0" not in writer.missing
    writer.put("tensor.1", tensors["tensor.1"])
    writer.checkpoint()
    writer.release()
    writer = ShardWriter(tmp_path, specs_of(tensors), resume=True)
    assert writer.missing == tuple(tensors)[2:]
    writer.release()


def test_resume_after_the_end_and_with_nothing(tmp_path: Path):
    tensors = some_tensors()
    expected = whole(tmp_path / "done", tensors, 100)
    with ShardWriter(tmp_path / "done", specs_of(tensors), shard_bytes=100, resume=True) as writer:
        assert writer.missing == ()
    assert contents(tmp_path / "done") == expected
    (tmp_path / "empty").mkdir()
    with ShardWriter(tmp_path / "empty", specs_of(tensors), shard_bytes=100, resume=True) as writer:
        assert len(writer.missing) == len(tensors)
        for name, value in tensors.items():
            writer.put(name, value)
    assert contents(tmp_path / "empty") == expected


def test_resume_under_another_layout_is_refused(tmp_path: Path):
    tensors = some_tensors()
    writer = ShardWriter(tmp_path, specs_of(tensors))
    writer.put("tensor.0", tensors["tensor.0"])
    writer.checkpoint()
    writer.release()
    other = specs_of(tensors | {"tensor.1": torch.zeros(2)})
    with pytest.raises(OutputError, match="is not what this run would write"):
        ShardWriter(tmp_path, other, resume=True)


def test_without_resume_everything_starts_anew(tmp_path: Path):
    tensors = some_tensors()
    whole(tmp_path / "done", tensors, 100)
    writer = ShardWriter(tmp_path / "done", specs_of(tensors), shard_bytes=100)
    assert writer.missing == tuple(tensors)
    writer.release()


def test_empty_list(tmp_path: Path):
    ShardWriter(tmp_path, []).close()
    assert load_file(tmp_path / "model.safetensors") == {}


def test_reads_what_safetensors_itself_wrote(tmp_path: Path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "theirs.safetensors")
    header = int.from_bytes((tmp_path / "theirs.safetensors").read_bytes()[:8], "little")
    entries = json.loads((tmp_path / "theirs.safetensors").read_bytes()[8 : 8 + header])
    with ShardWriter(tmp_path, specs_of(tensors)) as writer:
        for name in tensors:
            writer.copy(name, tmp_path / "theirs.safetensors", 8 + header + entries[name]["data_offsets"][0])
    assert_holds(tmp_path, tensors)
