"""compressed-tensors ``pack-quantized``: what vLLM and transformers load (FORMATS.md).

Codes are stored unsigned in a dense little-endian bit stream per row, as compressed-tensors 0.18 and later pack them
(2, 4 and 8 bits are the same in every version). Scales have the checkpoint's dtype: engines cast them to it on loading,
and codes that were chosen for other scales would no longer fit.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mezzotint import kernels
from mezzotint.core.contracts import Grid, QuantizedWeight
from mezzotint.core.files import Entry, Plan, Refusal, TensorSpec
from mezzotint.core.structure import Matrix, ModelMap
from mezzotint.grids.uniform import FittedUniform, UniformGrid

_GROUP_SIZES = (128, 64, 32, 16)


class CompressedTensors:
    """The packed format of uniform grids of 2 to 8 bits on weights of ``nn.Linear``."""

    name: ClassVar[str] = "compressed-tensors"

    def refuses(self, entry: Entry, matrix: Matrix) -> Refusal | None:
        """The first rule that this entry breaks, or None."""
        grid = entry.grid
        if not matrix.linear:
            return Refusal(
                rule="linear-only",
                what="kind of module",
                value=f"{matrix.parameter} is no weight of an nn.Linear",
                limit="compressed-tensors replaces nn.Linear only",
                remedy="Use --for dense.",
            )
        if not isinstance(grid, UniformGrid) or entry.transform is not None:
            return Refusal(
                rule="uniform-only",
                what="grid",
                value=grid.kind if entry.transform is None else f"{grid.kind} in another basis",
                limit="compressed-tensors holds uniform grids in the original basis",
                remedy="Use grid.kind=uniform and transform.kind=none, or --for dense.",
            )
        columns, size = matrix.shape[1], grid.columns_per_group(matrix.shape[1])
        if columns % size:
            fitting = [g for g in _GROUP_SIZES if columns % g == 0]
            sizes = ", ".join(str(g) for g in fitting) or "none of the usual ones"
            return Refusal(
                rule="ragged-group",
                what="grid.group_size",
                value=f"{size} does not divide the width {columns}",
                limit="every group must be full",
                remedy=f"Sizes that divide it: {sizes}; null is one group a row.",
                nearest=UniformGrid(bits=grid.bits, group_size=fitting[0] if fitting else None),
            )
        return None

    def refuses_plan(self, plan: Plan, model: ModelMap) -> tuple[Refusal, ...]:
        """Mixed asymmetric schemes that transformers would misread, and fused classes of several schemes."""
        refusals = []
        schemes = {_scheme(e.grid) for e in plan.entries}
        if len(schemes) > 1 and any(not symmetric for _, _, symmetric in schemes) and plan.engine != "vllm":
            refusals.append(
                Refusal(
                    rule="mixed-asymmetric",
                    what="schemes",
                    value=f"{len(schemes)} different ones, some with zero points",
                    limit="transformers reads a mixed file only when all are symmetric",
                    remedy="Use --set grid.symmetric=true, or --for dense, or --for vllm.",
                )
            )
        classes: dict[str, dict[tuple[int, int | None, bool] | None, str]] = {}
        by_name = {e.matrix: _scheme(e.grid) for e in plan.entries}
        for name, matrix in model.matrices.items():
            classes.setdefault(matrix.fusion, {}).setdefault(by_name.get(name), name)
        for fusion, found in classes.items():
            if len(found) > 1:
                names = " and ".join(found.values())
                refusals.append(
                    Refusal(
                        rule="fused-scheme",
                        what=f"fused class {fusion}",
                        value=f"{names} differ",
                        limit="engines fuse these matrices and load one scheme for all of them",
                        remedy="Let one rule match all of them, or use --for dense.",
                    )
                )
        return tuple(refusals)

    def specs(self, matrix: Matrix, grid: Grid, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the tensors of a matrix."""
        assert isinstance(grid, UniformGrid)
        rows, columns = matrix.shape
        groups = columns // grid.columns_per_group(columns)
        module = module_name(matrix)
        found = [
            TensorSpec(f"{module}.weight_packed", torch.int32, (rows, _words(columns, grid.bits))),
            TensorSpec(f"{module}.weight_scale", grid.storage_dtype, (rows, groups)),
            TensorSpec(f"{module}.weight_shape", torch.int64, (2,)),
        ]
        if not grid.symmetric:
            found.append(TensorSpec(f"{module}.weight_zero_point", torch.int32, (_words(rows, grid.bits), groups)))
        return tuple(found)

    def tensors(self, matrix: Matrix, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Packed codes, scales, shape and, with zero points, those packed along the rows."""
        fitted = weight.grid
        assert isinstance(fitted, FittedUniform)
        grid, module = fitted.grid, module_name(matrix)
        found = {
            f"{module}.weight_packed": kernels.pack_bits(weight.code.cpu().contiguous(), grid.bits),
            f"{module}.weight_scale": fitted.scale.to(grid.storage_dtype).cpu().contiguous(),
            f"{module}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if not grid.symmetric:
            by_group = fitted.zero_point.t().to(torch.uint8).cpu().contiguous()
            found[f"{module}.weight_zero_point"] = kernels.pack_bits(by_group, grid.bits).t().contiguous()
        return found

    def weight(self, matrix: Matrix, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """The matrix that these tensors store."""
        assert isinstance(grid, UniformGrid)
        module = module_name(matrix)
        scale = tensors[f"{module}.weight_scale"].float()
        code = kernels.unpack_bits(tensors[f"{module}.weight_packed"], grid.bits, matrix.shape[1])
        if grid.symmetric:
            zero_point = torch.full_like(scale, 2 ** (grid.bits - 1))
        else:
            packed = tensors[f"{module}.weight_zero_point"].t().contiguous()
            zero_point = kernels.unpack_bits(packed, grid.bits, matrix.shape[0]).t().float().contiguous()
        fitted = FittedUniform(grid=grid, shape=matrix.shape, scale=scale, zero_point=zero_point)
        return QuantizedWeight(shape=matrix.shape, code=code, grid=fitted)

    def config(self, plan: Plan, model: ModelMap) -> Mapping[str, object]:
        """``quantization_config``: one group per scheme; one scheme alone targets every ``Linear`` that is not ignored."""
        members: dict[tuple[int, int | None, bool], list[str]] = {}
        for entry in plan.entries:
            members.setdefault(_scheme(entry.grid), []).append(module_name(model.matrices[entry.matrix]))
        alone = len(members) == 1
        groups = {
            f"group_{i}": _group(scheme, ["Linear"] if alone else names)
            for i, (scheme, names) in enumerate(members.items())
        }
        config: dict[str, object] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [_ignored(name, model) for name in plan.kept],
            "kv_cache_scheme": None,
        }
        if alone and not next(iter(members))[2]:
            config["dequantize"] = True  # transformers loads zero points in this mode only
        return config


def module_name(matrix: Matrix) -> str:
    """Name of the module in the checkpoint."""
    return matrix.sources[0].removesuffix(".weight")


def _ignored(name: str, model: ModelMap) -> str:
    matrix = model.matrices.get(name)
    # the name of a tied head in the checkpoint is the embedding's; engines know it by its own
    return name.removesuffix(".weight") if matrix is None or matrix.tied_to else module_name(matrix)


def _scheme(grid: Grid) -> tuple[int, int | None, bool]:
    assert isinstance(grid, UniformGrid)
    assert grid.group_size != "auto"
    return grid.bits, grid.group_size, grid.symmetric


def _group(scheme: tuple[int, int | None, bool], targets: list[str]) -> dict[str, object]:
    bits, group_size, symmetric = scheme
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "format": "pack-quantized",
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)
