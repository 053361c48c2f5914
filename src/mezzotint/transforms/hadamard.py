"""Random signs and block Hadamard matrices: any matrix looks Gaussian to the grid, whatever outliers it had."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor

from mezzotint import kernels
from mezzotint.core.contracts import Aim
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hadamard:
    """Settings of the randomised block Hadamard transform.

    ``T' = Ho S^-1 T D Hi`` with ``Ho``, ``Hi`` orthonormal Hadamard matrices on blocks of outputs and inputs, ``D``
    random signs, ``S`` the rms of each row with a random sign (QuIP#, arXiv 2402.04396, section 3, with one Hadamard
    matrix of the full width; blocks serve any width).

    Attributes:
        block: columns and rows rotated together: the largest power of two up to this that divides the width.
        sides: ``input`` leaves out ``Ho`` and the output signs: nothing but the scales is left to do on outputs.
    """

    kind: ClassVar[str] = "hadamard"
    block: int = 128
    sides: Literal["both", "input"] = "both"
    needs: ClassVar[frozenset[str]] = frozenset()
    run_time: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.block <= 65536 or self.block & (self.block - 1):
            raise ConfigError(f"transform.block is {self.block}; it must be a power of two from 1 to 65536.")

    def fit(
        self,
        aims: Sequence[Aim],
        fit: Statistics | None,
        probe: Callable[[Tensor], float] | None,
        generator: torch.Generator,
    ) -> tuple["HadamardBasis", ...]:
        """One basis per aim, all with the same input signs.

        The generator is asked for the input signs, then for the output signs of each aim in turn. Scales are rounded to
        float16, and kept in its range of normal numbers; a row of zeros has scale 1.

        Raises:
            ConfigError: the matrices do not have one width.
        """
        widths = {aim.matrix.shape[1] for aim in aims}
        if len(widths) > 1:
            raise ConfigError(f"the matrices of an input group have widths {sorted(widths)}; they must share 1 width.")
        input_sign = [_pack(_negative(width, generator)) for width in widths]
        bases = []
        for aim in aims:
            rows, width = aim.matrix.shape
            scale = _row_scale(aim.matrix)
            if self.sides == "both":
                scale = torch.where(_negative(rows, generator).to(scale.device), -scale, scale)
            sign = input_sign[0].to(scale.device)
            bases.append(HadamardBasis(settings=self, shape=(rows, width), input_sign=sign, output_scale=scale))
        return tuple(bases)

    def specs(self, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """A bit an input, in whole bytes, and a float16 an output."""
        rows, columns = shape
        return {"input_sign": (torch.uint8, (-(-columns // 8),)), "output_scale": (torch.float16, (rows,))}

    def restore(self, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> "HadamardBasis":
        """The basis that stored these tensors.

        Raises:
            ConfigError: their lengths do not fit the shape.
        """
        return HadamardBasis(
            settings=self, shape=shape, input_sign=stored["input_sign"], output_scale=stored["output_scale"]
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HadamardBasis:
    """``L = Ho S^-1``, ``R = D Hi``, so ``x' = Hi D x`` and ``y = S Ho y'``.

    What becomes of the objective: for ``V' = L V R`` and the sums of `statistics`, ``V' gram' V'^T = L (V gram V^T)
    L^T``, the cross term alike, and ``L^T L = S^-2``. So ``tr(V' gram' V'^T) = sum_r (V gram V^T)_rr / s_r^2``: the
    objective in this basis is that of the original rows, each divided by the square of its scale, and errors count
    relative to the size of their output. ``Ho`` changes no total. With ``sides="input"`` the same holds row by row, so
    that each row keeps its minimum; with both sides a row of ``V'`` is a mixture of a block of outputs, and a rounding
    that treats rows one by one minimises those.

    Attributes:
        input_sign: one bit an input, set where the sign is negative; input ``i`` is bit ``i % 8`` of byte ``i // 8``.
        output_scale: rms of each row; its sign is that of the output.
    """

    settings: Hadamard
    shape: tuple[int, int]
    input_sign: UInt8[Tensor, " bytes"]
    output_scale: Float16[Tensor, " out"]
    # signs and scales in the dtypes and on the devices they were asked for: a model asks at every token
    _ready: dict[tuple[str, torch.dtype, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        found = len(self.output_scale), len(self.input_sign)
        needed = self.shape[0], -(-self.shape[1] // 8)
        if found != needed:
            raise ConfigError(
                f"a basis of shape {self.shape} needs {needed[0]} scales and {needed[1]} bytes of signs; "
                f"these are {found[0]} and {found[1]}."
            )

    @property
    def kind(self) -> str:
        """That of the transform."""
        return self.settings.kind

    @property
    def run_time(self) -> bool:
        """Inputs are rotated while the model runs; see `input` and `output`."""
        return True

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """Signs of inputs, one bit each in whole bytes, and signed scales of outputs."""
        return {"input_sign": self.input_sign, "output_scale": self.output_scale}

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of outputs and inputs: (rows, columns)."""
        rows, width = self.shape
        limit = self.settings.block
        return (
            kernels.hadamard_block(rows, limit) if self.settings.sides == "both" else 1,
            kernels.hadamard_block(width, limit),
        )

    def weight(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """``Ho S^-1 w D Hi``, in float32 (float64 if ``w`` is)."""
        wide = _wide(w)
        rows = wide / self._scale(wide).unsqueeze(1)
        return self._rotate_rows(self._right(rows))

    def inverse(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """``S Ho w Hi D``, in float32 (float64 if ``w`` is)."""
        wide = self._rotate_rows(_wide(w))
        columns = kernels.hadamard(wide, self.blocks[1])
        return columns.mul_(self._sign(wide)).mul_(self._scale(wide).unsqueeze(1))

    def statistics(self, s: Statistics) -> Statistics:
        """The sums of ``x' = R^-1 x`` and, for the residual stream, of ``L r``.

        ``gram' = R^T gram R``, made symmetric to the last bit; ``drift' = R^T drift R``; ``residual' = L residual R``,
        and ``output_drift`` alike. Then ``cross' = W' (gram' + drift') + residual' = L cross R``, which belongs to
        ``V' = L V R``. Sums of absolute values of rotated inputs cannot be had from ``mean_abs``, which is left out.
        """
        gram = self._both(s.gram)
        return replace(
            s,
            gram=(gram + gram.t()) / 2,
            drift=None if s.drift is None else self._both(s.drift),
            output_drift=None if s.output_drift is None else self.weight(s.output_drift),
            residual=None if s.residual is None else self.weight(s.residual),
            mean_abs=None,
        )

    def input(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
        """``x' = Hi D x`` of every token, before the matrix in this basis; float32, or float64 if ``x`` is."""
        return self._right(x)

    def output(self, y: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens out"]:
        """``y = S Ho y'`` of every token, after the matrix in this basis; float32, or float64 if ``y`` is."""
        rotated = kernels.hadamard(y, self.blocks[0])
        return rotated.mul_(self._scale(rotated))

    def take_rows(self, rows: Int[Tensor, " rows"]) -> "HadamardBasis":
        """The basis of some rows; with ``sides="input"`` every row has one of its own."""
        assert self.settings.sides == "input", "rows are mixed with others"
        scale = self.output_scale[rows]
        taken = replace(self, shape=(len(scale), self.shape[1]), output_scale=scale)
        taken._ready.update({key: value for key, value in self._ready.items() if key[0] == "sign"})  # noqa: SLF001
        return taken

    def _right(self, values: Float[Tensor, "rows in"]) -> Float[Tensor, "rows in"]:
        return kernels.hadamard(values * self._sign(values), self.blocks[1])

    def _both(self, square: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        return self._right(self._right(square).t()).t().contiguous()

    def _rotate_rows(self, values: Float[Tensor, "out k"]) -> Float[Tensor, "out k"]:
        if self.blocks[0] == 1:
            return values
        return kernels.hadamard(values.t(), self.blocks[0]).t().contiguous()

    def _sign(self, like: Tensor) -> Float[Tensor, " in"]:
        key = "sign", like.dtype, like.device
        if key not in self._ready:
            bits = self.input_sign.to(like.device).unsqueeze(1) >> torch.arange(8, device=like.device) & 1
            self._ready[key] = (1 - 2 * bits.flatten()[: self.shape[1]]).to(like.dtype)
        return self._ready[key]

    def _scale(self, like: Tensor) -> Float[Tensor, " out"]:
        key = "scale", like.dtype, like.device
        if key not in self._ready:
            self._ready[key] = self.output_scale.to(like.device, like.dtype)
        return self._ready[key]


def _wide(values: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    return values if values.dtype == torch.float64 else values.float()


def _negative(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=generator, device=generator.device).bool()


def _pack(bits: Tensor) -> UInt8[Tensor, " bytes"]:
    """Eight bits a byte, the first in the lowest place; the last byte is filled with zeros."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8))
    return (padded.view(-1, 8) << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)


def _row_scale(matrix: Float[Tensor, "out in"]) -> Float16[Tensor, " out"]:
    """Root mean square of each row, in float64 until it is rounded."""
    limits = torch.finfo(torch.float16)
    rms = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64) / matrix.shape[1] ** 0.5
    scale = rms.clamp(limits.smallest_normal, limits.max).to(torch.float16)
    return torch.where(rms > 0, scale, torch.ones_like(scale))
