"""Packed weights of a folder as dense ones: what a reader needs to see a quantized folder like any other."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mezzotint.core.files import Format, PackedWeight
from mezzotint.errors import ModelError
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
