"""Packed weights of a folder as dense ones: what a reader needs to see a quantized folder like any other."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.contracts import Grid, Matrix, QuantizedWeight, Transform
from mezzotint.core.files import Format
from mezzotint.errors import FormatError
from mezzotint.formats import gptq, native
from mezzotint.formats.compressed_tensors import CompressedTensors
from mezzotint.formats.schemes import uniform_grid
from mezzotint.grids.uniform import UniformGrid

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """One weight of a packed folder.

    Attributes:
        parts: names of the tensors that store it; the first holds the codes.
        dtype: what dense values are rounded to by engines: that of the scales in stock formats.
        grid: that it is on.
        transform: whose basis the codes are in, or None.
        weight: reads the parts, and checks them.
    """

    parts: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, int]
    grid: Grid
    transform: Transform | None
    weight: Callable[[], QuantizedWeight]

    def dense(self) -> Float[Tensor, "out in"]:
        """Its values, unrounded, in float32."""
        return self.weight().dense()


def packed_weights(
    quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
) -> dict[str, PackedWeight]:
    """Every packed weight of a folder, by the name its dense weight would have.

    Args:
        quantization: ``quantization_config`` of config.json.
        tensors: by name; ``dtype`` and ``shape`` of each are read.
        read: gives a tensor by name.

    Raises:
        FormatError: a packed weight that nothing in the config describes; when one of our own format is decoded, also
            that it is damaged.
    """
    if quantization.get("quant_method") == native.METHOD:
        return _native_weights(quantization, tensors, read)
    if quantization.get("quant_method") == gptq.METHOD:
        return _gptq_weights(quantization, tensors, read)
    return _pack_quantized_weights(quantization, tensors, read)


def _native_weights(
    quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
) -> dict[str, PackedWeight]:
    found: dict[str, PackedWeight] = {}
    schemes = native.read_schemes(quantization)
    for name in tensors:
        module = name.removesuffix("." + native.CHECKSUM)
        if module != name and module not in schemes:
            raise FormatError(f"{module} is packed, but quantization_config does not name it; the folder is broken.")
    for module, scheme in schemes.items():
        parts = tuple(f"{module}.{part}" for part in scheme.specs())
        for part in parts:
            if part not in tensors:
                raise FormatError(f"{part} is missing; the folder is broken. Make or download it again.")

        def weight(module: str = module, scheme: native.Scheme = scheme) -> QuantizedWeight:
            stored = {part: read(f"{module}.{part}") for part in scheme.specs()}
            scheme.verify(module, stored)
            return scheme.restore(stored)

        found[f"{module}.weight"] = PackedWeight(
            parts=parts,
            dtype=torch.float32,
            shape=scheme.shape,
            grid=scheme.grid,
            transform=scheme.transform,
            weight=weight,
        )
    return found


def _gptq_weights(
    quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
) -> dict[str, PackedWeight]:
    form = gptq.reader_of(quantization)
    found: dict[str, PackedWeight] = {}
    for name in tensors:
        module = name.removesuffix(".qweight")
        if module == name:
            continue
        parts = tuple(f"{module}.{part}" for part in gptq.PARTS)
        for part in parts:
            if part not in tensors:
                raise FormatError(f"{part} is missing; the folder is broken. Make or download it again.")
        scales = tensors[f"{module}.scales"]
        grid = gptq.read_grid(quantization, module, scales.dtype)
        shape = int(scales.shape[1]), int(tensors[f"{module}.g_idx"].shape[0])
        found[f"{module}.weight"] = _uniform(form, module, shape, parts, grid=grid, read=read)
    return found


def _pack_quantized_weights(
    quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
) -> dict[str, PackedWeight]:
    form = CompressedTensors()
    found: dict[str, PackedWeight] = {}
    for name in tensors:
        if not name.endswith(".weight_packed"):
            continue
        module = name.removesuffix(".weight_packed")
        parts = tuple(f"{module}.{part}" for part in _PARTS if f"{module}.{part}" in tensors)
        rows, columns = (int(n) for n in read(f"{module}.weight_shape"))
        dtype = tensors[f"{module}.weight_scale"].dtype
        grid = _grid(_scheme(quantization, module), dtype)
        found[f"{module}.weight"] = _uniform(form, module, (rows, columns), parts, grid=grid, read=read)
    return found


def _uniform(
    form: Format,
    module: str,
    shape: tuple[int, int],
    parts: tuple[str, ...],
    *,
    grid: UniformGrid,
    read: Callable[[str], Tensor],
) -> PackedWeight:
    """One weight of a format of uniform integers."""
    name = f"{module}.weight"
    matrix = Matrix(name=module, parameter=name, sources=(name,), shape=shape, fusion="")
    return PackedWeight(
        parts=parts,
        dtype=grid.storage_dtype,
        shape=shape,
        grid=grid,
        transform=None,
        weight=lambda: form.weight(matrix, {part: read(part) for part in parts}, grid),
    )


def _scheme(quantization: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The ``weights`` of the first group that names the module, as engines match it."""
    for group in _groups(quantization):
        for target in group["targets"]:
            pattern = target.removeprefix("re:")
            if target in (module, "Linear") or (target != pattern and re.match(pattern, module)):
                return group["weights"]
    raise FormatError(f"{module} is packed, but no group of quantization_config targets it; the folder is broken.")


def _groups(quantization: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = quantization.get("config_groups", {}).values()
    exact = [g for g in groups if "Linear" not in g["targets"]]
    yield from exact
    yield from (g for g in groups if "Linear" in g["targets"])


def _grid(weights: Mapping[str, Any], dtype: torch.dtype) -> UniformGrid:
    scheme = {
        "bits": weights["num_bits"],
        "group_size": weights["group_size"] if weights["strategy"] == "group" else None,
        "symmetric": weights["symmetric"],
    }
    return uniform_grid(scheme, dtype)
