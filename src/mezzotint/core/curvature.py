"""Curvature of the loss in the outputs of a matrix: it couples the errors of different rows."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mezzotint.errors import ConfigError

# for every block of rows: what lies between them, and the curvature; None where rows are on their own
Squares = tuple[Float[Tensor, "blocks size size"], Float[Tensor, "blocks size size"]] | None

SIZES = (16, 32, 64, 128)  # of blocks of rows: whole lanes of the kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Fisher:
    """Settings of the curvature in outputs, measured by gradients (YAQA, arXiv 2505.22988, section 3).

    With ``g_t`` the gradient in a matrix's outputs at token t, of labels drawn from the model's own predictions, the
    loss of an error ``E`` is about ``tr(A E H E')``, ``A = sum_t g_t g_t'``. A row that is rounded after others of its
    block makes up for their errors, and refinement moves codes by the same quadratic.

    Unlike the paper, each token's gradient has length 1 here: a few tokens have most of the squared gradient, the first
    of a window above all, and say little of the others. And ``A`` is kept in blocks of neighbouring rows, which need a
    few thousand tokens.

    Attributes:
        block_size: rows that make up for each other: 16, 32, 64 or 128.
        damping: ridge added to ``A``, as a fraction of its mean diagonal.
        tokens: of the calibration text, in whole windows, that gradients are taken of.
    """

    kind: ClassVar[str] = "fisher"
    block_size: int = 64
    damping: float = 0.1
    tokens: int = 3072

    def __post_init__(self) -> None:
        if self.block_size not in SIZES:
            raise ConfigError(f"curvature.block_size is {self.block_size}; it must be 16, 32, 64 or 128.")
        if not 0 < self.damping <= 100:
            raise ConfigError(f"curvature.damping is {self.damping}; it must be above 0 and at most 100 (typical 0.1).")
        if self.tokens < 1:
            raise ConfigError(f"curvature.tokens is {self.tokens}; it must be at least 1 (typical 3072).")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curvature:
    """The blocks on the diagonal of ``A``, for neighbouring rows of a matrix.

    Attributes:
        blocks: symmetric, positive semidefinite, ``[ceil(rows / size), size, size]``; what is behind the last row is 0.
        rows: of the matrix.
    """

    blocks: Float[Tensor, "blocks size size"]
    rows: int

    @property
    def size(self) -> int:
        """Rows of a block."""
        return self.blocks.shape[1]

    def damped(self, damping: float) -> "Curvature":
        """Of mean diagonal 1, with a ridge; where nothing was measured, the identity."""
        diagonal = self.blocks.diagonal(dim1=1, dim2=2)
        mean = diagonal.sum(dtype=torch.float64).to(self.blocks.dtype) / self.rows
        ridge = torch.diag_embed(torch.full_like(diagonal, damping if mean > 0 else 1.0))
        return replace(self, blocks=(self.blocks / mean if mean > 0 else 0 * self.blocks) + ridge)

    def take_rows(self, rows: slice) -> "Curvature":
        """That of some of the rows, whole blocks of them."""
        start, stop, _ = rows.indices(self.rows)
        return Curvature(blocks=self.blocks[start // self.size : -(-stop // self.size)], rows=stop - start)

    def mixed(self, values: Float[Tensor, "rows k"]) -> Float[Tensor, "rows k"]:
        """``A values``."""
        return self.in_rows(self.blocks.to(values.dtype) @ self.in_blocks(values))

    def shared(self, loss: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """The loss of a row's whole block, for each row."""
        return self.in_rows(self.in_blocks(loss).sum(1, keepdim=True).expand(-1, self.size))

    def feedback(self) -> tuple[Int[Tensor, " rows"], Float[Tensor, "blocks size size"]]:
        """In which order rows are rounded, and what each takes of the errors before it.

        In each block the rows that matter most come first. With ``A = S S'`` in that order, ``S`` upper triangular, an
        error of row i is best made up for if row l > i takes ``S_il / S_ll`` of it: then ``tr(A E E')`` is the sum of
        the squares of what each row adds, times ``S_ll^2`` (block LDL as in QuIP, arXiv 2307.13304, section 3, on the
        other side).

        Returns:
            order: of all rows, a permutation within each block.
            taken: ``[., i, l]``, strictly upper triangular, for rows in that order.
        """
        count, size, _ = self.blocks.shape
        wide = self.blocks.double()
        diagonal = wide.diagonal(dim1=1, dim2=2).clone()
        diagonal.flatten()[self.rows :] = -1  # what is behind the last row stays there
        order = diagonal.argsort(dim=1, descending=True, stable=True)
        wide = wide.gather(1, order[:, :, None].expand_as(wide)).gather(2, order[:, None, :].expand_as(wide))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
        root = torch.linalg.inv(torch.linalg.cholesky(inverse).mT)  # inv(A) = V' V, S = inv(V)
        taken = (root / root.diagonal(dim1=1, dim2=2)[:, None, :]).triu(1)
        places = order + torch.arange(count, device=order.device)[:, None] * size
        return places.flatten()[: self.rows], taken.to(self.blocks.dtype)

    def in_blocks(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``[rows, ...]`` as ``[blocks, size, ...]``, with zeros behind the last."""
        whole = values.new_zeros(len(self.blocks) * self.size, *values.shape[1:])
        whole[: self.rows] = values
        return whole.unflatten(0, (-1, self.size))

    def in_rows(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The inverse of `in_blocks`."""
        return values.flatten(0, 1)[: self.rows]
