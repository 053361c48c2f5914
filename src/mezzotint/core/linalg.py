"""Damping and factorisations; nothing else in the package factors a matrix."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mezzotint.errors import NotPositiveDefiniteError

_PANEL = 256  # columns or rows at a time
DAMPING_LADDER = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """``U`` upper triangular with ``inv(P H P') = U' U``.

    Attributes:
        upper: ``[in, in]``, rows and columns in visiting order.
        permutation: ``upper[k]`` belongs to column ``permutation[k]``; None is the natural order.
        damping: that it was made with.
    """

    upper: Float[Tensor, "in in"]
    permutation: Int[Tensor, " in"] | None
    damping: float

    def needed(self, setting: str, asked: float) -> dict[str, float | str]:
        """What the report says of a setting where more damping was needed than asked for."""
        return {} if self.damping == asked else {setting: self.damping}

    @property
    def columns(self) -> Int[Tensor, " in"]:
        """Columns in visiting order."""
        if self.permutation is not None:
            return self.permutation
        return torch.arange(self.upper.shape[0], device=self.upper.device)


def damped(
    gram: Float[Tensor, "in in"], damping: float, permutation: Int[Tensor, " in"] | None = None
) -> Float[Tensor, "in in"]:
    """``P (gram + damping * mean(diag) I) P'`` as a new tensor; columns never seen get a unit diagonal.

    A dead column has zero row and column, so it neither receives nor gives corrections: it is rounded to nearest.
    """
    matrix = gram.clone() if permutation is None else _permuted(gram, permutation)
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    diagonal.add_(damping * diagonal.mean())
    diagonal[dead] = torch.where(diagonal[dead] == 0, 1.0, diagonal[dead])
    return matrix


def inverse_cholesky_upper(
    gram: Float[Tensor, "in in"], *, damping: float, permutation: Int[Tensor, " in"] | None = None
) -> Factor:
    """Upper-triangular ``U`` with ``inv(H) = U' U`` for the damped, permuted Hessian (GPTQ, Alg. 1).

    One Cholesky and one triangular inverse; no explicit inverse of H, and one matrix of memory, which becomes the
    factor. With ``J`` the exchange matrix (``J @ x`` is ``x.flip(0)``):

        J H J = L L'   =>   H = (J L J) (J L J)'   =>   U = inv(J L J)

    Args:
        gram: symmetric, positive semi-definite; float32 or float64.
        damping: ridge as a fraction of the mean diagonal.
        permutation: visiting order of the columns.

    Raises:
        NotPositiveDefiniteError: names the column at which the factorisation broke down.
    """
    width = gram.shape[0]
    order = torch.arange(width, device=gram.device) if permutation is None else permutation
    matrix = damped(gram, damping, order.flip(0))
    failed = _cholesky_(matrix)
    if failed is not None:
        raise _not_definite(gram, damping, int(order[width - 1 - failed]))
    # matrix is L'; the inverse of J L J is the transpose of that of J L' J
    _invert_upper_(matrix)
    _flip_(matrix)
    return Factor(upper=matrix.mT, permutation=permutation, damping=damping)


def _permuted(matrix: Float[Tensor, "in in"], order: Int[Tensor, " in"]) -> Float[Tensor, "in in"]:
    """``P matrix P'``, made of panels of rows: indexing both at once would take another matrix."""
    result = torch.empty_like(matrix)
    for start in range(0, len(order), _PANEL):
        rows = order[start : start + _PANEL]
        torch.index_select(matrix[rows], 1, order, out=result[start : start + _PANEL])
    return result


def _cholesky_(matrix: Float[Tensor, "in in"]) -> int | None:
    """Replaces a symmetric matrix by ``R`` upper triangular with ``R' R`` equal to it; gives the column that failed."""
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    # what LAPACK works on lies column by column: so nothing is copied, and its lower factor is the upper one by rows
    torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, info))
    return int(info) - 1 if int(info) != 0 else None


def _invert_upper_(matrix: Float[Tensor, "in in"]) -> None:
    """Replaces an upper triangular matrix by its inverse, a panel of columns at a time (as LAPACK's trtri)."""
    for start in range(0, matrix.shape[0], _PANEL):
        end = start + _PANEL
        block = matrix[start:end, start:end]
        identity = torch.eye(len(block), dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(block, identity, upper=True)
        above = matrix[:start, start:end]
        above.copy_(matrix[:start, :start] @ above @ inverse.neg())
        block.copy_(inverse)


def _flip_(matrix: Float[Tensor, "in in"]) -> None:
    """Reverses rows and columns, a panel of rows at a time."""
    width = matrix.shape[0]
    for start in range(0, width // 2, _PANEL):
        end = min(start + _PANEL, width // 2)
        top, bottom = matrix[start:end], matrix[width - end : width - start]
        kept = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(kept)
    if width % 2:
        middle = matrix[width // 2]
        middle.copy_(middle.flip(0))


def with_enough_damping(factorise: Callable[[float], Factor], damping: float) -> Factor:
    """The factor at ``damping`` or, where that is not definite in this precision, at the least of a ladder that is.

    Raises:
        NotPositiveDefiniteError: not even at the top of the ladder: the matrix is no sum of squares.
    """
    for higher in (step for step in DAMPING_LADDER if step > damping):
        try:
            return factorise(damping)
        except NotPositiveDefiniteError:
            damping = higher
    return factorise(damping)


def cholesky_upper(gram: Float[Tensor, "in in"], damping: float) -> Factor:
    """``R`` upper triangular with ``R' R`` the damped Hessian, as the ``upper`` of a factor.

    Raises:
        NotPositiveDefiniteError: names the column at which the factorisation broke down.
    """
    matrix = damped(gram, damping)
    failed = _cholesky_(matrix)
    if failed is not None:
        raise _not_definite(gram, damping, failed)
    return Factor(upper=matrix, permutation=None, damping=damping)


def _not_definite(gram: Float[Tensor, "in in"], damping: float, column: int) -> NotPositiveDefiniteError:
    diagonal = gram.diagonal()
    return NotPositiveDefiniteError(
        f"Hessian {tuple(gram.shape)} {gram.dtype} is not positive definite at column {column}: diagonal "
        f"{float(diagonal[column]):.3e}, mean {float(diagonal.mean()):.3e}. Raise `damping` (now {damping:g}, "
        "typical 0.01) or use more calibration tokens."
    )
