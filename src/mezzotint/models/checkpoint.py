"""Tensors of a folder of safetensors files, read by offset.

Headers are parsed here and tensors are read with plain file reads: a mapped file would count as memory of the process,
and the point of reading block by block is that it does not.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mezzotint.core.dtypes import SAFETENSORS_DTYPES
from mezzotint.errors import ModelError, VanishedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mezzotint.models.binding import BoundCheckpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_READ_BYTES = 1 << 30  # Linux reads at most 2^31 - 4096 bytes in one call


class TensorInfo(NamedTuple):
    """Where a tensor lies: ``nbytes`` from ``offset`` of the file on."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Every tensor of a model folder, by the name it has in the files.

    Attributes:
        derived: tensors that are computed when they are read (weights that are stored packed), by name; each also has
            an entry of ``tensors`` with its dtype and shape, whose place is that of the packed codes.
        check: raises where a tensor, by name, is not as it was written.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    derived: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    check: Callable[[str, Tensor], None] | None = None

    @classmethod
    def open(cls, folder: Path | str) -> "Checkpoint":
        """Read the headers of all weight files of ``folder``.

        Raises:
            ModelError: weights are missing, truncated, corrupt, or of another kind than safetensors.
        """
        root = Path(folder)
        check_folder(root)
        if (root / INDEX).is_file():
            return cls(folder=root, tensors=MappingProxyType(_sharded(root)))
        if (root / WEIGHTS).is_file():
            return cls(folder=root, tensors=MappingProxyType(dict(read_header(root / WEIGHTS))))
        raise ModelError(_no_weights(root))

    def read(self, name: str) -> Tensor:
        """One tensor, in its own dtype, read straight into its own memory."""
        if name in self.derived:
            return self.derived[name]()
        info = self.tensors[name]
        value = torch.empty(info.shape, dtype=info.dtype)
        _fill(value, info.path, info.offset)
        if self.check is not None:
            self.check(name, value)
        return value

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are equal bit for bit, compared a piece at a time."""
        a, b = self.tensors[first], self.tensors[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with a.path.open("rb") as left, b.path.open("rb") as right:
            left.seek(a.offset)
            right.seek(b.offset)
            rest = a.nbytes
            while rest > 0:
                size = min(rest, 1 << 22)
                if left.read(size) != right.read(size):
                    return False
                rest -= size
        return True

    def bind(self, skeleton: "PreTrainedModel") -> "BoundCheckpoint":
        """Connect these tensors to the parameters of ``skeleton``."""
        # here, so that reading files does not need transformers
        from mezzotint.models.binding import bind

        return bind(self, skeleton)


def check_folder(root: Path) -> None:
    """Raise a ModelError unless ``root`` is a folder with something in it."""
    if not root.exists():
        raise ModelError(
            f"model folder {str(root)!r} does not exist. Give the folder that holds config.json and {WEIGHTS}."
        )
    if not root.is_dir():
        raise ModelError(f"model {str(root)!r} is a file; a folder is needed. Give the folder that holds config.json.")
    if next(root.iterdir(), None) is None:
        raise ModelError(f"model folder {str(root)!r} is empty. It must hold config.json and {WEIGHTS}.")


def read_header(path: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Names and places of the tensors of one safetensors file, checked against its size.

    Layout: eight bytes with the length N of the header (little endian), N bytes of JSON, then the tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else MAX_HEADER_BYTES + 1
        if length > MAX_HEADER_BYTES:
            raise _corrupt(path, f"its first 8 bytes give no header length up to {MAX_HEADER_BYTES}")
        if size < 8 + length:
            raise _truncated(path, 8 + length, size)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        expected = 8 + length + end
        if size < expected:
            cut = min(
                (e["data_offsets"][1], name) for name, e in entries.items() if 8 + length + e["data_offsets"][1] > size
            )
            raise _truncated(path, expected, size, tensor=cut[1])
        infos = {name: _info(path, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, ModelError):
            raise
        raise _corrupt(path, f"its header cannot be read ({type(error).__name__}: {error})") from error
    if size > expected:
        raise _corrupt(path, f"its header says {expected} bytes, the file has {size}")
    yield from infos.items()


def _info(path: Path, name: str, entry: Mapping[str, Any], start: int) -> TensorInfo:
    kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if kind not in SAFETENSORS_DTYPES:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise ModelError(
            f"{path.name}: tensor {name!r} has dtype {kind!r}; known are {known}. Convert the checkpoint to BF16."
        )
    dtype = SAFETENSORS_DTYPES[kind]
    nbytes = math.prod(shape) * dtype.itemsize
    if begin < 0 or end - begin != nbytes or any(n < 0 for n in shape):
        raise _corrupt(path, f"tensor {name!r} of shape {shape} needs {nbytes} bytes, its place has {end - begin}")
    return TensorInfo(path, dtype, shape, start + begin, nbytes)


def _sharded(root: Path) -> dict[str, TensorInfo]:
    index = root / INDEX
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(index, f"it is not an index of tensors ({type(error).__name__}: {error})") from error
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise _corrupt(index, f"it names the shard {shard!r}, which is not a plain file name")
        if not (root / shard).is_file():
            here = sum((root / other).is_file() for other in set(weight_map.values()))
            raise ModelError(
                f"shard {shard!r} of {str(root)!r} is missing: {here} of {len(set(weight_map.values()))} shards are "
                f"there. Download it again, or finish the download of the model."
            )
        tensors.update(read_header(root / shard))
    for name, shard in weight_map.items():
        if name not in tensors:
            raise _corrupt(index, f"it places tensor {name!r} in {shard!r}, which does not hold it")
    return tensors


def _fill(value: Tensor, path: Path, offset: int) -> None:
    if value.numel() == 0:
        return
    target = memoryview(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise gone(path, f"cannot be opened any more ({error.strerror})") from error
    try:
        while done < len(target):
            count = os.preadv(descriptor, [target[done : done + MAX_READ_BYTES]], offset + done)
            if count == 0:
                raise gone(path, f"is truncated to {path.stat().st_size} bytes")
            done += count
    finally:
        os.close(descriptor)


def gone(path: Path, how: str) -> VanishedError:
    """The error for a file that was there when its header was read."""
    return VanishedError(f"{path} {how}; it was complete when the run began. Restore it.")


def _truncated(path: Path, expected: int, size: int, *, tensor: str | None = None) -> ModelError:
    cut = "" if tensor is None else f" It ends in tensor {tensor!r}."
    return ModelError(
        f"{path.name} is truncated: its header says {expected} bytes, the file has {size}.{cut} Download it again."
    )


def _corrupt(path: Path, why: str) -> ModelError:
    return ModelError(f"{path.name} is corrupt: {why}. Download it again.")


def _no_weights(root: Path) -> str:
    names = sorted(path.name for path in root.iterdir())
    suffixes = {Path(name).suffix for name in names}
    what = f"model folder {str(root)!r} has no {WEIGHTS} and no {INDEX}"
    if ".safetensors" in suffixes:
        found = ", ".join(name for name in names if name.endswith(".safetensors"))
        return f"{what}, only {found}. Rename the single file to {WEIGHTS}, or add the index that lists the shards."
    if suffixes & {".bin", ".pth", ".pt"}:
        found = ", ".join(name for name in names if Path(name).suffix in {".bin", ".pth", ".pt"})
        return (
            f"{what}, only pickled weights ({found}), which can run code when they are read. Convert them where you "
            "trust them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors."
        )
    if ".gguf" in suffixes:
        found = ", ".join(name for name in names if name.endswith(".gguf"))
        return f"{what}, only GGUF ({found}), which is already quantized. Give the original safetensors model."
    return f"{what}: it holds {', '.join(names)}. Download the weights as well as the configuration."
