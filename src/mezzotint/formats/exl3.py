"""EXL3, the format of ExLlamaV3: trellis codes between two Hadamard matrices. Experimental.

The layout is that of https://github.com/turboderp-org/exllamav3 (MIT): read in its sources, none of which are used; no
engine has run what is written here yet. A matrix of ``K`` whole bits a weight has the tensors

* ``trellis`` int16 ``[in / 16, out / 16, 16 K]``: tiles of 256 codes. Two numbers, low half first, are one word of the
  trellis code of docs/format.md with 16 bits of state, whose strings, states and order of weights are the same.
* ``suh`` float16 ``[in]`` and ``svh`` float16 ``[out]``: ``W = diag(svh) H V H diag(suh)`` with ``V`` what the codes
  stand for, and ``H`` Sylvester's Hadamard matrices in blocks of 128, over the root of 128.
* ``mul1`` int32 ``[]``: the multiplier of the code. ExLlamaV3 has two other codes, which are not read here.

Here ``suh`` is the scale of the matrix with the sign of each input, and ``svh`` the signed scales of the outputs.
ExLlamaV3 computes ``V`` in float16, ``fma(1024 + b, 0.0067673, -10.3828)`` with ``b`` the sum of bytes: between .0045
below and .0009 above ``(b - 510) / 147.7``.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mezzotint.core.contracts import Grid, Matrix, ModelMap, QuantizedWeight, Transform
from mezzotint.core.plans import Entry, PackedWeight, Plan, Refusal, TensorSpec
from mezzotint.errors import FormatError
from mezzotint.formats.schemes import refuses_linear
from mezzotint.formats.targets import module_of
from mezzotint.grids.trellis import SIDE, FittedTrellis, TrellisGrid
from mezzotint.transforms.hadamard import Hadamard, HadamardBasis

METHOD = "exl3"
PARTS = ("trellis", "suh", "svh", "mul1")
TRANSFORM = Hadamard(block=128, sides="both")
_MULTIPLE = 128
_MULTIPLIER = 0x83DCD12D - 2**32
_STATES = 16


class Exl3:
    """Trellis codes of whole bits, for ``nn.Linear``; see the module."""

    name: ClassVar[str] = METHOD
    copies: ClassVar[int] = 1

    def refuses(self, entry: Entry, matrix: Matrix) -> Refusal | None:
        """The first rule that this entry breaks, or None.

        Rules: ``linear-only``, ``tied``, ``exl3-width``, ``exl3-code``, ``exl3-basis``.
        """
        refusal = refuses_linear(matrix)
        if refusal is not None:
            return refusal
        if any(size % _MULTIPLE for size in matrix.shape):
            return Refusal(
                rule="exl3-width",
                what=f"shape of {matrix.name}",
                value=f"{matrix.shape[0]} x {matrix.shape[1]}",
                limit=f"EXL3 turns blocks of {_MULTIPLE} rows and columns",
                remedy="Keep it, or use --for mezzotint.",
            )
        nearest = _nearest(entry.grid)
        if not holds(entry.grid):
            return Refusal(
                rule="exl3-code",
                what=f"grid of {matrix.name}",
                value=f"{entry.grid.kind} of {entry.grid.bits:g} bits",
                limit="EXL3 holds the trellis with 16 bits of state, one scale a matrix and whole bits",
                remedy=f"Use --set grid.kind=trellis --set grid.states=16 --set grid.bits={nearest.bits:g}.",
                nearest=nearest,
            )
        if entry.basis != TRANSFORM:
            return Refusal(
                rule="exl3-basis",
                what=f"transform of {matrix.name}",
                value="none" if entry.basis is None else repr(entry.basis),
                limit="EXL3 has Hadamard matrices of 128 on both sides",
                remedy="Use --set transform.kind=hadamard with its block and sides as they are by default.",
                nearest=entry.grid,
            )
        return None

    def refuses_plan(self, plan: Plan, model: ModelMap) -> tuple[Refusal, ...]:
        """Nothing: every matrix is on its own."""
        return ()

    def specs(
        self, matrix: Matrix, grid: Grid, dtype: torch.dtype, transform: Transform | None = None
    ) -> tuple[TensorSpec, ...]:
        """What `tensors` will give."""
        assert isinstance(grid, TrellisGrid), f"{matrix.name}: `refuses` accepts trellis grids only"
        return tuple(TensorSpec(f"{_module(matrix)}.{name}", *spec) for name, spec in _specs(matrix, grid).items())

    def tensors(self, matrix: Matrix, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack one matrix.

        Raises:
            FormatError: the scale of the matrix is no float16 number.
        """
        fitted, basis = weight.grid, weight.basis
        assert isinstance(fitted, FittedTrellis), f"{matrix.name}: `refuses` accepts trellis grids only"
        assert isinstance(basis, HadamardBasis), f"{matrix.name}: `refuses` accepts Hadamard bases only"
        scale = fitted.scale.cpu().to(torch.float16)
        if not torch.equal(scale.to(fitted.scale.dtype), fitted.scale.cpu()):
            raise FormatError(
                f"{matrix.name} has the scale {float(fitted.scale):g}, which float16 cannot hold, and EXL3 stores no "
                "other. Quantize the original again."
            )
        bits = basis.input_sign.cpu().unsqueeze(1) >> torch.arange(8) & 1
        sign = 1 - 2 * bits.flatten()[: matrix.shape[1]].to(torch.float16)
        found = {
            "trellis": weight.code.cpu().contiguous().view(torch.int16),
            "suh": sign * scale,
            "svh": basis.output_scale.cpu(),
            "mul1": torch.tensor(_MULTIPLIER, dtype=torch.int32),
        }
        return {f"{_module(matrix)}.{name}": value for name, value in found.items()}

    def weight(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], grid: Grid, transform: Transform | None = None
    ) -> QuantizedWeight:
        """The inverse of `tensors`.

        Raises:
            FormatError: a tensor is missing, of another dtype or shape, or is none that is written here.
        """
        module = _module(matrix)
        assert isinstance(grid, TrellisGrid), f"{matrix.name}: `read_grid` gives trellis grids"
        parts = {name: tensors[f"{module}.{name}"] for name in PARTS if f"{module}.{name}" in tensors}
        for name, (dtype, shape) in _specs(matrix, grid).items():
            if name not in parts:
                raise FormatError(f"{module}.{name} is missing; the folder is broken. Make or download it again.")
            if (parts[name].dtype, tuple(parts[name].shape)) != (dtype, shape):
                raise FormatError(
                    f"{module}.{name} is {parts[name].dtype} of shape {tuple(parts[name].shape)}; it should be {dtype} "
                    f"of {shape}. Make or download the folder again."
                )
        if int(parts["mul1"]) != _MULTIPLIER:
            raise FormatError(f"{module}.mul1 is {int(parts['mul1'])}; only the code of {_MULTIPLIER} is read.")
        size = parts["suh"].abs()
        if not bool((size == size[0]).all()):
            raise FormatError(
                f"{module}.suh has inputs of different scales, as ExLlamaV3's own quantizer makes them; only what "
                "mezzotint wrote is read."
            )
        negative = torch.signbit(parts["suh"]).to(torch.uint8).view(-1, 8)
        basis = HadamardBasis(
            settings=TRANSFORM,
            shape=matrix.shape,
            input_sign=(negative << torch.arange(8)).sum(1).to(torch.uint8),
            output_scale=parts["svh"],
        )
        fitted = FittedTrellis(grid=grid, shape=matrix.shape, scale=size[:1].float())
        code = parts["trellis"].contiguous().view(torch.int32)
        return QuantizedWeight(shape=matrix.shape, code=code, grid=fitted, basis=basis)

    def packed(
        self, quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
    ) -> Mapping[str, PackedWeight] | None:
        """Every module with a ``trellis``.

        Raises:
            FormatError: a part that is missing, or another code.
        """
        if quantization.get("quant_method") != METHOD:
            return None
        found: dict[str, PackedWeight] = {}
        for module in (name.removesuffix(".trellis") for name in tensors if name.endswith(".trellis")):
            parts = tuple(f"{module}.{part}" for part in PARTS)
            for part in parts:
                if part not in tensors:
                    raise FormatError(f"{part} is missing; the folder is broken, or has another code than mul1.")
            columns, rows, words = (int(size) for size in tensors[parts[0]].shape)
            name, grid, shape = f"{module}.weight", read_grid(module, words), (SIDE * rows, SIDE * columns)
            matrix = Matrix(name=module, parameter=name, sources=(name,), shape=shape, fusion="")
            found[name] = PackedWeight(
                parts=parts,
                dtype=torch.float32,
                shape=shape,
                grid=grid,
                transform=TRANSFORM,
                weight=partial(self._read, matrix, parts, grid, read),
            )
        return found

    def _read(
        self, matrix: Matrix, parts: tuple[str, ...], grid: TrellisGrid, read: Callable[[str], Tensor]
    ) -> QuantizedWeight:
        return self.weight(matrix, {part: read(part) for part in parts}, grid, TRANSFORM)

    def config(self, plan: Plan, model: ModelMap) -> Mapping[str, object]:
        """The ``quantization_config``: mean bits of blocks and of the head. ExLlamaV3 looks at the tensors alone."""
        weights, bits, head = 0, 0, 16.0
        for entry in plan.entries:
            if entry.matrix == model.head:
                head = entry.grid.bits
                continue
            rows, columns = model.matrices[entry.matrix].shape
            weights, bits = weights + rows * columns, bits + rows * columns * entry.grid.bits
        return {
            "quant_method": METHOD,
            "bits": bits / weights if weights else head,
            "head_bits": head,
            "codebook": "mul1",
        }

    def check_source(self, folder: Path, config: Mapping[str, object], names: list[str]) -> None:
        """Nothing: which models ExLlamaV3 knows, its versions say."""

    def finish(self, folder: Path, config: Mapping[str, object], plan: Plan, model: ModelMap) -> int:
        """Nothing is left to do; the size of the tensors."""
        return plan.bytes


def holds(grid: Grid) -> bool:
    """Whether the codes of a grid are EXL3's."""
    return isinstance(grid, TrellisGrid) and _nearest(grid) == replace(grid, window=TrellisGrid().window)


def read_grid(module: str, words: int) -> TrellisGrid:
    """The grid of a packed module.

    Args:
        module: name.
        words: int16 numbers of a tile.

    Raises:
        FormatError: there is no such rate here.
    """
    if words % SIDE or not 1 <= words // SIDE <= 6:
        raise FormatError(f"{module}.trellis has {words / SIDE:g} bits a weight; 1 to 6, without fractions, are read.")
    return TrellisGrid(bits=words // SIDE, states=_STATES)


def _nearest(grid: Grid) -> TrellisGrid:
    return TrellisGrid(bits=min(6, max(1, round(grid.bits))), states=_STATES)


def _specs(matrix: Matrix, grid: TrellisGrid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    rows, columns = matrix.shape
    return {
        "trellis": (torch.int16, (columns // SIDE, rows // SIDE, 2 * grid.rate)),
        "suh": (torch.float16, (columns,)),
        "svh": (torch.float16, (rows,)),
        "mul1": (torch.int32, ()),
    }


def _module(matrix: Matrix) -> str:
    return module_of(matrix.sources[0])
