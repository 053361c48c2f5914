"""Models as data: where weights lie, how to fill a model with them block by block, and what is connected to what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from mezzotint.core.contracts import ModelMap
from mezzotint.errors import ModelError
from mezzotint.models.binding import BoundCheckpoint
from mezzotint.models.checkpoint import Checkpoint, check_folder
from mezzotint.models.infer_map import infer
from mezzotint.models.skeleton import build_skeleton, dematerialize, load_config, materialize

__all__ = ["Checkpoint", "Decoder", "Source", "dematerialize", "materialize", "open_model"]

Decoder = Callable[[Checkpoint, Mapping[str, Any]], Checkpoint]
Reader = Callable[[PreTrainedConfig], Checkpoint]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An opened model: nothing of its weights is in memory.

    Attributes:
        config: as it was read; the skeleton has its own copy.
        skeleton: the modules, without weights.
    """

    folder: Path
    config: PreTrainedConfig
    skeleton: PreTrainedModel
    map: ModelMap
    checkpoint: BoundCheckpoint


def open_model(
    folder: Path | str, *, trust_remote_code: bool = False, decode: Decoder | None = None, read: Reader | None = None
) -> Source:
    """Open the model in ``folder`` without reading its weights.

    Args:
        folder: config.json and safetensors.
        trust_remote_code: run Python code from the folder.
        decode: turns a checkpoint of packed weights into one of dense ones, given its ``quantization_config``; None
            refuses such a folder.
        read: gives the checkpoint of a folder with this config; None reads its safetensors files.

    Raises:
        ModelError: it cannot be used; the message says why and what to do.
    """
    check_folder(Path(folder))  # a name that is no folder must not be looked up in the network
    config = load_config(folder, trust_remote_code)
    checkpoint = Checkpoint.open(folder) if read is None else read(config)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        found = quantization if isinstance(quantization, dict) else quantization.to_dict()
        if decode is None:
            raise ModelError(
                f"the model in {str(folder)!r} is already quantized ({found.get('quant_method')!r}). Give the original "
                "model. [already-quantized]"
            )
        checkpoint = decode(checkpoint, found)
    skeleton = build_skeleton(config, trust_remote_code)
    bound = checkpoint.bind(skeleton)
    return Source(folder=Path(folder), config=config, skeleton=skeleton, map=infer(skeleton, bound), checkpoint=bound)
