"""Opening a model folder to read it, packed by us or not."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mezzotint.formats.decoded import packed_weights
from mezzotint.models import Checkpoint, Source, open_model


def open_source(folder: Path, *, trust_remote_code: bool = False) -> Source:
    """A folder as a source of dense parameters; packed weights are decoded when they are read.

    Raises:
        ModelError: the folder cannot be used.
    """
    return open_model(folder, trust_remote_code=trust_remote_code, decode=decoded)


def decoded(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with dense weights in the place of packed ones.

    Raises:
        FormatError: the packing is not one that can be read.
    """
    found = packed_weights(quantization, checkpoint.tensors, checkpoint.read)
    hidden = {name for weight in found.values() for name in weight.parts}
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in hidden}
    for name, weight in found.items():
        packed = checkpoint.tensors[weight.parts[0]]
        tensors[name] = packed._replace(dtype=weight.dtype, shape=weight.shape)
    derived = {name: weight.dense for name, weight in found.items()}
    return replace(checkpoint, tensors=MappingProxyType(tensors), derived=MappingProxyType(derived))
