"""How much a model loses for an error in a matrix, as numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

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
        columns: diagonal of ``F`` summed over outputs, ``[in]``; its sum is that of ``rows``. None if it is not known:
            then columns count as their inputs do, or alike.
        relative_error: standard error of the trace over the trace, from its spread over windows; None for a single
            window.
    """

    energy: float
    rows: Float64[Tensor, " out"]
    columns: Float64[Tensor, " in"] | None
    relative_error: float | None = None

    @classmethod
    def even(cls, fisher: float, weight: Float[Tensor, "out in"]) -> "Sensitivity":
        """Of a matrix of which only ``fisher`` is known: alike in all rows."""
        energy = float(weight.square().mean(dtype=torch.float64))
        trace = 2.0 * fisher / energy if energy else 0.0
        rows = torch.full((weight.shape[0],), trace / weight.shape[0], dtype=torch.float64)
        return cls(energy=energy, rows=rows, columns=None)

    def tensors(self) -> dict[str, Tensor]:
        """For `of_tensors`: everything, by name."""
        error = float("nan") if self.relative_error is None else self.relative_error
        return {
            "rows": self.rows,
            "numbers": torch.tensor([self.energy, error], dtype=torch.float64),
            **({} if self.columns is None else {"columns": self.columns}),
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "Sensitivity":
        """What gave these `tensors`."""
        energy, error = tensors["numbers"].tolist()
        return cls(
            energy=energy,
            rows=tensors["rows"],
            columns=tensors.get("columns"),
            relative_error=None if math.isnan(error) else error,
        )

    def of_rows(self, rows: slice) -> "Sensitivity":
        """Of some rows that stand for all: their part of the trace counts as the whole."""
        part = self.rows[rows]
        total = float(part.sum())
        return replace(self, rows=part * (self.trace / total) if total else part)

    @property
    def trace(self) -> float:
        """``tr F``."""
        return float(self.rows.sum())

    @property
    def fisher(self) -> float:
        """``a = 1/2 mean(W^2) tr F``, nats per token and unit of ``e = |dW|^2 / |W|^2``.

        ``E[1/2 dW' F dW] = a e`` for errors without a preferred place or direction, ``E[dW dW'] = e mean(W^2) I``
        (HIGGS, arXiv 2411.17525, linearity; a rotation before rounding makes errors such). Rounding that lets later
        columns make up for earlier ones loses less: times `mezzotint.core.statistics.block_ldl_ratio`, see `loss`.
        """
        return 0.5 * self.energy * self.trace

    def loss(self, error: Float[Tensor, "out in"], gram: Float[Tensor, "in in"] | None = None) -> float:
        """Nats per token that an error costs: ``1/2 sum_o rows_o / tr F (dW G dW')_oo``.

        The diagonal of ``F`` is taken for the product of its marginals. ``G`` is diagonal with ``columns`` where
        nothing else is known: errors of different weights count as uncorrelated. With the second moments ``H`` of the
        inputs, ``G_ij = H_ij sqrt(columns_i columns_j / (H_ii H_jj))``: a rounding that lets later columns make up for
        earlier ones gets what it earns, and clipped weights lose what they lose together. For an error without a
        preferred place or direction both are ``fisher * e``.

        Args:
            error: difference of the matrix that will be stored and the original.
            gram: ``H``, up to a factor.

        Example:
            >>> import torch
            >>> rows, columns = torch.tensor([3.0, 1.0]).double(), torch.tensor([2.0, 2.0]).double()
            >>> Sensitivity(energy=1.0, rows=rows, columns=columns).loss(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
            0.75
        """
        trace = self.trace
        if trace == 0:
            return 0.0
        size = error.shape[1]
        columns = torch.full((size,), trace / size, dtype=torch.float64) if self.columns is None else self.columns
        if gram is None:
            squares = error.to(self.rows).square()
            return 0.5 * float(self.rows @ squares @ columns) / trace
        seen = gram.diagonal().double()
        if self.columns is None:
            columns = seen * (trace / float(seen.sum()))
        scaled = error * (columns / seen).sqrt().masked_fill(seen == 0, 0.0).to(error)
        products = ((scaled @ gram.to(scaled)) * scaled).sum(dim=1, dtype=torch.float64)
        return 0.5 * float(self.rows.to(products) @ products) / trace
