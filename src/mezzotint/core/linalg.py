"""Damping and factorisations; nothing else in the package factors a matrix."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mezzotint.errors import NotPositiveDefiniteError

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
    matrix = gram.clone() if permutation is None else gram[permutation][:, permutation]
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    diagonal.add_(damping * diagonal.mean())
    diagonal[dead] = torch.where(diagonal[dead] == 0, 1.0, diagonal[dead])
    return matrix


def inverse_cholesky_upper(
    gram: Float[Tensor, "in in"], *, damping: float, permutation: Int[Tensor, " in"] | None = None
) -> Factor:
    """Upper-triangular ``U`` with ``inv(H) = U' U`` for the damped, permuted Hessian (GPTQ, Alg. 1).

    One Cholesky and one triangular inverse; no explicit inverse of H. With ``J`` the exchange matrix
    (``J @ x`` is ``x.flip(0)``):

        J H J = L L'   =>   H = (J L J) (J L J)'   =>   U = inv(J L J)

    Args:
        gram: symmetric, positive semi-definite; float32 or float64.
        damping: ridge as a fraction of the mean diagonal.
        permutation: visiting order of the columns.

    Raises:
        NotPositiveDefiniteError: names the column at which the factorisation broke down.
    """
    matrix = damped(gram, damping, permutation)
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    del matrix
    if int(info) != 0:
        column = gram.shape[0] - int(info)
        raise _not_definite(gram, damping, column if permutation is None else int(permutation[column]))
    lower = lower.flip(0, 1)
    identity = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=True)
    return Factor(upper=upper, permutation=permutation, damping=damping)


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
    upper, info = torch.linalg.cholesky_ex(damped(gram, damping), upper=True)
    if int(info) != 0:
        raise _not_definite(gram, damping, int(info) - 1)
    return Factor(upper=upper, permutation=None, damping=damping)


def _not_definite(gram: Float[Tensor, "in in"], damping: float, column: int) -> NotPositiveDefiniteError:
    diagonal = gram.diagonal()
    return NotPositiveDefiniteError(
        f"Hessian {tuple(gram.shape)} {gram.dtype} is not positive definite at column {column}: diagonal "
        f"{float(diagonal[column]):.3e}, mean {float(diagonal.mean()):.3e}. Raise `damping` (now {damping:g}, "
        "typical 0.01) or use more calibration tokens."
    )
