"""The relaxed problem of one linear inside a submodule: a least-squares problem that is never formed.

Of a batch only three things are known: the inputs of the linear, the gradient of half the submodule's loss in its
outputs, and products with the curvature ``J'J`` of that loss in its outputs (``J`` is the derivative of what the
submodule gives). Where that is linear in the outputs the problem is an exact quadratic and one step solves it;
elsewhere each step is one of Gauss-Newton.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.statistics import Statistics

_HALVINGS = 4
_LEAST_SCALE = 1e-3  # of a row's curvature, as a fraction of the mean over rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """A batch of a relaxed problem at some weight.

    Attributes:
        inputs: of the linear.
        tokens: how many of them count: padding does not.
        residual: gives the sum of squares, and ``J' r`` in the linear's outputs ``[tokens, rows]``.
        curvature: ``J' J d`` for a change ``d`` of the linear's outputs.
        linear: what the submodule gives is linear in the linear's outputs.
        windows: their numbers among those of all processes, all of one length.
    """

    inputs: Float[Tensor, "tokens in"]
    tokens: float
    residual: Callable[[], tuple[float, Tensor]]
    curvature: Callable[[Tensor], Tensor]
    linear: bool
    windows: range = range(1)


Batches = Callable[[Float[Tensor, "rows in"]], Iterable[Slope]]  # at a weight; one batch lives at a time


@runtime_checkable
class Sums(Protocol):
    """Adds up what several processes have, each of its own batches."""

    def add_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums, the same bytes everywhere."""
        ...

    def total(self, *values: float) -> tuple[float, ...]:
        """Sums of numbers, the same everywhere."""
        ...


class Own:
    """One process has all batches."""

    def add_(self, tensors: Iterable[Tensor]) -> None:
        """They are sums already."""

    def total(self, *values: float) -> tuple[float, ...]:
        """The same."""
        return values


OWN = Own()


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How a relaxed problem is solved.

    Attributes:
        damping: ridge towards the original weight, as a fraction of the mean diagonal of the inputs' gram.
        iterations: of conjugate gradients.
        steps: of Gauss-Newton, where the submodule is not linear in the member.
        sums: over the processes that share the batches.
    """

    damping: float
    iterations: int
    steps: int = 2
    sums: Sums = OWN


def relax(
    batches: Batches,
    start: Float[Tensor, "rows in"],
    original: Float[Tensor, "rows in"],
    fit: Statistics,
    *,
    search: Search,
) -> Float[Tensor, "rows in"]:
    """``argmin_V sum |r(V)|^2 + sum_i s_i lambda |V_i - W_i|^2``: the relaxed member, others held fixed.

    ``s_i`` is the mean curvature of row ``i`` and lambda the damping of `Statistics.ridge` for the tokens that are
    used, so that a lone linear (curvature one) gets QEP's ``W + W D (H + lambda I)^-1``. The inverse of
    ``diag(s) x (H + lambda I)`` preconditions the conjugate gradients; for a lone linear it is the exact inverse, and
    one iteration solves the problem.

    Where every batch is linear one step solves the problem, and is taken as it is.

    Args:
        batches: the problem at a weight; gone through once per iteration, but a single batch is kept.
        start: where the search starts.
        original: what the ridge pulls towards.
        fit: of the member's inputs.
        search: damping and numbers of iterations.
    """
    weight = start
    for _ in range(search.steps):
        problem = _Problem(batches, weight, original, fit, search)
        change = problem.solve(search.iterations)
        if problem.linear:
            return weight + change
        better = _shortened(batches, problem, weight, change, search.sums)
        if better is None:
            return weight
        weight = better
    return weight


class _Problem:
    """The quadratic around one weight."""

    def __init__(self, batches: Batches, weight: Tensor, original: Tensor, fit: Statistics, search: Search) -> None:
        self._batches, self._weight, self._original = batches, weight, original
        self._fit, self._damping, self._sums = fit, search.damping, search.sums
        self._only: Slope | None = None
        gradient = torch.zeros_like(weight)
        scale = torch.zeros_like(weight[:, 0])
        squares, tokens, bent, count = 0.0, 0.0, 0.0, 0
        for slope in batches(weight):
            loss, outputs = slope.residual()
            squares += loss
            gradient.addmm_(outputs.t(), slope.inputs)
            # Hutchinson: signs at random see the diagonal of the curvature, and of the identity they see one exactly
            signs = _signs(slope.windows, outputs)
            scale += (signs * slope.curvature(signs)).sum(0)
            tokens, count = tokens + slope.tokens, count + 1
            self._only = slope if count == 1 else None
            bent += not slope.linear
        self._sums.add_((gradient, scale))
        self.loss, tokens, bent = self._sums.total(squares, tokens, bent)
        self.linear = not bent
        scale /= max(tokens, 1.0)
        self._scale = scale.clamp_min(_LEAST_SCALE * float(scale.clamp_min(0).mean()) or 1.0).unsqueeze(1)
        # the statistics may have seen other tokens
        self._share = tokens / fit.tokens
        used = fit.ridge(self._damping).damping
        self._ridge = self._share * used * float(fit.gram.diagonal().mean())
        self._gradient = gradient + self._pull(weight - original)

    def penalty(self, weight: Tensor) -> float:
        """The ridge's part of the objective."""
        difference = weight - self._original
        return float((self._pull(difference) * difference).sum())

    def _pull(self, difference: Tensor) -> Tensor:
        return self._scale * (self._ridge * difference)

    def _product(self, direction: Tensor) -> Tensor:
        result = torch.zeros_like(direction)
        for slope in self._batches(self._weight) if self._only is None else (self._only,):
            result.addmm_(slope.curvature(slope.inputs @ direction.t()).t(), slope.inputs)
        self._sums.add_((result,))
        return result.add_(self._pull(direction))

    def _preconditioned(self, residual: Tensor) -> Tensor:
        return self._fit.solve(residual / self._scale, self._damping) / self._share

    def solve(self, iterations: int) -> Tensor:
        """Conjugate gradients from no change at all."""
        change = torch.zeros_like(self._weight)
        residual = -self._gradient
        direction = self._preconditioned(residual)
        energy = float((residual * direction).sum())
        if energy <= 0:
            return change
        first = energy
        for left in range(iterations, 0, -1):
            product = self._product(direction)
            bend = float((direction * product).sum())
            if bend <= 0:  # nothing but rounding error is left in this direction
                break
            length = energy / bend
            change += length * direction
            if left == 1:
                break
            residual = residual - length * product
            towards = self._preconditioned(residual)
            new = float((residual * towards).sum())
            if new <= torch.finfo(change.dtype).eps ** 2 * first:
                break
            direction = towards + new / energy * direction
            energy = new
        return change


def _signs(windows: range, like: Float[Tensor, "tokens rows"]) -> Float[Tensor, "tokens rows"]:
    """Plus and minus one at random; those of a window are the same in any batch and any process."""
    shape, generator = (len(like) // len(windows), like.shape[1]), torch.Generator(device=like.device)
    pieces = [
        torch.randint(0, 2, shape, generator=generator.manual_seed(number), device=like.device) for number in windows
    ]
    return torch.cat(pieces).to(like.dtype) * 2 - 1


def _shortened(batches: Batches, problem: _Problem, weight: Tensor, change: Tensor, sums: Sums) -> Tensor | None:
    """The weight after the longest of a few fractions of the change that lowers the objective, or None."""
    before = problem.loss + problem.penalty(weight)
    for halving in range(_HALVINGS):
        candidate = weight + change / 2**halving
        (loss,) = sums.total(sum((slope.residual()[0] for slope in batches(candidate)), 0.0))
        if loss + problem.penalty(candidate) < before:
            return candidate
    return None


class Derivative(NamedTuple):
    """A function around one point.

    Attributes:
        push: products with its derivative.
        pull: products with the transpose of that.
        linear: it is linear (a constant may be added): its derivative is the same everywhere.
    """

    value: Tensor
    push: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor]
    linear: bool


def derivative(function: Callable[[Tensor], Tensor], outputs: Tensor) -> Derivative:
    """A function of the outputs of a linear, around these."""
    value, pull = torch.func.vjp(function, outputs)[:2]
    zero = function(torch.zeros_like(outputs))
    linear = _is_linear(function, outputs, value, zero)
    constant = zero if bool(zero.any()) else None

    def push(change: Tensor) -> Tensor:
        if linear:
            return function(change) if constant is None else function(change) - constant
        # the transpose of the transpose: forward mode would compile parts of torch first
        return torch.func.vjp(lambda v: torch.func.vjp(function, outputs)[1](v)[0], torch.zeros_like(value))[1](change)[
            0
        ]

    return Derivative(value, push, lambda change: pull(change)[0], linear)


def _is_linear(function: Callable[[Tensor], Tensor], outputs: Tensor, value: Tensor, zero: Tensor) -> bool:
    """Whether minus two times the outputs change it by minus two times as much: no norm, gate or rectifier does."""
    if not torch.isfinite(zero).all():
        return False
    once = value - zero
    # exact but for rounding, which stays far below what a norm or an activation does to a factor of minus two
    off = torch.linalg.vector_norm(function(-2 * outputs) - zero + 2 * once)
    return bool(off <= 1e-4 * torch.linalg.vector_norm(once))
