"""How much a model loses for an error in a matrix, as numbers."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What the Fisher information of a matrix says about errors in it.

    To second order an error ``dW`` costs ``1/2 dW' F dW`` nats of KL(original || changed) per token, with ``F`` the
    Fisher information of one token, averaged over tokens. Of ``F`` (``out in x out in``) three marginals of its
    diagonal are kept: its trace, and its sums over the inputs of each output and over the outputs of each input.

    Attributes:
        energy: mean square of the weights.
        rows: diagonal of ``F`` summed over inputs, ``[out]``, nats per token and squared weight.
        columns: diagonal of ``F`` summed over outputs, ``[in]``; its sum is that of ``rows``.
        relative_error: standard error of the trace over the trace, from its spread over windows; None for a single
            window.
    """

    energy: float
    rows: Float64[Tensor, " out"]
    columns: Float64[Tensor, " in"]
    relative_error: float | None = None

    @classmethod
    def even(cls, fisher: float, weight: Float[Tensor, "out in"]) -> "Sensitivity":
        """Of a matrix of which only ``fisher`` is known: alike in all rows and columns."""
        energy = float(weight.square().mean(dtype=torch.float64))
        trace = 2.0 * fisher / energy if energy else 0.0
        rows, columns = (torch.full((size,), trace / size, dtype=torch.float64) for size in weight.shape)
        return cls(energy=energy, rows=rows, columns=columns)

    @property
    def trace(self) -> float:
        """``tr F``."""
        return float(self.rows.sum())

    @property
    def fisher(self) -> float:
        """``a = 1/2 mean(W^2) tr F``, nats per token and unit of ``e = |dW|^2 / |W|^2``.

        ``E[1/2 dW' F dW] = a e`` for errors without a preferred place or direction, ``E[dW dW'] = e mean(W^2) I``
        (HIGGS, arXiv 2411.17525, linearity; a rotation before rounding makes errors such). Rounding that lets later
        columns make up for earlier ones loses less: times `mezzotint.core.statistics.block_ldl_ratio`.
        """
        return 0.5 * self.energy * self.trace

    def loss(self, error: Float[Tensor, "out in"]) -> float:
        """Nats per token that an error costs: ``1/2 sum_oi rows_o columns_i / tr F dW_oi^2``.

        This takes the diagonal of ``F`` for the product of its marginals, and errors of different weights for
        uncorrelated. For an error spread evenly it is ``fisher * e``; it tells apart errors that fall on different
        outputs and inputs.

        Args:
            error: difference of the matrix that will be stored and the original.

        Example:
            >>> import torch
            >>> rows, columns = torch.tensor([3.0, 1.0]).double(), torch.tensor([2.0, 2.0]).double()
            >>> Sensitivity(energy=1.0, rows=rows, columns=columns).loss(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
            0.75
        """
        trace = self.trace
        if trace == 0:
            return 0.0
        squares = error.to(self.rows).square()
        return 0.5 * float(self.rows @ squares @ self.columns) / trace
