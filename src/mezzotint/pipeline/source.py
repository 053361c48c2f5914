"""Opening a model folder to read it, quantized by us or not."""

from pathlib import Path

from mezzotint.formats.decoded import decoded
from mezzotint.models import Checkpoint, Source, bind_source, load_config


def open_source(folder: Path, *, trust_remote_code: bool = False) -> Source:
    """A folder as a source of dense parameters; packed weights are decoded when they are read.

    Raises:
        ModelError: the folder cannot be used.
    """
    config = load_config(folder, trust_remote_code)
    checkpoint = Checkpoint.open(folder)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        checkpoint = decoded(checkpoint, settings)
    return bind_source(folder, config, checkpoint, trust_remote_code=trust_remote_code)
