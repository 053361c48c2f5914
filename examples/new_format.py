"""A format of one's own: a byte for every code and zero point, a float for every scale.

    NAME.code [out, in] uint8    NAME.scale [out, groups] float32    NAME.zero_point [out, groups] uint8
    value = scale * (code - zero_point)

`read` is what an engine of this format needs: it knows nothing but safetensors and numpy.

    python examples/new_format.py MODEL CALIBRATION.txt OTHER.txt OUT
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

import mezzotint
from mezzotint.core.contracts import Grid, Matrix, ModelMap, QuantizedWeight, Transform
from mezzotint.core.plans import Entry, PackedWeight, Plan, Refusal, TensorSpec
from mezzotint.errors import FormatError
from mezzotint.formats.schemes import packed_uniform, refuses_uniform, uniform_grid
from mezzotint.grids.uniform import FittedUniform, UniformGrid
from mezzotint.registry import FORMATS


class Plain:
    """Uniform grids in groups of at least 32 columns, or a scale a row."""

    name: ClassVar[str] = "plain"
    copies: ClassVar[int] = 1

    def refuses(self, entry: Entry, matrix: Matrix) -> Refusal | None:
        """What a file of integers cannot hold, and a rule of its own."""
        grid, refusal = entry.grid, refuses_uniform(entry, matrix, self.name)
        if refusal is not None or not isinstance(grid, UniformGrid) or grid.columns_per_group(matrix.shape[1]) >= 32:
            return refusal
        return Refusal(
            rule="plain-groups",
            what=f"grid.group_size of {matrix.name}",
            value=str(grid.group_size),
            limit=f"{self.name} has a scale for 32 columns or more",
            remedy="Use --set grid.group_size=32.",
            nearest=replace(grid, group_size=32),
        )

    def refuses_plan(self, plan: Plan, model: ModelMap) -> tuple[Refusal, ...]:
        """Nothing: every matrix is on its own."""
        return ()

    def specs(
        self, matrix: Matrix, grid: Grid, dtype: torch.dtype, transform: Transform | None = None
    ) -> tuple[TensorSpec, ...]:
        """What `tensors` will give: sizes are known before any weight is read."""
        (rows, columns), name = matrix.shape, matrix.sources[0].removesuffix("weight")
        groups = columns // grid.resolve(matrix.shape, dtype).columns_per_group(columns)
        return (
            TensorSpec(f"{name}code", torch.uint8, (rows, columns)),
            TensorSpec(f"{name}scale", torch.float32, (rows, groups)),
            TensorSpec(f"{name}zero_point", torch.uint8, (rows, groups)),
        )

    def tensors(self, matrix: Matrix, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Codes, scales and zero points as they are."""
        parts, name = weight.grid.parameters, matrix.sources[0].removesuffix("weight")
        found = {
            "code": weight.code.to(torch.uint8),
            "scale": parts["scale"].float(),
            "zero_point": parts["zero_point"].to(torch.uint8),
        }
        return {f"{name}{part}": value.cpu().contiguous() for part, value in found.items()}

    def weight(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], grid: Grid, transform: Transform | None = None
    ) -> QuantizedWeight:
        """The inverse of `tensors`."""
        code, scale, zero_point = (
            tensors[matrix.sources[0].removesuffix("weight") + part] for part in ("code", "scale", "zero_point")
        )
        fitted = FittedUniform(grid=grid, shape=matrix.shape, scale=scale, zero_point=zero_point.float())
        return QuantizedWeight(shape=matrix.shape, code=code, grid=fitted)

    def config(self, plan: Plan, model: ModelMap) -> Mapping[str, object]:
        """The ``quantization_config``: what a reader cannot see from the tensors."""
        modules = {}
        for entry in plan.entries:
            modules[entry.matrix] = {name: getattr(entry.grid, name) for name in ("bits", "group_size", "symmetric")}
        return {"quant_method": self.name, "modules": modules}

    def packed(
        self, quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
    ) -> Mapping[str, PackedWeight] | None:
        """The way back, which `mezzotint.evaluate` and `mezzotint.convert` take; None of other folders."""
        if quantization.get("quant_method") != self.name:
            return None
        found = {}
        for name, settings in quantization["modules"].items():
            parts = tuple(f"{name}.{part}" for part in ("code", "scale", "zero_point"))
            shape, grid = tuple(tensors[parts[0]].shape), uniform_grid(settings, torch.float32)
            found[f"{name}.weight"] = packed_uniform(self, name, shape, parts, grid=grid, read=read)
        return found

    def check_source(self, folder: Path, config: Mapping[str, object], names: list[str]) -> None:
        """Nothing: every model is taken."""

    def finish(self, folder: Path, config: Mapping[str, object], plan: Plan, model: ModelMap) -> int:
        """Nothing is left to do; the size of the tensors."""
        return plan.bytes


def read(folder: str) -> dict[str, np.ndarray]:
    """The values of every quantized matrix, without mezzotint and without torch."""
    quantization = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["quantization_config"]
    values = {}
    with safe_open(Path(folder, "model.safetensors"), framework="numpy") as file:
        for name in quantization["modules"]:
            code, scale, zero_point = (file.get_tensor(f"{name}.{part}") for part in ("code", "scale", "zero_point"))
            group = np.arange(code.shape[1]) * scale.shape[1] // code.shape[1]
            values[name] = scale[:, group] * (code.astype(np.float32) - zero_point[:, group])
    return values


if __name__ == "__main__":
    model, calibration, other, out = sys.argv[1:]
    FORMATS.add("plain", f"{__name__}:Plain")
    options = {"bits": 4, "calibration": calibration, "samples": 32, "seqlen": 128}
    try:
        mezzotint.plan(model, "gptq", format="plain", settings={"grid.group_size": 16}, **options)
    except FormatError as error:
        print(f"refused: {error}")
    for form in ("plain", "dense"):
        mezzotint.quantize(model, "gptq", out=f"{out}-{form}", format=form, **options)
    values = read(f"{out}-plain")
    with safe_open(Path(f"{out}-dense", "model.safetensors"), framework="pt") as dense:
        for name, value in values.items():
            expected = dense.get_tensor(f"{name}.weight")
            assert torch.equal(torch.from_numpy(value).to(expected.dtype), expected), name
    print(f"{len(values)} matrices, every value that of the dense folder")
    result = mezzotint.evaluate(f"{out}-plain", other, against=model, seqlen=64, windows=8)
    print(f"KL {result.kl_nats:.4f}")
