"""Incoherence processing of QuIP: a diagonal rescale, then random orthogonal matrices on both sides."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float16, Int, Int64
from torch import Tensor

from mezzotint import kernels
from mezzotint.core.contracts import Aim
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError

Matrices = Literal["kronecker", "hadamard"]

_SEEDS = 2**32
_FLOOR = 1e-8  # of the largest entry of a diagonal, as in the paper's code


@dataclass(frozen=True, slots=True, kw_only=True)
class Quip:
    """Settings of QuIP's incoherence processing (arXiv 2307.13304, section 4 and algorithms 1 and 2).

    ``T' = U T diag(s) V'`` and ``x' = V diag(1/s) x`` with ``s = (diag H / diag T'T)^(1/4)``, which makes both
    diagonals equal; ``U`` and ``V`` are random orthogonal matrices. The paper processes each matrix on its own; here
    those that share their inputs share ``s`` and ``V``, with the sum of their ``diag T'T``.

    Attributes:
        matrices: ``kronecker`` as in the paper, random permutations followed by Kronecker products of two random
            orthogonal matrices; ``hadamard`` random signs followed by a Hadamard matrix of the largest power of two
            that divides the width, in a Kronecker product with a random orthogonal matrix of what is left (randomised
            Hadamard transform, QuIP#, arXiv 2402.04396, section 3): ``n log n`` operations instead of ``n^(3/2)``.
        rescale: False leaves ``s`` at one.
    """

    kind: ClassVar[str] = "quip"
    matrices: Matrices = "kronecker"
    rescale: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    run_time: ClassVar[bool] = True

    def fit(
        self,
        aims: Sequence[Aim],
        fit: Statistics | None,
        probe: Callable[[Tensor], float] | None,
        generator: torch.Generator,
    ) -> tuple["QuipBasis", ...]:
        """One basis per aim, all with the same input side.

        The generator is asked for the seed of the input side, then for that of each output side in turn. Scales are
        rounded to float16.

        Raises:
            ConfigError: the matrices do not have one width.
        """
        widths = {aim.matrix.shape[1] for aim in aims}
        if len(widths) > 1:
            raise ConfigError(f"the matrices of an input group have widths {sorted(widths)}; they must share 1 width.")
        scale = torch.ones_like(aims[0].matrix[0])
        if self.rescale:
            energy = sum((aim.matrix.square().sum(0) for aim in aims), torch.zeros_like(scale))
            scale = _equalising(scale if fit is None else fit.gram.diagonal().to(scale), energy)
        seeds = torch.randint(_SEEDS, (1 + len(aims),), generator=generator, device=generator.device).tolist()
        return tuple(
            QuipBasis(
                settings=self,
                shape=(aim.matrix.shape[0], aim.matrix.shape[1]),
                seed=torch.tensor([seeds[0], seed], device=scale.device),
                input_scale=scale.to(torch.float16),
            )
            for aim, seed in zip(aims, seeds[1:], strict=True)
        )

    def specs(self, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The seeds of the input and of the output side, and a float16 an input."""
        return {"seed": (torch.int64, (2,)), "input_scale": (torch.float16, (shape[1],))}

    def restore(self, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> "QuipBasis":
        """The basis that stored these tensors."""
        return QuipBasis(settings=self, shape=shape, seed=stored["seed"], input_scale=stored["input_scale"])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuipBasis:
    """``L = U``, ``R = diag(s) V'``, so ``x' = V diag(1/s) x`` and ``y = U' y'``.

    The objective is that of the original, summed over rows: for ``W' = U W R`` and the sums of `statistics`,
    ``tr(W' gram' W'^T) = tr(W gram W^T)``.

    Attributes:
        seed: of the input side and of the output side, each from 0 to ``2^32 - 1``; see `orthogonal`.
        input_scale: positive.
    """

    settings: Quip
    shape: tuple[int, int]
    seed: Int64[Tensor, " sides"]
    input_scale: Float16[Tensor, " in"]
    # sides in the dtypes and on the devices they were asked for: a model asks at every token
    _ready: dict[tuple[int, torch.dtype, torch.device], "Side"] = field(default_factory=dict, init=False, repr=False)

    @property
    def kind(self) -> str:
        """That of the transform."""
        return self.settings.kind

    @property
    def run_time(self) -> bool:
        """Inputs and outputs are turned while the model runs; see `input` and `output`."""
        return True

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """Seeds and scales."""
        return {"seed": self.seed, "input_scale": self.input_scale}

    def weight(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """``U w diag(s) V'``, in float32 (float64 if ``w`` is)."""
        wide = _wide(w)
        return self._left(self._side(1, wide).turn(wide * self.input_scale.to(wide)))

    def inverse(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """``U' w V diag(1/s)``, in float32 (float64 if ``w`` is)."""
        wide = _wide(w)
        rows = self._side(0, wide).back(wide.t()).t()
        return self._side(1, wide).back(rows) / self.input_scale.to(wide)

    def statistics(self, s: Statistics) -> Statistics:
        """The sums of ``x'`` and, for the residual stream, of ``U r``.

        ``gram' = V S^-1 gram S^-1 V'``, made symmetric to the last bit, ``drift'`` alike, ``residual' = U residual S^-1
        V'``. Sums of absolute values of turned inputs cannot be had from ``mean_abs``, which is left out.
        """
        gram = self._both(s.gram)
        return replace(
            s,
            gram=(gram + gram.t()) / 2,
            drift=None if s.drift is None else self._both(s.drift),
            output_drift=None if s.output_drift is None else self._left(self.input(s.output_drift)),
            residual=None if s.residual is None else self._left(self.input(s.residual)),
            mean_abs=None,
        )

    def input(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
        """``V diag(1/s) x`` of every token; float32, or float64 if ``x`` is."""
        wide = _wide(x)
        return self._side(1, wide).turn(wide / self.input_scale.to(wide))

    def output(self, y: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens out"]:
        """``U' y'`` of every token; float32, or float64 if ``y`` is."""
        wide = _wide(y)
        return self._side(0, wide).back(wide)

    def _left(self, values: Float[Tensor, "out k"]) -> Float[Tensor, "out k"]:
        return self._side(0, values).turn(values.t()).t().contiguous()

    def _both(self, square: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        return self.input(self.input(square).t()).t().contiguous()

    def _side(self, axis: int, like: Tensor) -> "Side":
        key = axis, like.dtype, like.device
        if key not in self._ready:
            side = orthogonal(self.shape[axis], int(self.seed[1 - axis]), self.settings.matrices)
            self._ready[key] = side.to(like)
        return self._ready[key]


class RandomHadamard(NamedTuple):
    """Signs, then the Kronecker product of an orthogonal matrix of odd size and a Hadamard matrix."""

    sign: Float[Tensor, " n"]
    left: Float[Tensor, "p p"]

    def to(self, like: Tensor) -> "RandomHadamard":
        """In the dtype and on the device of a tensor."""
        return RandomHadamard(self.sign.to(like), self.left.to(like))

    def turn(self, rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """The matrix times each row."""
        found = kernels.hadamard(rows * self.sign, self._block)
        return found if len(self.left) == 1 else (self.left @ self._square(found)).reshape(rows.shape)

    def back(self, rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """The inverse of `turn`."""
        found = rows if len(self.left) == 1 else (self.left.t() @ self._square(rows)).reshape(rows.shape)
        return kernels.hadamard(found, self._block) * self.sign

    @property
    def _block(self) -> int:
        return len(self.sign) // len(self.left)

    def _square(self, rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows p q"]:
        return rows.reshape(-1, len(self.left), self._block)


class Kronecker(NamedTuple):
    """A permutation, then the Kronecker product of two orthogonal matrices."""

    permutation: Int[Tensor, " n"]
    left: Float[Tensor, "p p"]
    right: Float[Tensor, "q q"]

    def to(self, like: Tensor) -> "Kronecker":
        """In the dtype and on the device of a tensor."""
        return Kronecker(self.permutation.to(like.device), self.left.to(like), self.right.to(like))

    def turn(self, rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """The matrix times each row."""
        square = rows[:, self.permutation].reshape(-1, len(self.left), len(self.right))
        return (self.left @ square @ self.right.t()).reshape(rows.shape)

    def back(self, rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """The inverse of `turn`."""
        square = rows.reshape(-1, len(self.left), len(self.right))
        found = torch.empty_like(rows)
        found[:, self.permutation] = (self.left.t() @ square @ self.right).reshape(rows.shape)
        return found


Side = Kronecker | RandomHadamard  # a random orthogonal matrix that is never formed


@lru_cache(maxsize=8)
def orthogonal(size: int, seed: int, matrices: Matrices) -> Side:
    """The random orthogonal matrix of that size and seed, in float64: the same on every machine, up to rounding.

    Numbers are drawn from numpy's ``RandomState(seed)``, whose streams are fixed for good: the permutation, then normal
    numbers for the left and for the right factor, row by row; or numbers from 0 to 1 whose halves are the signs, then
    normal ones for the odd factor. Each factor is the orthogonal one of the QR decomposition with a positive diagonal,
    which is uniformly distributed (Mezzadri, math-ph/0609050).

    Args:
        size: of the product; see `factors`.
        seed: from 0 to ``2^32 - 1``.
        matrices: see `Quip`.
    """
    draw = np.random.RandomState(seed)

    def uniform(n: int) -> Tensor:
        q, r = torch.linalg.qr(torch.from_numpy(draw.standard_normal((n, n))))
        return q * torch.where(r.diagonal() < 0, -1.0, 1.0)

    if matrices == "hadamard":
        sign = torch.from_numpy(np.where(draw.random_sample(size) < 0.5, -1.0, 1.0))
        odd = size // kernels.hadamard_block(size, size)
        return RandomHadamard(sign, torch.ones(1, 1, dtype=torch.float64) if odd == 1 else uniform(odd))
    permutation = torch.from_numpy(draw.permutation(size))
    left, right = (uniform(n) for n in factors(size))
    return Kronecker(permutation, left, right)


def factors(size: int) -> tuple[int, int]:
    """Two factors of about the same size: the prime factors, by turns.

    Example:
        >>> factors(11008)
        (688, 16)
    """
    primes, rest = [], size
    divisor = 2
    while rest > 1:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1 if divisor * divisor <= rest else max(rest - divisor, 1)
    return math.prod(primes[::2]), math.prod(primes[1::2])


def _equalising(of_inputs: Float[Tensor, " in"], of_weights: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
    """``(a / b)^(1/4)`` with geometric mean 1, which makes ``a / s^2`` and ``b s^2`` equal up to a factor."""
    tiny = torch.finfo(torch.float64).tiny
    a, b = (t / t.max().clamp_min(tiny) for t in (of_inputs.double(), of_weights.double()))
    logarithm = (a.clamp_min(_FLOOR).log() - b.clamp_min(_FLOOR).log()) / 4
    return (logarithm - logarithm.mean()).exp().to(of_weights)


def _wide(values: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    return values if values.dtype == torch.float64 else values.float()
