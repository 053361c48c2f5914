"""Our own format in transformers: importing this registers it, and ``from_pretrained`` loads such folders.

The hook imports this while ``transformers`` itself is being imported: only what its quantizers need can be had here.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mezzotint.engines.packed import Packed, QuantizedEmbedding, QuantizedLinear, TiedHead
from mezzotint.errors import FormatError
from mezzotint.formats.native import METHOD, Scheme, read_schemes


@register_quantization_config(METHOD)
class MezzotintConfig(QuantizationConfigMixin):
    """``quantization_config`` of a folder of our own format, as it is in config.json.

    Raises:
        FormatError: of another version, or with something unknown in it.
    """

    def __init__(self, **settings: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = settings.get("format_version")
        self.schemes = settings.get("schemes")
        self.modules = settings.get("modules")
        read_schemes(self.__dict__)


@register_quantizer(METHOD)
class MezzotintQuantizer(HfQuantizer):
    """Puts a `Packed` module in the place of every one that is stored so, and checks what was loaded into it.

    A head that is tied to a packed embedding becomes a `TiedHead`: one set of tensors serves both.

    ``save_pretrained`` writes the packed tensors as they are: the folder that comes out can be loaded again.
    """

    requires_calibration = True  # models are quantized by `mezzotint.quantize`, not while they are loaded

    def is_serializable(self) -> bool:
        """The state of the model is what is stored."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No gradient flows through packed weights."""
        return False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._packed: dict[str, Packed] = {}
        modules, renamed = dict(model.named_modules()), _renaming(model)
        for name, scheme in read_schemes(self.quantization_config.to_dict()).items():
            found = _find(model, modules, name, renamed(name))
            if found is None:
                continue
            place, module = found
            module = _checked(name, module, scheme)
            if isinstance(module, nn.Embedding):
                embedding = QuantizedEmbedding.pack(module, scheme)
                _share(model, place, embedding)
                self._packed[name] = embedding
                continue
            bias: nn.Parameter | None = module.bias
            packed = QuantizedLinear(
                scheme,
                bias=bias is not None,
                dtype=module.weight.dtype,
                device=module.weight.device,
            )
            model.set_submodule(place, packed)
            self._packed[name] = packed

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, packed in self._packed.items():
            if all(value.device.type != "meta" for value in packed.stored.values()):  # else it lies on the disk still
                packed.verify(name)
        del self._packed


def _renaming(model: Any) -> Callable[[str], str]:
    """Names of modules in the model, by their names in the file: as transformers renames what it loads."""
    # here: both are being imported themselves when this module is
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    wanted = model.state_dict()

    def renamed(name: str) -> str:
        key, _ = rename_source_key(f"{name}.weight", renamings, [], model.base_model_prefix, wanted)
        return key.removesuffix(".weight")

    return renamed


def _find(model: Any, modules: Mapping[str, nn.Module], name: str, renamed: str) -> tuple[str, nn.Module] | None:
    """Name in the model and module of a packed one; None where a model without its head has no place for it."""
    without_head = model.base_model is model
    inside = name.removeprefix(f"{model.base_model_prefix}.") if without_head else name
    for place in (name, inside, renamed):
        if place in modules:
            return place, modules[place]
    if without_head:
        return None
    raise FormatError(
        f"{name} is packed, but {type(model).__name__} has no module of that name. Load the folder with the class that "
        "it was quantized as, or quantize again with --for dense."
    )


def _share(model: Any, place: str, embedding: QuantizedEmbedding) -> None:
    """Heads that share the weight of an embedding get their products from the packed one."""
    for target, owner in list(model.all_tied_weights_keys.items()):
        if owner == f"{place}.weight":
            name = target.removesuffix(".weight")
            model.set_submodule(name, TiedHead(embedding, model.get_submodule(name).bias))
            del model.all_tied_weights_keys[target]


def _checked(name: str, module: nn.Module, scheme: Scheme) -> nn.Linear | nn.Embedding:
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        raise FormatError(
            f"{name} is packed, but this model has a {type(module).__name__} there, not an nn.Linear or nn.Embedding. "
            "Quantize again with --for dense."
        )
    if tuple(module.weight.shape) != scheme.shape:
        raise FormatError(
            f"{name} is packed with shape {scheme.shape}; config.json makes it {tuple(module.weight.shape)}. Make or "
            "download the folder again."
        )
    return module
