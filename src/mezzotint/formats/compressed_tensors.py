"""The ``pack-quantized`` layout of compressed-tensors: what vLLM, SGLang and transformers load most widely."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mezzotint import kernels
from mezzotint.core.contracts import Grid, Matrix, ModelMap, QuantizedWeight, Transform
from mezzotint.core.plans import Entry, PackedWeight, Plan, Refusal, TensorSpec
from mezzotint.errors import FormatError
from mezzotint.formats.schemes import (
    Scheme,
    check_scale_dtype,
    packed_uniform,
    refuses_uniform,
    resolved,
    schemes_of,
    uniform_grid,
)
from mezzotint.formats.targets import compact, known_modules, modules_of
from mezzotint.grids.uniform import FittedUniform, UniformGrid

_PACKED = "pack-quantized"
_WORD = 32  # bits
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class CompressedTensors:
    """Uniform codes of 2 to 8 bits with a scale, and if asymmetric a zero point, per group or channel.

    Tensors per module (compressed-tensors 0.18 or later; earlier versions read 3, 5, 6 and 7 bits differently):

    * ``weight_packed`` int32 ``[out, ceil(in * bits / 32)]``: each row's unsigned codes as one dense little-endian
      bit stream. What the library calls a code is signed: ours less ``2^(bits-1)``.
    * ``weight_scale`` ``[out, groups]``.
    * ``weight_shape`` int64 ``[2]``: out and in.
    * ``weight_zero_point`` int32 ``[ceil(out * bits / 32), groups]``, asymmetric only: unsigned zero points, each
      column's packed along ``out``.

    **Dtype of the scales.** Engines keep them in the dtype the model is loaded in, so scales of another dtype than the
    checkpoint's would be rounded once more, after the codes were chosen. Accepted are the checkpoint's own dtype, and
    any of float16, bfloat16 and float32 in a float32 checkpoint, which holds all three exactly. Only `specs` and
    `tensors` learn the checkpoint's dtype: they raise.
    """

    name: ClassVar[str] = "compressed-tensors"
    copies: ClassVar[int] = 1

    def refuses(self, entry: Entry, matrix: Matrix) -> Refusal | None:
        """The first rule that this entry breaks, or None.

        Rules: ``linear-only``, ``tied``, ``uniform-only``, ``no-transform``, ``matrix-scale``, ``ragged-group``.
        """
        return refuses_uniform(entry, matrix, self.name)

    def refuses_plan(self, plan: Plan, model: ModelMap) -> tuple[Refusal, ...]:
        """Nothing: every matrix is on its own."""
        return ()

    def specs(
        self, matrix: Matrix, grid: Grid, dtype: torch.dtype, transform: Transform | None = None
    ) -> tuple[TensorSpec, ...]:
        """What `tensors` will give.

        Raises:
            FormatError: the scales' dtype is not one that a checkpoint of ``dtype`` holds exactly.
        """
        grid = resolved(matrix, grid, dtype)
        check_scale_dtype(matrix, grid, dtype)
        assert grid.scale_per != "matrix", f"{matrix.name}: `refuses` accepts scales of rows and of groups only"
        rows, columns = matrix.shape
        groups = -(-columns // grid.columns_per_group(columns))
        prefix = _prefix(matrix)
        specs = [
            TensorSpec(prefix + "weight_packed", torch.int32, (rows, -(-columns * grid.bits // 32))),
            TensorSpec(prefix + "weight_scale", grid.storage_dtype, (rows, groups)),
            TensorSpec(prefix + "weight_shape", torch.int64, (2,)),
        ]
        if not grid.symmetric:
            shape = (-(-rows * grid.bits // 32), groups)
            specs.append(TensorSpec(prefix + "weight_zero_point", torch.int32, shape))
        return tuple(specs)

    def tensors(self, matrix: Matrix, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack one matrix.

        Raises:
            FormatError: the grid or the basis cannot be stored, or the scales' dtype is wrong.
        """
        fitted = weight.grid
        if not isinstance(fitted, FittedUniform):
            raise FormatError(
                f"{matrix.name} has a grid of kind {fitted.grid.kind}; compressed-tensors stores uniform grids only. "
                "Use --for dense."
            )
        if weight.basis is not None:
            raise FormatError(
                f"{matrix.name} has codes in the basis {weight.basis.kind}; engines multiply by the stored matrix as "
                "it is. Use --for dense."
            )
        grid = resolved(matrix, fitted.grid, dtype)
        check_scale_dtype(matrix, grid, dtype)
        prefix = _prefix(matrix)
        scale = fitted.scale.to(grid.storage_dtype)
        assert torch.equal(scale.to(fitted.scale.dtype), fitted.scale), f"{matrix.name}: scales are not rounded"
        tensors = {
            prefix + "weight_packed": kernels.pack_bits(weight.code.cpu().contiguous(), grid.bits),
            prefix + "weight_scale": scale.cpu().contiguous(),
            prefix + "weight_shape": torch.tensor(matrix.shape, dtype=torch.int64),
        }
        if not grid.symmetric:
            zero_point = fitted.zero_point.to(torch.uint8).cpu().t().contiguous()  # [groups, out]
            tensors[prefix + "weight_zero_point"] = kernels.pack_bits(zero_point, grid.bits).t().contiguous()
        return tensors

    def weight(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], grid: Grid, transform: Transform | None = None
    ) -> QuantizedWeight:
        """The inverse of `tensors`.

        Raises:
            FormatError: the tensors are of another shape than the matrix, or are packed as compressed-tensors did it
                before 0.18.
        """
        prefix = _prefix(matrix)
        stored = tuple(tensors[prefix + "weight_shape"].tolist())
        if stored != matrix.shape:
            raise FormatError(f"{matrix.name} is stored with shape {stored}; the model has {matrix.shape}.")
        scale = tensors[prefix + "weight_scale"]
        grid = resolved(matrix, grid, scale.dtype)
        rows, columns = matrix.shape
        _check_packing(prefix + "weight_packed", tensors[prefix + "weight_packed"], columns, grid.bits)
        code = kernels.unpack_bits(tensors[prefix + "weight_packed"], grid.bits, columns)
        if grid.symmetric:
            zero_point = torch.full(scale.shape, float(2 ** (grid.bits - 1)), device=scale.device)
        else:
            packed = tensors[prefix + "weight_zero_point"].t().contiguous()  # [groups, words]
            zero_point = kernels.unpack_bits(packed, grid.bits, rows).t().contiguous().float()
        fitted = FittedUniform(grid=grid, shape=matrix.shape, scale=scale.float(), zero_point=zero_point)
        return QuantizedWeight(shape=matrix.shape, code=code, grid=fitted)

    def config(self, plan: Plan, model: ModelMap, *, further: Iterable[str] = ()) -> Mapping[str, object]:
        """The ``quantization_config`` of config.json.

        One scheme gives one group of target ``Linear`` and the names of what is not quantized; several give explicit
        targets, as patterns over the blocks where those match the same modules. ``dequantize`` makes transformers
        decode zero points when it loads: its default route expects them unpacked.

        Args:
            plan: passed `refuses_plan`.
            model: with every linear of the blocks, and the head.
            further: names of ``nn.Linear`` modules that the map does not hold, e.g. outside the blocks.
        """
        schemes = schemes_of(plan, model)
        groups: dict[Scheme, list[str]] = defaultdict(list)
        for name, scheme in schemes.items():
            groups[scheme].extend(modules_of(model.matrices[name]))
        known = known_modules(model, further)
        quantized = {module for modules in groups.values() for module in modules}
        ignored = [module for module in known if module not in quantized]
        one = len(groups) == 1
        return {
            "quant_method": "compressed-tensors",
            "format": _PACKED,
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "ignore": compact(ignored, known),
            **({"dequantize": True} if one and not next(iter(groups)).symmetric else {}),
            "config_groups": {
                f"group_{i}": {
                    "targets": _class_targets(modules, model) if one else compact(modules, known),
                    "format": _PACKED,
                    "weights": _weights(scheme),
                    "input_activations": None,
                    "output_activations": None,
                }
                for i, (scheme, modules) in enumerate(groups.items())
            },
        }

    def packed(
        self, quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
    ) -> Mapping[str, PackedWeight] | None:
        """Every module with ``weight_packed``, with the scheme of the group that targets it.

        Raises:
            FormatError: no group of the configuration targets it.
        """
        if (quantization.get("quant_method"), quantization.get("format")) != ("compressed-tensors", _PACKED):
            return None
        found: dict[str, PackedWeight] = {}
        for module in (name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")):
            parts = tuple(f"{module}.{part}" for part in _PARTS if f"{module}.{part}" in tensors)
            rows, columns = (int(n) for n in read(f"{module}.weight_shape"))
            grid = _grid(_scheme(quantization, module), tensors[f"{module}.weight_scale"].dtype)
            found[f"{module}.weight"] = packed_uniform(self, module, (rows, columns), parts, grid=grid, read=read)
        return found

    def check_source(self, folder: Path, config: Mapping[str, object], names: list[str]) -> None:
        """Nothing: every model is read."""

    def finish(self, folder: Path, config: Mapping[str, object], plan: Plan, model: ModelMap) -> int:
        """Nothing is left to do; the size of the tensors."""
        return plan.bytes


def _class_targets(modules: list[str], model: ModelMap) -> list[str]:
    # vLLM's head is no "Linear" to it: a quantized head is named besides.
    head = () if model.head is None else modules_of(model.matrices[model.head])
    return ["Linear", *(module for module in modules if module in head)]


def _weights(scheme: Scheme) -> dict[str, object]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }


def _check_packing(name: str, packed: Tensor, columns: int, bits: int) -> None:
    """Tell the dense bit stream from whole codes in each word, which is longer where 32 is no multiple of the bits."""
    words, dense, older = packed.shape[1], -(-columns * bits // _WORD), -(-columns // (_WORD // bits))
    if words == dense:
        return
    why = "is packed as compressed-tensors did it before 0.18" if words == older else "is of another width"
    raise FormatError(
        f"{name} has {words} words a row, and {columns} codes of {bits} bits take {dense}: it {why}. Make the folder "
        "again with compressed-tensors 0.18 or later."
    )


def _prefix(matrix: Matrix) -> str:
    return matrix.sources[0].removesuffix("weight")


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
