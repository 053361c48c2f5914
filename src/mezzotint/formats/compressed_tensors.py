"""The ``pack-quantized`` layout of compressed-tensors: what vLLM, SGLang and transformers load most widely."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mezzotint import kernels
from mezzotint.core.contracts import Grid, Matrix, ModelMap, QuantizedWeight, Transform
from mezzotint.core.files import Entry, Plan, Refusal, TensorSpec
from mezzotint.errors import FormatError
from mezzotint.formats.targets import compact, known_modules, modules_of, refuses_tied
from mezzotint.grids.uniform import FittedUniform, UniformGrid

_PACKED = "pack-quantized"
_USUAL_GROUPS = (128, 64, 32)  # sizes that GPU kernels have


class Scheme(NamedTuple):
    """What engines must know of a matrix before they read it."""

    bits: int
    symmetric: bool
    group_size: int | None

    def __str__(self) -> str:
        groups = "per channel" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.bits} bits {'symmetric' if self.symmetric else 'asymmetric'} {groups}"


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
        refusal = _refuses_matrix(matrix)
        if refusal is not None:
            return refusal
        if not isinstance(entry.grid, UniformGrid):
            return Refusal(
                rule="uniform-only",
                what=f"grid of {matrix.name}",
                value=entry.grid.kind,
                limit="compressed-tensors stores uniform grids only",
                remedy="Use grid.kind=uniform, or --for dense.",
                nearest=UniformGrid(bits=min(8, max(2, round(entry.grid.bits)))),
            )
        if entry.basis is not None:
            return Refusal(
                rule="no-transform",
                what=f"transform of {matrix.name}",
                value=type(entry.basis).__name__,
                limit="engines multiply by the stored matrix as it is",
                remedy="Use transform.kind=none, or --for dense.",
                nearest=entry.grid,
            )
        return _refuses_group(matrix, entry.grid)

    def refuses_plan(self, plan: Plan, model: ModelMap) -> tuple[Refusal, ...]:
        """Rules about several matrices: ``fused-scheme``, one per class, ``mixed-asymmetric``, ``dense-experts``."""
        schemes = _schemes(plan, model)
        classes: dict[str, list[Matrix]] = defaultdict(list)
        for matrix in model.matrices.values():
            classes[matrix.fusion].append(matrix)
        refusals = [_refuses_class(fusion, members, schemes) for fusion, members in classes.items()]
        distinct = list(dict.fromkeys(schemes.values()))
        mixed = len(distinct) > 1 and not all(scheme.symmetric for scheme in distinct)
        if mixed and plan.engine != "vllm":
            refusals.append(
                Refusal(
                    rule="mixed-asymmetric",
                    what=f"{len(distinct)} schemes",
                    value="; ".join(map(str, distinct)),
                    limit="transformers loads zero points only where one scheme serves all matrices",
                    remedy="Use --set grid.symmetric=true, one scheme for all matrices, --for dense, or --for vllm.",
                )
            )
        if plan.engine != "vllm":
            refusals.append(_refuses_experts(model, schemes))
        return tuple(refusal for refusal in refusals if refusal is not None)

    def specs(
        self, matrix: Matrix, grid: Grid, dtype: torch.dtype, transform: Transform | None = None
    ) -> tuple[TensorSpec, ...]:
        """What `tensors` will give.

        Raises:
            FormatError: the scales' dtype is not one that a checkpoint of ``dtype`` holds exactly.
        """
        grid = _resolved(matrix, grid, dtype)
        _check_scale_dtype(matrix, grid, dtype)
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
        grid = _resolved(matrix, fitted.grid, dtype)
        _check_scale_dtype(matrix, grid, dtype)
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
            FormatError: the tensors are of another shape than the matrix.
        """
        prefix = _prefix(matrix)
        stored = tuple(tensors[prefix + "weight_shape"].tolist())
        if stored != matrix.shape:
            raise FormatError(f"{matrix.name} is stored with shape {stored}; the model has {matrix.shape}.")
        scale = tensors[prefix + "weight_scale"]
        grid = _resolved(matrix, grid, scale.dtype)
        rows, columns = matrix.shape
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
        schemes = _schemes(plan, model)
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

    def check_source(self, folder: Path, config: Mapping[str, object], names: list[str]) -> None:
        """Nothing: every model is read."""

    def finish(self, folder: Path, config: Mapping[str, object], plan: Plan, model: ModelMap) -> int:
        """Nothing is left to do; the size of the tensors."""
        return plan.bytes


def _refuses_matrix(matrix: Matrix) -> Refusal | None:
    if not matrix.linear or matrix.transposed or matrix.expert is not None or len(matrix.sources) != 1:
        return Refusal(
            rule="linear-only",
            what=matrix.name,
            value="not the weight of an nn.Linear",
            limit="engines read packed weights for nn.Linear only",
            remedy="Keep it, or use --for dense.",
        )
    return refuses_tied(matrix)


def _refuses_group(matrix: Matrix, grid: UniformGrid) -> Refusal | None:
    if grid.scale_per == "matrix":
        return Refusal(
            rule="matrix-scale",
            what=f"grid.scale_per of {matrix.name}",
            value=grid.scale_per,
            limit="engines read scales of rows, or of groups of columns",
            remedy="Use grid.scale_per=row, or --for mezzotint.",
            nearest=replace(grid, scale_per="row"),
        )
    width, size = matrix.shape[1], grid.group_size
    if not isinstance(size, int) or width % size == 0:
        return None
    divisors = [d for d in range(8, min(width, 1024) + 1) if width % d == 0]
    usual = [d for d in _USUAL_GROUPS if d <= size and width % d == 0]
    below = [d for d in divisors if d <= size]
    best = usual[0] if usual else below[-1] if below else None
    shown = ", ".join(map(str, divisors)) or "none from 8 to 1024"
    return Refusal(
        rule="ragged-group",
        what=f"grid.group_size of {matrix.name}",
        value=f"{size} does not divide the width {width}",
        limit="engines read whole groups only",
        remedy=f"Sizes that divide it: {shown}; or null for one scale a row.",
        nearest=replace(grid, group_size=best),
    )


def _refuses_class(fusion: str, members: list[Matrix], schemes: Mapping[str, Scheme]) -> Refusal | None:
    """Engines that fuse q, k and v (gate and up) read one scheme for the class, and fail on any other."""
    found = {member.name: schemes.get(member.name) for member in members}
    if len(set(found.values())) == 1:
        return None
    value = "; ".join(f"{name}: {'kept' if scheme is None else scheme}" for name, scheme in found.items())
    return Refusal(
        rule="fused-scheme",
        what=f"fused class {fusion}",
        value=value,
        limit="engines store these as one matrix with one scheme",
        remedy="Let one rule match all of them, or use --for dense.",
    )


def _refuses_experts(model: ModelMap, schemes: Mapping[str, Scheme]) -> Refusal | None:
    """Experts that transformers stacks while it loads: in a packed folder it takes all of them for packed."""
    stacked = next(
        (m for m in model.matrices.values() if m.expert is not None and m.sources[0].endswith(".weight")), None
    )
    if stacked is None or not schemes:
        return None
    return Refusal(
        rule="dense-experts",
        what=f"experts, such as {stacked.name}",
        value="kept, beside packed matrices",
        limit="transformers cannot load dense experts from a packed folder",
        remedy="Use --for dense, which quantizes experts too, or --for vllm.",
    )


def _schemes(plan: Plan, model: ModelMap) -> dict[str, Scheme]:
    """Schemes by matrix name, in the order of the plan; only entries that `refuses` accepts have one."""
    schemes = {}
    for entry in plan.entries:
        if isinstance(entry.grid, UniformGrid):
            grid = entry.grid.resolve(model.matrices[entry.matrix].shape, torch.float32)
            assert grid.group_size != "auto"
            schemes[entry.matrix] = Scheme(grid.bits, grid.symmetric, grid.group_size)
    return schemes


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


def _resolved(matrix: Matrix, grid: Grid, dtype: torch.dtype) -> UniformGrid:
    assert isinstance(grid, UniformGrid), f"{matrix.name}: `refuses` accepts uniform grids only"
    return grid.resolve(matrix.shape, dtype)


def _check_scale_dtype(matrix: Matrix, grid: UniformGrid, dtype: torch.dtype) -> None:
    if dtype in (grid.storage_dtype, torch.float32):
        return
    refusal = Refusal(
        rule="scale-dtype",
        what=f"grid.scale_dtype of {matrix.name}",
        value=grid.scale_dtype,
        limit=f"engines round the scales of a {str(dtype).removeprefix('torch.')} checkpoint to that dtype",
        remedy="Use grid.scale_dtype=auto.",
    )
    raise FormatError(str(refusal))


def _prefix(matrix: Matrix) -> str:
    return matrix.sources[0].removesuffix("weight")
