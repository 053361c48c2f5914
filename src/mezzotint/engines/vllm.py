"""Our own format in vLLM: the entry point ``vllm.general_plugins`` calls `register` in each of its processes.

A fused layer may mix anything: each of the matrices that vLLM runs as one keeps its own grid and basis.
"""

# vLLM lives in an environment of its own
# pyright: reportMissingImports=false

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from mezzotint.engines.packed import QuantizedLinear
from mezzotint.errors import FormatError
from mezzotint.formats.native import METHOD, Scheme, read_schemes

_MODE = "MEZZOTINT_VLLM"  # "dense" decodes weights when they are loaded, "packed" keeps them so; packed only on CPUs
_SIZES = ("input_size_per_partition", "output_partition_sizes", "input_size", "output_size", "params_dtype")
_SHARDS = {"qkv_proj": ("q", "k", "v")}  # how vLLM calls the members of a fused layer; others are numbered


def register() -> None:
    """Make the format known to this process; again does nothing."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(MezzotintConfig)


class MezzotintConfig(QuantizationConfig):
    """``quantization_config`` of a folder of our own format.

    Args:
        schemes: of every packed module, by its name in the model.
    """

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        super().__init__()
        self.schemes = dict(schemes)

    @classmethod
    def get_name(cls) -> str:
        """As config.json has it."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Any: codes are decoded in float32."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MezzotintConfig":
        """From config.json.

        Raises:
            FormatError: an unknown version, or something unknown in it.
        """
        return cls(read_schemes(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename modules as vLLM does."""
        self.schemes = hf_to_vllm_mapper.apply_dict(self.schemes)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer in which something is packed; None or vLLM's own for the others."""
        if isinstance(layer, LinearBase):
            stem, _, last = prefix.rpartition(".")
            members = self.packed_modules_mapping.get(last, [last])
            shards = _SHARDS.get(last, tuple(range(len(members)))) if len(members) > 1 else (None,)
            found = {
                shard: self.schemes.get(f"{stem}.{member}" if stem else member)
                for shard, member in zip(shards, members, strict=True)
            }
            return PackedLinears(prefix, found) if any(found.values()) else UnquantizedLinearMethod()
        name = self._table(layer, prefix) if isinstance(layer, VocabParallelEmbedding) else None
        return None if name is None else PackedTable(name, self.schemes[name])

    def _table(self, layer: Any, prefix: str) -> str | None:
        """The name of an embedding or head that is packed; many models give their embedding no name."""
        if prefix:
            return prefix if prefix in self.schemes else None
        shape = layer.org_vocab_size, layer.embedding_dim
        alike = [n for n, scheme in self.schemes.items() if scheme.shape == shape and not n.endswith("lm_head")]
        return alike[0] if len(alike) == 1 else None


class _Arriving:
    """Tensors of a layer as they come from the files, by shard: packed shapes and dtypes are not vLLM's business.

    Args:
        layer: gets a parameter without elements for each name, which vLLM finds and hands tensors to.
        names: of tensors in the module.
    """

    def __init__(self, layer: nn.Module, names: set[str]) -> None:
        self.shards: dict[str | int | None, dict[str, Tensor]] = {}
        self._names = names
        for name in sorted(names):
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = self._taker(name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def _taker(self, name: str) -> Callable[..., None]:
        def take(parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
            del parameter
            self.shards.setdefault(shard, {})[name] = loaded.clone()  # what is loaded may be a view of a mapped file

        return take

    def leave(self, layer: nn.Module) -> None:
        """Remove the parameters again."""
        for name in self._names:
            delattr(layer, name)


class PackedLinears(UnquantizedLinearMethod):
    """A linear layer of vLLM that is made of one or several stored matrices.

    Args:
        prefix: name of the layer.
        schemes: by shard; None for a matrix that is stored dense.
    """

    def __init__(self, prefix: str, schemes: Mapping[str | int | None, Scheme | None]) -> None:
        super().__init__()
        self._prefix = prefix
        self._schemes = schemes

    def create_weights(self, layer: Any, *values: Any, **named: Any) -> None:
        """Make room, and check that the layer is as the matrices are; vLLM gives sizes by place or by name."""
        given = {**dict(zip(_SIZES, values, strict=False)), **named}
        input_size, output_size = given["input_size"], given["output_size"]
        output_partition_sizes = given["output_partition_sizes"]
        if (sum(output_partition_sizes), given["input_size_per_partition"]) != (output_size, input_size):
            raise _divided(self._prefix)
        sizes = output_partition_sizes if len(self._schemes) > 1 else [output_size]
        for (shard, scheme), rows in zip(self._schemes.items(), sizes, strict=True):
            if scheme is not None and scheme.shape != (rows, input_size):
                raise FormatError(
                    f"{self._prefix} ({shard}) is packed with shape {scheme.shape}; vLLM's layer has "
                    f"{(rows, input_size)}."
                )
        names = {name for scheme in self._schemes.values() if scheme is not None for name in scheme.specs()}
        names |= {"weight"} if None in self._schemes.values() else set()
        layer.mezzotint = _Arriving(layer, names)
        layer.mezzotint_dtype = given["params_dtype"]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, and keep it packed, or decode it."""
        with _plain_default():
            self._decide(layer)

    def _decide(self, layer: Any) -> None:
        arrived, dtype = layer.mezzotint, layer.mezzotint_dtype
        arrived.leave(layer)
        mode = os.environ.get(_MODE, "packed" if _on_cpu(arrived) else "dense")
        parts = [
            _module(self._prefix, scheme, arrived.shards.get(shard, {}), dtype)
            for shard, scheme in self._schemes.items()
        ]
        del layer.mezzotint
        if mode == "packed":
            layer.packed = nn.ModuleList(parts)
            _LAYERS.append(layer.packed)
            layer.packed_number, layer.packed_rows = len(_LAYERS) - 1, sum(part.out_features for part in parts)
            return
        rows = [part.dense(dtype) if isinstance(part, QuantizedLinear) else part.weight for part in parts]
        layer.register_parameter("weight", nn.Parameter(torch.cat(rows), requires_grad=False))
        super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias``."""
        if not hasattr(layer, "packed"):
            return super().apply(layer, x, bias)
        y = torch.ops.mezzotint.packed_linears(x, layer.packed_number, layer.packed_rows)
        return y if bias is None else y + bias


class PackedTable(UnquantizedEmbeddingMethod):
    """A token embedding or a head, decoded when it is loaded; a head that shares its weight finds it decoded.

    Args:
        prefix: name of the module.
        scheme: how it is stored.
    """

    def __init__(self, prefix: str, scheme: Scheme) -> None:
        super().__init__()
        self._prefix = prefix
        self._scheme = scheme

    def create_weights(self, layer: Any, *sizes: Any, **extra: Any) -> None:
        """Room for the table, with the rows that vLLM adds, and for what is loaded."""
        super().create_weights(layer, *sizes, **extra)
        if layer.weight.shape[0] < self._scheme.shape[0]:
            raise _divided(self._prefix)
        layer.weight.data.zero_()
        layer.mezzotint = _Arriving(layer, set(self._scheme.specs()))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, and decode it."""
        layer.mezzotint.leave(layer)
        part = _module(self._prefix, self._scheme, layer.mezzotint.shards.get(None, {}), layer.weight.dtype)
        del layer.mezzotint
        assert isinstance(part, QuantizedLinear)
        with _plain_default():
            layer.weight.data[: part.out_features] = part.dense(layer.weight.dtype)
        super().process_weights_after_loading(layer)


def _divided(prefix: str) -> FormatError:
    return FormatError(
        f"{prefix} is divided among ranks, and packed matrices are not. Use --tensor-parallel-size 1, or convert the "
        "folder: mezzotint convert DIR --format compressed-tensors."
    )


_LAYERS: list[nn.ModuleList] = []  # a compiled graph knows layers by their number


@torch.library.custom_op("mezzotint::packed_linears", mutates_args=())
def _packed_linears(x: Tensor, layer: int, rows: int) -> Tensor:  # noqa: ARG001  (rows are for the other one)
    return torch.cat([part(x) for part in _LAYERS[layer]], dim=-1)


@_packed_linears.register_fake
def _(x: Tensor, layer: int, rows: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], rows)


@contextmanager
def _plain_default() -> Iterator[None]:
    """float32 where no dtype is said: vLLM has its own default while it loads."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _on_cpu(arrived: _Arriving) -> bool:
    return all(value.device.type == "cpu" for parts in arrived.shards.values() for value in parts.values())


def _module(
    prefix: str, scheme: Scheme | None, arrived: Mapping[str, Tensor], dtype: torch.dtype
) -> QuantizedLinear | nn.Linear:
    """A matrix as a module of ours, checked; a dense one as an ordinary one."""
    if scheme is None:
        weight = arrived["weight"].to(dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear
    scheme.verify(prefix, arrived)
    packed = QuantizedLinear(scheme, device="meta")
    for name in scheme.specs():
        packed.register_buffer(name, arrived[name])
    return packed
