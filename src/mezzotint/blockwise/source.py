"""Opens a model folder for reading, quantized by mezzotint or not."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import snapshot_download

from mezzotint.core.plans import PackedWeight
from mezzotint.errors import ModelError
from mezzotint.formats.decoded import block_weights, packed_weights
from mezzotint.formats.gguf import format as gguf
from mezzotint.models import Checkpoint, Source, open_model
from mezzotint.models.checkpoint import TensorInfo
from mezzotint.storage.checksums import checking

# what a model needs; pickles and other frameworks' weights stay on the hub
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")


def local_folder(model: Path, *, trust_remote_code: bool = False) -> Path:
    """The folder of a model: itself, or the local copy of what a hub name ``OWNER/NAME`` stands for.

    Raises:
        ModelError: it is no folder, and the hub cannot give it.
    """
    name = model.as_posix()
    if model.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return model
    try:
        return Path(snapshot_download(name, allow_patterns=[*_WANTED, *(["*.py"] if trust_remote_code else [])]))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model {name!r} is not a folder, and the hub has no model of that name ({reason}). Give the folder "
            "that holds config.json and model.safetensors, or go online."
        ) from error


def open_source(model: Path, *, trust_remote_code: bool = False) -> Source:
    """A model as a source of dense parameters; packed weights are decoded when they are read.

    Args:
        model: a folder, a name on the hub, or a GGUF file of ours beside its config.json and tokenizer.
        trust_remote_code: run Python code from the folder.

    Raises:
        ModelError: it cannot be used.
    """
    return open_packed(model, trust_remote_code=trust_remote_code)[0]


def open_packed(model: Path, *, trust_remote_code: bool = False) -> tuple[Source, Mapping[str, PackedWeight]]:
    """A model as a source of dense parameters, and its packed weights by the names of these.

    Of GGUF files the matrices of blocks count, not the embedding and the head.

    Raises:
        ModelError: it cannot be used.
        FormatError: the packing is not one that can be read.
    """
    file = model if model.suffix == ".gguf" and model.is_file() else model / gguf.FILE
    if file.is_file():
        source = open_model(
            file.parent,
            trust_remote_code=trust_remote_code,
            read=lambda config: of_gguf(file, config.to_dict()),
        )
        return source, block_weights(file, source.config.to_dict())
    packed: dict[str, PackedWeight] = {}

    def decode(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> Checkpoint:
        packed.update(packed_weights(quantization, checkpoint.tensors, checkpoint.read))
        return decoded(checkpoint, packed)

    folder = local_folder(model, trust_remote_code=trust_remote_code)

    def read(_: object) -> Checkpoint:
        return replace(Checkpoint.open(folder), check=checking(folder))

    return open_model(folder, trust_remote_code=trust_remote_code, decode=decode, read=read), packed


def open_original(model: Path, *, trust_remote_code: bool = False) -> Source:
    """A model to quantize; one whose weights are packed already is refused.

    Raises:
        ModelError: it cannot be used.
    """
    return open_model(local_folder(model, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code)


def of_gguf(path: Path, config: Mapping[str, Any]) -> Checkpoint:
    """The tensors of a GGUF file of ours, in float32 under the names of the original checkpoint.

    Raises:
        FormatError: it is damaged or another program's.
    """
    found = gguf.stored_tensors(path, config)
    tensors = {
        name: TensorInfo(path, torch.float32, stored.shape, 0, 4 * math.prod(stored.shape))
        for name, stored in found.items()
    }
    derived = {name: stored.dense for name, stored in found.items()}
    return Checkpoint(folder=path.parent, tensors=MappingProxyType(tensors), derived=MappingProxyType(derived))


def decoded(checkpoint: Checkpoint, found: Mapping[str, PackedWeight]) -> Checkpoint:
    """The checkpoint with dense weights in the place of packed ones."""
    hidden = {name for weight in found.values() for name in weight.parts}
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in hidden}
    for name, weight in found.items():
        packed = checkpoint.tensors[weight.parts[0]]
        tensors[name] = packed._replace(dtype=weight.dtype, shape=weight.shape)
    derived = {name: weight.dense for name, weight in found.items()}
    return replace(checkpoint, tensors=MappingProxyType(tensors), derived=MappingProxyType(derived))
