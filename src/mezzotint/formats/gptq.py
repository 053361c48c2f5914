"""The GPTQ layout, versions 1 and 2: what GPTQModel, transformers with it, vLLM and SGLang load."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
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
    check_present,
    check_scale_dtype,
    packed_uniform,
    refuses_bits,
    refuses_uniform,
    resolved,
    schemes_of,
    uniform_grid,
)
from mezzotint.formats.targets import compact, known_modules, module_of
from mezzotint.grids.uniform import FittedUniform, UniformGrid

METHOD = "gptq"
PARTS = ("qweight", "scales", "qzeros", "g_idx")
_BITS = (2, 3, 4, 8)
_WORD = 32
# What vLLM calls the one matrix that it makes of several, by the last parts of their names.
_FUSED_NAMES: Mapping[frozenset[str], str] = {
    frozenset({"q_proj", "k_proj", "v_proj"}): "qkv_proj",
    frozenset({"gate_proj", "up_proj"}): "gate_up_proj",
}


class Gptq:
    """Version 1, which loads most widely; symmetric grids only.

    Uniform codes of 2, 3, 4 or 8 bits with a scale and a zero point per group or row.

    Tensors per module:

    * ``qweight`` int32 ``[in * bits / 32, out]``: the codes of each row of the matrix, a column here, as one dense
      little-endian bit stream.
    * ``qzeros`` int32 ``[groups, out * bits / 32]``: zero points of each group, packed along ``out``; version 1 stores
      them less one, and cannot store 0.
    * ``scales`` ``[groups, out]``.
    * ``g_idx`` int32 ``[in]``: the group of each column. Groups lie in the original order.

    Scales have the dtype of the checkpoint, as in compressed-tensors and for the same reason; float16 or bfloat16 in a
    float32 checkpoint, because readers keep no float32 scales.

    Attributes:
        version: of the zero points.
    """

    name: ClassVar[str] = "gptq"
    version: ClassVar[int] = 1
    copies: ClassVar[int] = 1

    def refuses(self, entry: Entry, matrix: Matrix) -> Refusal | None:
        """The first rule that this entry breaks, or None.

        Rules: ``linear-only``, ``tied``, ``uniform-only``, ``no-transform``, ``matrix-scale``, ``ragged-group``,
        ``gptq-bits``, ``gptq-words``, ``zero-point-less-one``.
        """
        refusal = refuses_uniform(entry, matrix, self.name)
        if refusal is not None:
            return refusal
        grid = entry.grid
        assert isinstance(grid, UniformGrid)
        refusal = refuses_bits(grid, matrix, _BITS, rule="gptq-bits", who=f"readers of {self.name} know")
        if refusal is not None:
            return refusal
        if any(size % _WORD for size in matrix.shape):
            return Refusal(
                rule="gptq-words",
                what=f"shape of {matrix.name}",
                value=f"{matrix.shape[0]} x {matrix.shape[1]}",
                limit=f"{self.name} packs whole words of {_WORD} codes on both sides",
                remedy="Keep it, or use --for transformers, whose format packs any shape.",
            )
        if self.version == 1 and not grid.symmetric:
            return Refusal(
                rule="zero-point-less-one",
                what=f"grid.symmetric of {matrix.name}",
                value="false",
                limit="version 1 stores zero points less one, and cannot store 0",
                remedy="Use --set grid.symmetric=true, or --format gptq-v2.",
                nearest=replace(grid, symmetric=True),
            )
        return None

    def refuses_plan(self, plan: Plan, model: ModelMap) -> tuple[Refusal, ...]:
        """Rule ``fused-name``: a scheme of its own for matrices that engines fuse under a name unknown here."""
        schemes = schemes_of(plan, model)
        base = _base(schemes)
        refusals = []
        for fusion, members in _fused_classes(model).items():
            odd = [m.name for m in members if schemes.get(m.name) != base]
            if odd and _fused_name(members) is None:
                refusals.append(
                    Refusal(
                        rule="fused-name",
                        what=f"fused class {fusion}",
                        value=", ".join(odd),
                        limit="engines look rules up under the name of the fused matrix, which is not known here",
                        remedy=f"Give these matrices the scheme of most others ({base}).",
                    )
                )
        return tuple(refusals)

    def specs(
        self, matrix: Matrix, grid: Grid, dtype: torch.dtype, transform: Transform | None = None
    ) -> tuple[TensorSpec, ...]:
        """What `tensors` will give.

        Raises:
            FormatError: the scales' dtype is not one that a checkpoint of ``dtype`` holds exactly.
        """
        grid = _checked(matrix, grid, dtype)
        return tuple(TensorSpec(f"{_module(matrix)}.{name}", *spec) for name, spec in _specs(matrix, grid).items())

    def tensors(self, matrix: Matrix, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack one matrix.

        Raises:
            FormatError: the scales' dtype is wrong.
        """
        fitted = weight.grid
        assert isinstance(fitted, FittedUniform), f"{matrix.name}: `refuses` accepts uniform grids only"
        assert weight.basis is None, f"{matrix.name}: `refuses` accepts no basis"
        grid = _checked(matrix, fitted.grid, dtype)
        scale = fitted.scale.to(grid.storage_dtype)
        assert torch.equal(scale.to(fitted.scale.dtype), fitted.scale), f"{matrix.name}: scales are not rounded"
        zero_point = fitted.zero_point.cpu().t() - (2 - self.version)  # [groups, out]
        found = {
            "qweight": kernels.pack_bits(weight.code.cpu().contiguous(), grid.bits).t(),
            "scales": scale.cpu().t(),
            "qzeros": kernels.pack_bits(zero_point.to(torch.uint8).contiguous(), grid.bits),
            "g_idx": _groups_of_columns(matrix, grid),
        }
        return {f"{_module(matrix)}.{name}": value.contiguous() for name, value in found.items()}

    def weight(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], grid: Grid, transform: Transform | None = None
    ) -> QuantizedWeight:
        """The inverse of `tensors`.

        Raises:
            FormatError: a tensor is missing, of another dtype or shape, or cannot have been written for that grid.
        """
        module = _module(matrix)
        parts = {name: tensors[f"{module}.{name}"] for name in PARTS if f"{module}.{name}" in tensors}
        grid = resolved(matrix, grid, parts["scales"].dtype if "scales" in parts else torch.float32)
        for name, (dtype, shape) in _specs(matrix, grid).items():
            if name not in parts:
                raise FormatError(f"{module}.{name} is missing; the folder is broken. Make or download it again.")
            if (parts[name].dtype, tuple(parts[name].shape)) != (dtype, shape):
                raise FormatError(
                    f"{module}.{name} is {parts[name].dtype} of shape {tuple(parts[name].shape)}; config.json says "
                    f"{dtype} of {shape}. Make or download the folder again."
                )
        if not torch.equal(parts["g_idx"], _groups_of_columns(matrix, grid)):
            raise FormatError(f"{module}.g_idx has columns out of order (desc_act); only groups in order are read.")
        rows, columns = matrix.shape
        stored = kernels.unpack_bits(parts["qzeros"], grid.bits, rows).t()
        zero_point = stored.float() + (2 - self.version)
        if grid.symmetric and bool((zero_point != 2 ** (grid.bits - 1)).any()):
            raise FormatError(f"{module}.qzeros holds other zero points than the middle, and config.json says sym.")
        if int(zero_point.max()) > 2**grid.bits - 1:
            raise FormatError(f"{module}.qzeros holds a zero point beyond {grid.bits} bits, which is not read.")
        code = kernels.unpack_bits(parts["qweight"].t().contiguous(), grid.bits, columns)
        fitted = FittedUniform(
            grid=grid, shape=matrix.shape, scale=parts["scales"].t().float().contiguous(), zero_point=zero_point
        )
        return QuantizedWeight(shape=matrix.shape, code=code, grid=fitted)

    def config(self, plan: Plan, model: ModelMap) -> Mapping[str, object]:
        """The ``quantization_config``: the scheme of most matrices, and ``dynamic`` rules for the others.

        A rule for matrices that engines fuse matches their own names and that of the fused one: vLLM and SGLang look it
        up under the latter, GPTQModel under the former. transformers and vLLM read what is quantized at all from
        ``modules_in_block_to_quantize``, GPTQModel from the rules.
        """
        schemes = schemes_of(plan, model)
        base = _base(schemes)
        aliases = _aliases(model)
        known = tuple(dict.fromkeys((*known_modules(model), *aliases.values())))
        odd: dict[Scheme | None, list[str]] = defaultdict(list)
        for module in known_modules(model):
            matrix = model.matrices.get(module)
            scheme = schemes.get(module)
            if scheme != base and not (scheme is None and module == model.head):
                odd[scheme].append(module)
                if matrix is not None and module in aliases:
                    odd[scheme].append(aliases[module])
        dynamic: dict[str, dict[str, object]] = {}
        for scheme, modules in odd.items():
            rule = {} if scheme is None else _settings(scheme)
            for target in compact(tuple(dict.fromkeys(modules)), known):
                pattern = target.removeprefix("re:") if target.startswith("re:") else f"{re.escape(target)}$"
                dynamic[("-:" if scheme is None else "+:") + pattern] = rule
        inside = [name for name in schemes if name != model.head]
        return {
            "quant_method": METHOD,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            "desc_act": False,
            "lm_head": model.head in schemes,
            **_settings(base),
            **({"dynamic": dynamic} if dynamic else {}),
            **({"modules_in_block_to_quantize": [inside]} if None in odd else {}),
        }

    def packed(
        self, quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
    ) -> Mapping[str, PackedWeight] | None:
        """Every module with a ``qweight``.

        Raises:
            FormatError: a version that is not known, a part that is missing, or the configuration lacks something.
        """
        if quantization.get("quant_method") != METHOD or reader_of(quantization).name != self.name:
            return None
        found: dict[str, PackedWeight] = {}
        for module in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
            parts = tuple(f"{module}.{part}" for part in PARTS)
            check_present(parts, tensors)
            scales = tensors[f"{module}.scales"]
            grid = read_grid(quantization, module, scales.dtype)
            shape = int(scales.shape[1]), int(tensors[f"{module}.g_idx"].shape[0])
            found[f"{module}.weight"] = packed_uniform(self, module, shape, parts, grid=grid, read=read)
        return found

    def check_source(self, folder: Path, config: Mapping[str, object], names: list[str]) -> None:
        """Nothing: every model is read."""

    def finish(self, folder: Path, config: Mapping[str, object], plan: Plan, model: ModelMap) -> int:
        """Nothing is left to do; the size of the tensors."""
        return plan.bytes


class GptqV2(Gptq):
    """Version 2, whose zero points are stored as they are."""

    name: ClassVar[str] = "gptq-v2"
    version: ClassVar[int] = 2


def read_grid(quantization: Mapping[str, Any], module: str, dtype: torch.dtype) -> UniformGrid:
    """The grid of a packed module; the first of the ``dynamic`` rules that matches counts, as in engines.

    Args:
        quantization: ``quantization_config`` of config.json.
        module: name.
        dtype: of its scales.

    Raises:
        FormatError: the configuration lacks something, or says that the module is not packed.
    """
    settings = {**quantization}
    for pattern, rule in (quantization.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
            if pattern.startswith("-:"):
                raise FormatError(f"{module} is packed, and the rule {pattern!r} of quantization_config denies it.")
            settings |= rule
            break
    try:
        size = settings["group_size"]
        scheme = {
            "bits": settings["bits"],
            "group_size": None if size == -1 else size,
            "symmetric": settings["sym"],
        }
    except KeyError as error:
        raise FormatError(f"quantization_config lacks {error}; the folder is broken.") from error
    return uniform_grid(scheme, dtype)


def reader_of(quantization: Mapping[str, Any]) -> Gptq:
    """The format of a folder.

    Raises:
        FormatError: a version that is not known.
    """
    version = quantization.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise FormatError(f"quantization_config has checkpoint_format {version!r}; known are gptq and gptq_v2.")
    return Gptq() if version == "gptq" else GptqV2()


def _base(schemes: Mapping[str, Scheme]) -> Scheme:
    """The scheme that most matrices have; the first of several."""
    distinct = list(dict.fromkeys(schemes.values()))
    return max(distinct, key=list(schemes.values()).count)


def _settings(scheme: Scheme) -> dict[str, object]:
    return {
        "bits": scheme.bits,
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "sym": scheme.symmetric,
    }


def _fused_classes(model: ModelMap) -> dict[str, list[Matrix]]:
    classes: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in model.matrices.values():
        if matrix.linear:
            classes[matrix.fusion].append(matrix)
    return {fusion: members for fusion, members in classes.items() if len(members) > 1}


def _fused_name(members: list[Matrix]) -> str | None:
    """Of the module that engines make of several, or None."""
    parents = {_module(m).rpartition(".")[0] for m in members}
    last = _FUSED_NAMES.get(frozenset(_module(m).rpartition(".")[2] for m in members))
    return None if last is None or len(parents) > 1 else f"{parents.pop()}.{last}"


def _aliases(model: ModelMap) -> dict[str, str]:
    """The fused name of every matrix that has one."""
    found = {}
    for members in _fused_classes(model).values():
        name = _fused_name(members)
        found |= {} if name is None else {m.name: name for m in members}
    return found


def _checked(matrix: Matrix, grid: Grid, dtype: torch.dtype) -> UniformGrid:
    """The grid without any ``auto``, whose scales readers keep as they are."""
    found = resolved(matrix, grid, dtype)
    check_scale_dtype(matrix, found, dtype)
    if found.storage_dtype == torch.float32:
        refusal = Refusal(
            rule="half-scales",
            what=f"grid.scale_dtype of {matrix.name}",
            value=found.scale_dtype,
            limit="readers of GPTQ files keep scales of 16 bits",
            remedy="Use --set grid.scale_dtype=float16.",
        )
        raise FormatError(str(refusal))
    return found


def _specs(matrix: Matrix, grid: UniformGrid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    rows, columns = matrix.shape
    groups = columns // grid.columns_per_group(columns)
    return {
        "qweight": (torch.int32, (columns * grid.bits // _WORD, rows)),
        "scales": (grid.storage_dtype, (groups, rows)),
        "qzeros": (torch.int32, (groups, rows * grid.bits // _WORD)),
        "g_idx": (torch.int32, (columns,)),
    }


def _groups_of_columns(matrix: Matrix, grid: UniformGrid) -> Tensor:
    columns = matrix.shape[1]
    return torch.arange(columns, dtype=torch.int32) // grid.columns_per_group(columns)


def _module(matrix: Matrix) -> str:
    return module_of(matrix.sources[0])
