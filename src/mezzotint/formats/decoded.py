"""Decodes packed weights of a folder, so that a quantized folder can be read like any other."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.core.plans import Format, PackedWeight
from mezzotint.errors import ModelError
from mezzotint.formats.gguf import format as gguf
from mezzotint.registry import FORMATS


def packed_weights(
    quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
) -> Mapping[str, PackedWeight]:
    """Every packed weight of a folder, by the name its dense weight would have, read by the format that knows it.

    Args:
        quantization: ``quantization_config`` of config.json.
        tensors: by name; ``dtype`` and ``shape`` of each are read.
        read: gives a tensor by name.

    Raises:
        ModelError: no format knows the folder.
        FormatError: a packed weight that nothing in the config describes; when one of our own format is decoded, also
            that it is damaged.
    """
    for name in FORMATS:
        form: Format = FORMATS[name]()
        found = form.packed(quantization, tensors, read)
        if found is not None:
            return found
    method, layout = quantization.get("quant_method"), quantization.get("format")
    raise ModelError(
        f"the model is already quantized: quantization_config has quant_method {method!r}, format {layout!r}, and none "
        f"of the formats {', '.join(FORMATS)} reads that. Give the original model. [already-quantized]"
    )


def block_weights(path: Path, config: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """The matrices of blocks in a GGUF file of ours, by the names of their weights in a checkpoint; not the tables.

    Args:
        path: of the file.
        config: of the model, as a dictionary.

    Raises:
        FormatError: the file is damaged or another program's.
    """
    found = {}
    for name, stored in gguf.stored_tensors(path, config).items():
        if stored.grid is not None and stored.place not in gguf.TABLES:
            rows, columns = stored.shape
            found[name] = PackedWeight(
                parts=(stored.place,),
                dtype=torch.float32,
                shape=(rows, columns),
                grid=stored.grid,
                transform=None,
                weight=stored.weight,
            )
    return found
