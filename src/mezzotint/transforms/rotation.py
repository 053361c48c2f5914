"""Rotations that can be fused into a model: orthogonal matrices of the residual stream and of heads."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["hadamard", "random"]


def rotation(size: int, seed: int, kind: Kind, *, keeps_mean: bool = False) -> Float[Tensor, "n n"]:
    """A random orthogonal matrix in float64; rows ``x`` are turned by ``x @ rotation``.

    ``random`` is uniformly distributed over all of them. ``hadamard`` is ``diag(signs) (H x O)`` with random signs,
    ``H`` the orthonormal Hadamard matrix of the largest power of two that divides the size and ``O`` a random
    orthogonal matrix of the rest (QuaRot, arXiv 2404.00456, section 3, whose tables of Hadamard matrices of other
    sizes this replaces).

    Args:
        size: of the matrix.
        seed: from 0 to ``2^32 - 1``.
        kind: see above.
        keeps_mean: leave the direction ``(1, ... 1)`` where it is, so that what subtracts the mean commutes with it;
            the matrix is then a random one of the other directions, whatever the kind.
    """
    draw = np.random.RandomState(seed)
    if keeps_mean:
        inner = torch.eye(size, dtype=torch.float64)
        inner[1:, 1:] = _uniform(size - 1, draw)
        # the reflection that exchanges the first axis and (1, ... 1) / sqrt(size)
        normal = torch.full((size,), -(size**-0.5), dtype=torch.float64)
        normal[0] += 1
        mirror = torch.eye(size, dtype=torch.float64)
        if size > 1:
            mirror -= 2 * torch.outer(normal, normal) / (normal @ normal)
        return mirror @ inner @ mirror
    if kind == "random":
        return _uniform(size, draw)
    signs = torch.from_numpy(draw.randint(0, 2, size) * 2.0 - 1)
    power = size & -size
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < power:
        made = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) * 0.5**0.5, made)
    return signs.unsqueeze(1) * torch.kron(made, _uniform(size // power, draw))


def _uniform(size: int, draw: np.random.RandomState) -> Float[Tensor, "n n"]:
    q, r = torch.linalg.qr(torch.from_numpy(draw.standard_normal((size, size))))
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).contiguous()
