"""Small linear layers with everything a stage may ask for, and what contract tests compare of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mezzotint.core.contracts import Aim, FittedGrid, Grid, Rounded
from mezzotint.core.linalg import Factor
from mezzotint.core.statistics import Accumulator, Statistics

OPTIONAL_SUMS = frozenset({"drift", "residual", "mean_abs"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSettings:
    """Everything that determines a problem: what a failing test prints.

    Attributes:
        grid: may have settings left on ``auto``.
        rows: a multiple of the grid's.
        columns: a multiple of the grid's.
        tokens: of calibration; may be fewer than the columns.
        seed: of weights and inputs.
        dtype: of weights, sums and targets.
        dead_columns: inputs that are always zero.
        zero_rows: outputs whose weights are all zero.
        duplicates: pairs ``(from, to)`` of inputs that are always equal.
    """

    grid: Grid
    rows: int
    columns: int
    tokens: int
    seed: int
    dtype: torch.dtype = torch.float64
    dead_columns: tuple[int, ...] = ()
    zero_rows: tuple[int, ...] = ()
    duplicates: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearProblem:
    """A linear layer to quantize.

    Attributes:
        weight: ``[out, in]``.
        statistics: with every sum there is, so that any registered stage can be tested.
        aim: the weight itself.
        grid: fitted to the aim.
    """

    settings: ProblemSettings
    weight: Float[Tensor, "out in"] = field(repr=False)
    statistics: Statistics = field(repr=False)
    aim: Aim = field(repr=False)
    grid: FittedGrid = field(repr=False)

    def take_rows(self, rows: slice) -> "LinearProblem":
        """The layer of some outputs; ``rows`` are whole tiles of the grid."""
        return replace(
            self,
            weight=self.weight[rows],
            statistics=self.statistics.take_rows(rows),
            aim=Aim(matrix=self.aim.matrix[rows]),
            grid=self.grid.take_rows(rows),
        )

    def scaled(self, factor: float) -> "LinearProblem":
        """``factor`` times the weights, the residual error and the grid; inputs are the same."""
        residual = self.statistics.residual
        return replace(
            self,
            weight=self.weight * factor,
            statistics=replace(self.statistics, residual=None if residual is None else residual * factor),
            aim=replace(self.aim, matrix=self.aim.matrix * factor),
            grid=self.grid.scaled(factor),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Inputs of a layer, one token a row.

    Attributes:
        quantized: what the quantized prefix produces (xh): correlated, of unequal variance.
        original: what the full-precision model has there (x).
        difference: of the residual streams (r - rh).
    """

    quantized: Float[Tensor, "tokens in"]
    original: Float[Tensor, "tokens in"]
    difference: Float[Tensor, "tokens out"]

    def statistics(self, needs: frozenset[str] = OPTIONAL_SUMS) -> Statistics:
        """Their sums, in their own dtype."""
        rows, width = self.difference.shape[1], self.quantized.shape[1]
        sums = Accumulator(width, needs, rows=rows, dtype=self.quantized.dtype)
        sums.add(self.quantized, original=self.original, residual=self.difference)
        return sums.finish()


def make_tokens(settings: ProblemSettings) -> Tokens:
    """The inputs of a problem."""
    generator = torch.Generator().manual_seed(settings.seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, width = settings.tokens, settings.columns
    mixing = torch.eye(width, dtype=torch.float64) + 0.7 * normal(width, width) / width**0.5
    quantized = normal(tokens, width) @ mixing * torch.exp(0.7 * normal(width))
    original = quantized * (1 + 0.1 * normal(tokens, width))
    for source, copy in settings.duplicates:
        quantized[:, copy], original[:, copy] = quantized[:, source], original[:, source]
    for column in settings.dead_columns:
        quantized[:, column] = original[:, column] = 0
    difference = 0.1 * normal(tokens, settings.rows)
    return Tokens(
        quantized=quantized.to(settings.dtype),
        original=original.to(settings.dtype),
        difference=difference.to(settings.dtype),
    )


def make_weight(settings: ProblemSettings) -> Float[Tensor, "out in"]:
    """The weights of a problem: normal, rows of unequal size."""
    generator = torch.Generator().manual_seed(settings.seed)
    weight = torch.randn(settings.rows, settings.columns, generator=generator, dtype=torch.float64)
    weight *= torch.exp(0.5 * torch.randn(settings.rows, 1, generator=generator, dtype=torch.float64)) / 16
    weight[list(settings.zero_rows)] = 0
    return weight.to(settings.dtype)


def make_problem(settings: ProblemSettings) -> LinearProblem:
    """The problem that these settings determine."""
    weight = make_weight(settings)
    statistics = make_tokens(settings).statistics()
    grid = settings.grid.resolve((settings.rows, settings.columns), settings.dtype)
    return LinearProblem(
        settings=settings,
        weight=weight,
        statistics=statistics,
        aim=Aim(matrix=weight),
        grid=grid.fit(weight, statistics.importance),
    )


def tensors_of(thing: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in dataclasses, mappings and sequences, with its path; private fields (caches) are left out."""
    if isinstance(thing, Tensor):
        yield path, thing
    elif is_dataclass(thing) and not isinstance(thing, type):
        for f in fields(thing):
            if not f.name.startswith("_"):
                yield from tensors_of(getattr(thing, f.name), f"{path}.{f.name}")
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield from tensors_of(value, f"{path}[{key!r}]")
    elif isinstance(thing, tuple | list):
        for i, value in enumerate(thing):
            yield from tensors_of(value, f"{path}[{i}]")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What arguments were, to prove that a call left them alone.

    Example:
        >>> weight = torch.ones(2)
        >>> before = Snapshot.of(weight)
        >>> before.check(weight)
    """

    copies: tuple[tuple[str, Tensor], ...]

    @classmethod
    def of(cls, *things: object) -> "Snapshot":
        """Copies of every tensor in the arguments."""
        return cls(tuple((path, tensor.clone()) for path, tensor in tensors_of(things)))

    def check(self, *things: object) -> None:
        """Raises AssertionError, with the path, for a tensor that is not what it was, bit for bit."""
        now = dict(tensors_of(things))
        for path, copy in self.copies:
            torch.testing.assert_close(
                now[path], copy, rtol=0, atol=0, equal_nan=True, msg=lambda m, p=path: f"{p}: {m}"
            )


def column_scale(grid: FittedGrid) -> Float[Tensor, "out in"]:
    """The distance between neighbouring values of an affine grid, for every weight."""
    affine = grid.affine
    if affine is None:
        raise ValueError(f"grid {grid.grid.kind!r} is not affine: it has no distance between neighbours")
    return affine.scale.abs().repeat_interleave(affine.group_size, dim=1)[:, : grid.shape[1]]


def feedback_error(rounded: Rounded, target: Float[Tensor, "out in"], factor: Factor) -> Float[Tensor, "out in"]:
    """Bound on how far the values at the moment of rounding of two float32 runs that chose the same codes may differ.

    With ``e = (before - value) / diag(U)`` a run computes ``before_j = w_j - sum_i e_i U_ij`` in some order, and each
    run makes an error of at most ``gamma (|w_j| + sum_i |e_i| |U_ij|)`` there, ``gamma = (n + 4) u`` (n products and
    sums, one difference, one division, and the rounding of U and of the decoded value). An error ``eta`` is itself fed
    on: from ``(before - value) N = w + eta - value``, ``N = diag(U)^-1 U``, it becomes ``eta N^-1``. Hence, to first
    order and for two runs, ``2 gamma (|w| + |e| |U|) |N^-1|``.

    Returns:
        ``[out, in]`` in float64, columns in their natural order.
    """
    assert rounded.before is not None
    width = target.shape[1]
    order = torch.arange(width) if factor.permutation is None else factor.permutation
    upper = factor.upper.double()
    unit = upper / upper.diagonal()[:, None]
    inverse = torch.linalg.solve_triangular(unit, torch.eye(width, dtype=torch.float64), upper=True, unitriangular=True)
    error = (rounded.before.double() - rounded.value.double())[:, order] / upper.diagonal()
    gamma = (width + 4) * torch.finfo(torch.float32).eps / 2
    local = gamma * (target.double()[:, order].abs() + error.abs() @ upper.abs())
    bound = torch.empty(target.shape, dtype=torch.float64)
    bound[:, order] = 2 * local @ inverse.abs()
    return bound


def expected_share(
    difference: Float[Tensor, "out in"], scale: Float[Tensor, "out in"], permutation: Int[Tensor, " in"] | None
) -> float:
    """Expected share of differing codes of two runs whose values differ by at most ``difference`` until codes do.

    A boundary between codes lies between the two values with probability ``difference / scale``, if it can lie
    anywhere. From there on everything in the row may differ: the columns still to be visited.
    """
    rows, width = difference.shape
    order = torch.arange(width) if permutation is None else permutation
    flips = (difference / scale.double())[:, order].clamp(max=1)
    return float((flips * torch.arange(width, 0, -1)).sum()) / (rows * width)
