"""Qronos: correct the past with each column's choice, shape the future with all later ones."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mezzotint.core.contracts import Aim, FittedGrid, Rounded
from mezzotint.core.statistics import Statistics
from mezzotint.rounding.feedback import check_drift, check_settings, finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Qronos:
    """Settings of Qronos (arXiv 2505.11695) in its efficient form.

    With H damped and ``C = W (H + D)``: the first column is ``Q((C_1 - w_rest H_rest,1) / H_11)``, then the rest
    becomes ``(C_rest - q_1 H_1,rest) H_rest^-1``, and from there it is GPTQ with the factor of ``H_rest``. Equal to
    least squares on the drift followed by GPTQ, but for the choice of the first column (MATH.md section 7). C is never
    formed, since dividing ``W H`` by H again costs digits:

        q_1 = Q(w_1 + (W D)_1 / H_11);    w_rest += ((w_1 - q_1) H_1,rest + (W D)_rest) H_rest^-1

    Attributes:
        damping: ridge added to H, and so to ``G = H + D`` alike, as a fraction of the mean diagonal of H.
        order: in which columns are visited, see `Gptq`.
        block_size: columns per lazy update; never changes the result.
    """

    kind: ClassVar[str] = "qronos"
    damping: float = 0.01
    order: Literal["diagonal", "natural"] = "diagonal"
    block_size: int = 128
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "drift"})
    accepts_corrected: ClassVar[bool] = False
    scalar_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self.damping, self.block_size)

    def round(self, aim: Aim, grid: FittedGrid, fit: Statistics | None) -> Rounded:
        """Codes for the weight; the aim must not be corrected already.

        Raises:
            ConfigError: there are no statistics with drift, or the aim is corrected.
        """
        fit, drift = check_drift(self.kind, aim, fit)
        w = aim.matrix
        factor = fit.factor(self.damping, self.order)
        columns = factor.columns
        upper = factor.upper.to(w.dtype)
        first, rest = columns[:1], columns[1:]
        pull = w @ drift.to(w.dtype)
        row = fit.gram[first[0]].to(w.dtype)
        # the ridge is in H and G alike: it makes W, not 0, what weak directions fall back to
        diagonal = row[first] + factor.damping * fit.gram.diagonal().mean()
        ideal = w[:, first]
        if float(diagonal) > 0:  # else the input was never seen
            ideal = ideal + pull[:, first] / diagonal
        code = grid.new_code()
        value = grid.encode_(code, ideal, first)
        later = upper[1:, 1:]
        work = w[:, rest] + ((w[:, first] - value) * row[rest] + pull[:, rest]) @ later.t() @ later
        before = torch.empty_like(w)
        before[:, first] = ideal
        for start in range(0, len(rest), self.block_size):
            block = slice(start, min(start + self.block_size, len(rest)))
            piece = work[:, block].contiguous()
            error = grid.feed_(code, piece, later[block, block].contiguous(), rest[block])
            work[:, block.stop :].addmm_(error, later[block, block.stop :], alpha=-1)
            before.index_copy_(1, rest[block], piece)
        return finished(code, grid, before, factor=factor, damping=self.damping)
