"""A whole model in memory with dense weights, from any format."""

import torch
from transformers import PreTrainedModel

from mezzotint.errors import ConfigError
from mezzotint.models import Source, materialize


def dense_model(source: Source, *, device: str, memory: int | None = None) -> PreTrainedModel:
    """Fill the skeleton of a source: it runs and generates like any model of transformers.

    Weights are what `quantize --for dense` would have written, not yet rounded to its dtype.

    Args:
        source: is used up: its skeleton keeps the weights.
        device: ``cpu`` or ``cuda``; float32 on the first, the dtype of the config on the second.
        memory: bytes that the weights may take.

    Raises:
        ConfigError: they take more.
    """
    own = source.config.get_text_config().dtype
    dtype = own if device != "cpu" and isinstance(own, torch.dtype) else torch.float32
    needed = sum(parameter.numel() for parameter in source.skeleton.parameters()) * dtype.itemsize
    if memory is not None and needed > memory:
        raise ConfigError(
            f"the whole model takes {needed / 2**30:.1f} GiB in {dtype}, over --memory ({memory / 2**30:.1f} GiB); "
            "raise --memory; without tasks and generated text a model is evaluated block by block."
        )
    materialize(source.skeleton, "", source.checkpoint, dtype=dtype, device=device)
    for part in (source.skeleton.config, source.skeleton.config.get_text_config()):
        part.use_cache = True
    return source.skeleton
