"""Statistics of the inputs of a linear: sums over tokens, added batch by batch.

MATH.md section 0: ``gram = sum w xh xh'``, ``drift = sum w (x - xh) xh'``, ``residual = sum w (r - rh) xh'``. Of a
matrix with far fewer rows than columns, the product with the drift is smaller than the drift: that is summed instead.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mezzotint.core import panels
from mezzotint.core.linalg import Factor, cholesky_upper, inverse_cholesky_upper, with_enough_damping
from mezzotint.core.panels import Storage, StoredSquare, mirror_

_PANEL = 256
_SUMS = ("gram", "drift", "output_drift", "residual", "mean_abs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Sums (not means) over the same weighted tokens, float32 or wider.

    Attributes:
        tokens: sum of token weights.
        gram: ``sum w xh xh'``; the Hessian is ``gram / tokens``.
        drift: ``sum w (x - xh) xh'``.
        output_drift: ``sum w W (x - xh) xh'`` of one matrix W, in the place of ``drift``.
        residual: ``sum w (r - rh) xh'``.
        mean_abs: ``sum w |xh|``.
    """

    tokens: float
    gram: Float[Tensor, "in in"]
    drift: Float[Tensor, "in in"] | None = None
    output_drift: Float[Tensor, "out in"] | None = None
    residual: Float[Tensor, "out in"] | None = None
    mean_abs: Float[Tensor, " in"] | None = None
    # not an argument: `dataclasses.replace` must not carry factors of other sums over
    _factors: dict[tuple[float, str, int], Factor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def isotropic(cls, width: int, like: Tensor) -> "Statistics":
        """Inputs of unit variance in every direction: what to assume when nothing is known.

        With these, GPTQ is rounding to nearest and a weighted range is a plain one.
        """
        return cls(tokens=1.0, gram=torch.eye(width, dtype=like.dtype, device=like.device))

    @classmethod
    def uncorrelated(cls, squares: Float[Tensor, " in"], tokens: float) -> "Statistics":
        """Inputs of which nothing but sums of squares is known: their products are taken for zero.

        With these, GPTQ is rounding to nearest, as with `isotropic`; weighted ranges and errors see the squares.
        """
        return cls(tokens=tokens, gram=torch.diag(squares))

    @property
    def importance(self) -> Float[Tensor, " in"]:
        """Mean square of each input, the diagonal of the Hessian."""
        return self.gram.diagonal() / (self.tokens or 1.0)

    @property
    def has_drift(self) -> bool:
        """Whether the drift of the inputs is known, of one matrix or of any."""
        return self.drift is not None or self.output_drift is not None

    def drift_of(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """``sum w W (x - xh) xh'``; where the sum is of one matrix, ``weight`` is that one."""
        if self.output_drift is not None:
            return self.output_drift.to(weight.dtype)
        assert self.drift is not None
        return weight @ self.drift

    def take_rows(self, rows: slice) -> "Statistics":
        """Statistics of some rows of a matrix; the same ones, with the factors they have, where all rows share them."""
        own = {name: getattr(self, name) for name in ("output_drift", "residual")}
        cut = {name: value[rows] for name, value in own.items() if value is not None and len(value[rows]) < len(value)}
        return replace(self, **cut) if cut else self

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of both sets of tokens; associative up to rounding.

        Raises:
            ValueError: one has a field that the other lacks.
        """
        merged: dict[str, Tensor | float | None] = {"tokens": self.tokens + other.tokens}
        for name in _SUMS:
            a, b = getattr(self, name), getattr(other, name)
            if (a is None) != (b is None):
                raise ValueError(f"cannot merge statistics: {name!r} is in one of them only; collect it in both")
            merged[name] = None if a is None else a + b
        return Statistics(**merged)  # type: ignore[arg-type]

    def scaled(self, factor: float) -> "Statistics":
        """Every sum times ``factor``, the token count unchanged."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: value * factor for name, value in changed.items()})

    def order(self, kind: str, tile: int = 1) -> Int[Tensor, " in"] | None:
        """Visiting order of columns: None for ``natural``, decreasing importance of whole tiles for ``diagonal``."""
        if kind == "natural":
            return None
        tiles = torch.argsort(self.gram.diagonal().view(-1, tile).sum(1), descending=True, stable=True)
        return (tiles[:, None] * tile + torch.arange(tile, device=tiles.device)).flatten()

    def factor(self, damping: float, order: str = "natural", tile: int = 1) -> Factor:
        """Cached factor of the damped Hessian, see `inverse_cholesky_upper`, with as much damping as it needs."""
        key = (damping, order, tile)
        if key not in self._factors:
            permutation = self.order(order, tile)
            self._factors[key] = with_enough_damping(
                lambda used: inverse_cholesky_upper(self.gram, damping=used, permutation=permutation), damping
            )
        return self._factors[key]

    def ridge(self, damping: float) -> Factor:
        """Cached factor ``R`` of ``gram + damping * mean(diag) I = R' R``, with as much damping as it needs."""
        key = (damping, "ridge", 1)
        if key not in self._factors:
            self._factors[key] = with_enough_damping(lambda used: cholesky_upper(self.gram, used), damping)
        return self._factors[key]

    def forget_ridges(self) -> None:
        """Free the factors of `ridge`; asked for again, they are made again."""
        for key in [key for key in self._factors if key[1] == "ridge"]:
            del self._factors[key]

    def solve(self, right: Float[Tensor, "out in"], damping: float) -> Float[Tensor, "out in"]:
        """``right (gram + damping * mean(diag) I)^-1``, at the damping of `ridge`."""
        upper = self.ridge(damping).upper
        # two triangular solves: `cholesky_solve` copies the factor
        half = torch.linalg.solve_triangular(upper, right, upper=True, left=False)
        return torch.linalg.solve_triangular(upper.mT, half, upper=False, left=False)


def block_ldl_ratio(statistics: Statistics, tile: int, damping: float, order: str = "natural") -> float:
    """``tr D / tr H``: what rounding loses that lets later tiles of columns make up for earlier ones, over nearest.

    In visiting order ``H = L D L'`` with ``L`` unit upper triangular in blocks of the tile and ``D`` block diagonal: a
    tile that is rounded with feedback loses ``tr(E D_b E')`` for its own rounding error ``E``, where rounding to
    nearest loses ``tr(E H_bb E')`` (QuIP, arXiv 2307.13304, section 3; QuIP#, arXiv 2402.04396, section 4). With
    ``inv(H) = U' U`` and ``R = inv(U)``, upper triangular as ``U``, ``H = R R'``. Taking each diagonal block of ``R``
    out of its block column leaves ``L``, so ``D_b = R_bb R_bb'`` with ``R_bb = inv(U_bb)``, and
    ``tr D = sum_b |inv(U_bb)|^2``.

    The ratio is for errors alike in all columns. It is at most 1, and 1 where no tile says anything of another.
    Columns never seen count in neither trace.

    Args:
        statistics: of the inputs.
        tile: columns that are rounded together, 1 or the grid's tile.
        damping: of the rounding, whose factor is used; both traces are of the damped Hessian.
        order: of the rounding.
    """
    factor = statistics.factor(damping, order, tile)
    diagonal = statistics.gram.diagonal()
    seen = (diagonal != 0)[factor.columns]
    total = float(diagonal.sum(dtype=torch.float64) + int(seen.sum()) * factor.damping * diagonal.double().mean())
    inner = 0.0
    for start in range(0, len(seen), tile):
        block = factor.upper[start : start + tile, start : start + tile].double()
        inverse = torch.linalg.solve_triangular(block, torch.eye(len(block)).to(block), upper=True)
        inner += float(inverse[seen[start : start + tile]].square().sum())
    return inner / total if total else 1.0


def padded(
    matrix: Float[Tensor, "out in"], statistics: Statistics | None, multiple: tuple[int, int]
) -> tuple[Tensor, Statistics | None]:
    """A matrix, and the statistics of its inputs, filled with zeros to multiples of (rows, columns).

    Inputs that are not there never fire, so they neither receive nor give corrections.
    """
    rows, columns = (-size % step for size, step in zip(matrix.shape, multiple, strict=True))
    if rows == columns == 0:
        return matrix, statistics
    pad = torch.nn.functional.pad
    wide = pad(matrix, (0, columns, 0, rows))
    if statistics is None:
        return wide, None
    sides = {
        "gram": (0, columns, 0, columns),
        "drift": (0, columns, 0, columns),
        "output_drift": (0, columns, 0, rows),
        "residual": (0, columns, 0, rows),
        "mean_abs": (0, columns),
    }
    sums = {name: getattr(statistics, name) for name in sides}
    return wide, replace(statistics, **{n: None if t is None else pad(t, sides[n]) for n, t in sums.items()})


class Accumulator:
    """Streams batches of inputs into `Statistics`.

    Args:
        width: number of input columns.
        needs: which optional sums to keep besides ``gram``: of ``drift``, ``residual``, ``mean_abs``.
        rows: number of output rows, for ``residual``.
        weight: ``[out, in]``, that ``drift`` is multiplied by before it is summed, for `Statistics.output_drift`.
        device: where the sums live.
        dtype: of the sums; float32 or wider.
        storage: makes room of so many bytes for squares that are larger than a panel; None keeps them in memory.
        factors: dtype of what ``drift`` and ``residual`` are products of; None is that of the sums. Products of
            bfloat16 tensors come out in bfloat16: the sums of a batch are off by up to 2^-9 of themselves, far less
            than other tokens would change them by, but too much for ``gram``, which is inverted.
    """

    def __init__(
        self,
        width: int,
        needs: frozenset[str],
        *,
        rows: int = 0,
        weight: Float[Tensor, "out in"] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        storage: Callable[[int], Storage] | None = None,
        factors: torch.dtype | None = None,
    ) -> None:
        def square() -> Tensor:
            if storage is not None and panels.is_wide(width, dtype.itemsize):
                return StoredSquare(width, dtype, storage(width * width * dtype.itemsize))
            return torch.zeros(width, width, dtype=dtype, device=device)

        self.tokens = 0.0
        self._factors = factors or dtype
        self.gram = square()
        self._weight = weight.to(self._factors) if weight is not None and "drift" in needs else None
        self.drift = square() if "drift" in needs and self._weight is None else None
        self.output_drift = None if self._weight is None else self._weight.new_zeros(self._weight.shape, dtype=dtype)
        self.residual = torch.zeros(rows, width, dtype=dtype, device=device) if "residual" in needs else None
        self.mean_abs = torch.zeros(width, dtype=dtype, device=device) if "mean_abs" in needs else None

    def add(
        self,
        quantized: Float[Tensor, "tokens in"],
        *,
        original: Float[Tensor, "tokens in"] | None = None,
        residual: Float[Tensor, "tokens out"] | None = None,
        weights: Float[Tensor, " tokens"] | None = None,
    ) -> None:
        """Add one batch.

        Args:
            quantized: inputs that the quantized prefix really produces (xh).
            original: inputs of the full-precision model (x), for ``drift``.
            residual: difference of the residual streams (r - rh), for ``residual``.
            weights: one non-negative weight a token; None means one each. Zero leaves a token out (padding), whatever
                it holds.

        Raises:
            ValueError: a sum that was asked for cannot be formed from this batch.
        """
        drifts = self.drift is not None or self.output_drift is not None
        if drifts and original is None:
            raise ValueError(
                "this batch has no `original` inputs, but `drift` was asked for; give them or leave it out"
            )
        if self.residual is not None and residual is None:
            raise ValueError("this batch has no `residual` difference, but it was asked for; give it or leave it out")
        if weights is not None and not bool(weights.all()):
            kept = weights.nonzero().squeeze(1)  # zero times NaN is NaN
            quantized, weights = quantized[kept], weights[kept]
            original, residual = (None if t is None else t[kept] for t in (original, residual))
        xh = quantized.to(self.gram.dtype)
        weighted = xh if weights is None else xh * weights.to(xh.dtype).unsqueeze(-1)
        self.tokens += float(xh.shape[0] if weights is None else weights.sum(dtype=torch.float64))
        # symmetric: what lies left of the diagonal is filled in at the end
        for start, rows in panels.panels_(self.gram, _PANEL):
            rows[:, start:].addmm_(weighted[:, start : start + len(rows)].t(), xh[:, start:])
        if drifts or self.residual is not None:
            right = weighted.to(self._factors)
            if drifts and original is not None:
                self._add_drift_((original.to(xh.dtype) - xh).to(self._factors), right)
            if self.residual is not None and residual is not None:
                _add_product_(self.residual, residual.to(self._factors).t(), right)
        if self.mean_abs is not None:
            self.mean_abs.add_(weighted.abs().sum(0))

    def _add_drift_(self, drift: Float[Tensor, "tokens in"], right: Float[Tensor, "tokens in"]) -> None:
        if self.output_drift is not None and self._weight is not None:
            _add_product_(self.output_drift, (drift @ self._weight.t()).t(), right)
        elif self.drift is not None:
            for start, rows in panels.panels_(self.drift, 4 * _PANEL):
                _add_product_(rows, drift[:, start : start + len(rows)].t(), right)

    def tensors_(self) -> Iterator[Tensor]:
        """The sums so far, besides `tokens`, to be changed in place before `finish`: those of other tokens added.

        A sum that lies in a storage comes in panels, of which one is in memory at a time.
        """
        for value in (getattr(self, name) for name in _SUMS):
            if value is not None:
                yield from (rows for _, rows in panels.panels_(value, len(value)))

    def finish(self) -> Statistics:
        """The sums so far (not copied)."""
        if isinstance(self.gram, StoredSquare):
            self.gram.reflect_()
        else:
            for start, rows in panels.panels_(self.gram, _PANEL):
                rows[:, :start] = self.gram[:start, start : start + len(rows)].t()
                mirror_(rows[:, start : start + len(rows)])
        return Statistics(tokens=self.tokens, **{name: getattr(self, name) for name in _SUMS})


def _add_product_(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right``, of the dtype of its factors, to sums."""
    if left.dtype == sums.dtype:
        sums.addmm_(left, right)
    else:
        sums.add_(left @ right)
