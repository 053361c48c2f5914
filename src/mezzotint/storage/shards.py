"""Writing safetensors files whose tensors come one by one, in any order and from any thread."""

import errno
import json
import os
import struct
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from mezzotint.core.dtypes import SAFETENSORS_NAMES
from mezzotint.core.plans import TensorSpec
from mezzotint.errors import OutputError, VanishedError
from mezzotint.storage.checksums import write_checksums
from mezzotint.storage.files import no_space, sync_folder, write_json

JOURNAL = "shards.written"
_CHUNK = 1 << 23
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Two files on different file systems, or a kernel or file system without the call: the plain way instead.
_UNSUPPORTED = frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file: its header, without the eight bytes of length before it, and where each tensor starts."""

    path: Path
    header: bytes
    starts: Mapping[str, int]
    size: int


class ShardWriter:
    """Writes a known list of tensors into the safetensors files of a folder, as they come.

    The files are laid out from the specs alone: space is reserved and headers are written at once, then each tensor
    goes to its place with one positioned write. Only the tensor in hand is in memory. The same specs and values give
    the same bytes, whatever the order. Within a shard wide elements come first, so that every tensor is aligned.

    The eight bytes that give a header's length are written last: until `close` no reader takes a file for a finished
    one. What was `put` before a `checkpoint` survives a killed process, with a checksum: ``resume=True`` continues
    behind it. What was only copied is copied again.

    Example:
        >>> import tempfile
        >>> specs = [TensorSpec("a", torch.float32, (2, 3)), TensorSpec("b", torch.int64, (2,))]
        >>> with tempfile.TemporaryDirectory() as folder, ShardWriter(Path(folder), specs) as writer:
        ...     writer.put("b", torch.tensor([2, 3]))
        ...     writer.put("a", torch.zeros(2, 3))
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        *,
        shard_bytes: int | float = 5e9,
        metadata: Mapping[str, str] | None = None,
        resume: bool = False,
        journal_bytes: int | None = None,
    ) -> None:
        """Lay out the files.

        Args:
            folder: exists; files of these names in it are overwritten unless resumed.
            specs: every tensor that will be written; shards are filled in this order.
            shard_bytes: a shard is closed before it gets larger; a larger tensor is a shard of its own.
            metadata: of the header; ``{"format": "pt"}`` if None, as transformers expects.
            resume: continue a folder that a writer with the same arguments left behind, if there is one.
            journal_bytes: what an earlier `checkpoint` gave: what was recorded after it is forgotten.

        Raises:
            OutputError: no space, or what lies in the folder to be resumed has another layout or other bytes.
        """
        self.folder = folder
        self._specs = {spec.name: spec for spec in specs}
        assert len(self._specs) == len(specs), "a tensor is listed twice"
        self._shards = _layout(folder, specs, int(shard_bytes), metadata)
        self._shard_of = {name: shard for shard in self._shards for name in shard.starts}
        self._lock = threading.Lock()
        self._claimed: set[str] = set()
        self._done: set[str] = set()
        self._checksums: dict[str, int] = {}
        self._recorded: set[str] = set()
        self._files: dict[Path, int] = {}
        self._closed = False
        journal = folder / JOURNAL
        if resume and journal.exists():
            self._checksums = _read_journal(journal, journal_bytes)
            self._recorded = self._checksums.keys() & self._specs.keys()
            self._claimed |= self._recorded
            self._done |= self._recorded
        elif not (resume and self._finished()):
            if journal_bytes is not None:
                raise OutputError(f"{journal} is missing. Remove {folder} and start anew.")
            for shard in self._shards:
                shard.path.unlink(missing_ok=True)
            journal.write_bytes(b"")
        else:
            self._claimed, self._done, self._recorded = set(self._specs), set(self._specs), set(self._specs)
        try:
            for shard in self._shards:
                self._open(shard)
            self._verify()
        except OSError:
            self.release()
            raise

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the tensors that are not written yet, in the order of the specs."""
        with self._lock:
            return tuple(name for name in self._specs if name not in self._done)

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(shard.size for shard in self._shards)

    def put(self, name: str, value: Tensor) -> None:
        """Write one tensor of the list, of exactly the listed dtype and shape.

        Raises:
            OutputError: no space on the disk.
        """
        spec = self._specs[name]
        assert value.dtype == spec.dtype, f"{name} is {value.dtype}; the header says {spec.dtype}"
        assert tuple(value.shape) == tuple(spec.shape), f"{name} is {tuple(value.shape)}; the header says {spec.shape}"
        with self._writing(name) as (target, start):
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            _write_all(target, flat.data, start)
            checksum = zlib.crc32(flat.data)
        with self._lock:
            self._checksums[name] = checksum

    def copy(self, name: str, path: Path, offset: int) -> None:
        """Copy the bytes of one tensor of the list from a file, unchanged and in bounded memory.

        Raises:
            VanishedError: the file is gone, or ends before the tensor does.
            OutputError: no space on the disk.
        """
        size = self._specs[name].nbytes
        with self._writing(name) as (target, start), _source(path) as source:
            copied = _copy_range(source.fileno(), offset, target, start, size)
            if copied < size:
                raise VanishedError(
                    f"{path} is truncated: {name} takes {size} bytes from {offset}, {copied} are there. "
                    "It was complete when the run began. Restore it."
                )

    def checkpoint(self) -> int:
        """Record durably what has been put: a resumed writer continues from here.

        Returns:
            Length of the journal, for ``journal_bytes``.
        """
        with self._lock:
            new = {name: found for name, found in self._checksums.items() if name not in self._recorded}
        for file in self._files.values():
            os.fsync(file)
        # Data first: a name in the journal is a promise that its bytes are on the disk.
        with (self.folder / JOURNAL).open("ab") as journal:
            journal.write("".join(json.dumps(item) + "\n" for item in new.items()).encode())
            journal.flush()
            os.fsync(journal.fileno())
            size = journal.tell()
        self._recorded.update(new)
        return size

    def close(self) -> None:
        """Check that every tensor was written, make the files readable and sync them; a second call does nothing.

        Raises:
            OutputError: tensors are missing; the message names them.
        """
        if self._closed:
            return
        missing = self.missing
        if missing:
            self.release()
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise OutputError(
                f"{self.folder}: {len(missing)} of {len(self._specs)} tensors were never written: {shown}. "
                "The files are incomplete; run again."
            )
        write_checksums(self.folder, self._checksums)
        for file in self._files.values():
            os.fsync(file)  # all tensors before the first header says that they are there
        for shard in self._shards:
            _write_all(self._files[shard.path], memoryview(struct.pack("<Q", len(shard.header))), 0)
            os.fsync(self._files[shard.path])
        self.release()
        if len(self._shards) > 1:
            write_json(self.folder / "model.safetensors.index.json", self._index())
        (self.folder / JOURNAL).unlink(missing_ok=True)
        sync_folder(self.folder)

    def release(self) -> None:
        """Close the files as they are, finished or not."""
        self._closed = True
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.release()

    def _index(self) -> dict[str, object]:
        weight_map = {name: shard.path.name for name, shard in sorted(self._shard_of.items())}
        return {"metadata": {"total_size": sum(s.nbytes for s in self._specs.values())}, "weight_map": weight_map}

    def _finished(self) -> bool:
        """Whether every file lies there complete: the run was killed between closing them and the rename."""
        return all(
            shard.path.is_file() and _starts_with(shard, struct.pack("<Q", len(shard.header)) + shard.header)
            for shard in self._shards
        )

    def _open(self, shard: _Shard) -> None:
        known = any(name in self._recorded for name in shard.starts)
        if known and not _starts_with(shard, shard.header, skip=8):
            raise OutputError(
                f"{shard.path} is not what this run would write: another size or header. "
                f"Remove {self.folder} and start anew."
            )
        with _space_errors(shard.path, shard.size):
            file = os.open(shard.path, os.O_RDWR | os.O_CREAT | (0 if known else os.O_TRUNC), 0o644)
            self._files[shard.path] = file
            if not known:
                _reserve(file, shard.size)
                _write_all(file, memoryview(shard.header), 8)
            elif self.missing:
                _write_all(file, memoryview(bytes(8)), 0)  # it may have been killed while it closed its files

    def _verify(self) -> None:
        """Check the bytes of what an earlier writer recorded."""
        for name in self._recorded & self._checksums.keys():
            shard = self._shard_of[name]
            found, start, rest = 0, shard.starts[name], self._specs[name].nbytes
            while rest:
                data = os.pread(self._files[shard.path], min(_CHUNK, rest), start)
                found, start, rest = zlib.crc32(data, found), start + len(data), rest - len(data)
            if found != self._checksums[name]:
                raise OutputError(
                    f"{shard.path} is damaged: the bytes of {name} are not those that were written. "
                    f"Remove {self.folder} and start anew."
                )

    @contextmanager
    def _writing(self, name: str) -> Iterator[tuple[int, int]]:
        """The file and the offset for a tensor, which counts as written when the block ends well."""
        with self._lock:
            assert not self._closed, f"{name} came after close"
            assert name not in self._claimed, f"{name} is written twice"
            self._claimed.add(name)
        shard = self._shard_of[name]
        try:
            with _space_errors(shard.path, self._specs[name].nbytes):
                yield self._files[shard.path], shard.starts[name]
        except BaseException:
            with self._lock:
                self._claimed.discard(name)
            raise
        with self._lock:
            self._done.add(name)


def _layout(
    folder: Path, specs: Sequence[TensorSpec], shard_bytes: int, metadata: Mapping[str, str] | None
) -> tuple[_Shard, ...]:
    """Fill shards in the order of the specs; an empty list is one file without tensors."""
    runs: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if runs[-1] and size + spec.nbytes > shard_bytes:
            runs.append([])
            size = 0
        runs[-1].append(spec)
        size += spec.nbytes
    names = ["model.safetensors"]
    if len(runs) > 1:
        names = [f"model-{i:05}-of-{len(runs):05}.safetensors" for i in range(1, len(runs) + 1)]
    metadata = {"format": "pt"} if metadata is None else metadata
    return tuple(_shard(folder / name, run, metadata) for name, run in zip(names, runs, strict=True))


def _shard(path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> _Shard:
    # Wide elements first: with a header padded to 8 bytes every tensor then starts at a multiple of its element size.
    specs = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    ends = [0]
    for spec in specs:
        ends.append(ends[-1] + spec.nbytes)
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    for spec, offsets in zip(specs, pairwise(ends), strict=True):
        entries[spec.name] = {
            "dtype": SAFETENSORS_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": list(offsets),
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    first = 8 + len(header)
    starts = {spec.name: first + end for spec, end in zip(specs, ends, strict=False)}
    return _Shard(path, header, starts, first + ends[-1])


def _starts_with(shard: _Shard, expected: bytes, *, skip: int = 0) -> bool:
    if not shard.path.is_file() or shard.path.stat().st_size != shard.size:
        return False
    with shard.path.open("rb") as file:
        file.seek(skip)
        return file.read(len(expected)) == expected


def _read_journal(path: Path, size: int | None) -> dict[str, int]:
    """The recorded names and checksums; cut off behind ``size``, or a last line that a killed run left torn."""
    data = path.read_bytes()
    if size is not None and len(data) < size:
        raise OutputError(f"{path} is truncated: {len(data)} of {size} bytes. Remove {path.parent} and start anew.")
    end = data[:size].rfind(b"\n") + 1
    os.truncate(path, end)
    return dict(json.loads(line) for line in data[:end].splitlines())


def _reserve(file: int, size: int) -> None:
    """Give the file its size, and its blocks where the system can: a full disk shows now and not hours later."""
    if sys.platform == "linux":
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.ftruncate(file, size)


def _source(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise VanishedError(f"{path} cannot be opened any more ({error.strerror}). Restore it.") from error


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _copy_range(source: int, source_offset: int, target: int, target_offset: int, size: int) -> int:
    """Copy bytes inside the kernel where possible; returns how many there were."""
    done = 0
    while done < size and sys.platform == "linux":
        try:
            count = os.copy_file_range(source, target, size - done, source_offset + done, target_offset + done)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            break
        if count == 0:
            break  # the end, or a file system that answers 0 instead of an error: reading tells
        done += count
    while done < size:
        data = os.pread(source, min(_CHUNK, size - done), source_offset + done)
        if not data:
            break
        _write_all(target, memoryview(data), target_offset + done)
        done += len(data)
    return done


@contextmanager
def _space_errors(path: Path, needed: int) -> Iterator[None]:
    """A full disk, quota or file size limit becomes an error of ours that says how much was needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise no_space(path.parent, needed) from error
