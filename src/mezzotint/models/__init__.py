"""Models as data: where weights lie, how to fill a model with them block by block, and what is connected to what."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from mezzotint.core.contracts import ModelMap
from mezzotint.errors import ModelError
from mezzotint.models.binding import BoundCheckpoint
from mezzotint.models.checkpoint import Checkpoint, check_folder
from mezzotint.models.generic import infer
from mezzotint.models.skeleton import build_skeleton, load_config

__all__ = ["Source", "open_model"]


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


def open_model(folder: Path | str, *, trust_remote_code: bool = False) -> Source:
    """Open the model in ``folder`` without reading its weights.

    Raises:
        ModelError: it cannot be used; the message says why and what to do.
    """
    check_folder(Path(folder))  # a name that is no folder must not be looked up in the network
    config = load_config(folder, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"the model in {str(folder)!r} is already quantized (compressed-tensors). Give the original model. "
            "[already-quantized]"
        )
    checkpoint = Checkpoint.open(folder)
    skeleton = build_skeleton(config, trust_remote_code)
    bound = checkpoint.bind(skeleton)
    return Source(folder=Path(folder), config=config, skeleton=skeleton, map=infer(skeleton, bound), checkpoint=bound)
