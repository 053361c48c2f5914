"""Float64 twins of the transforms: both sides as explicit matrices. Numpy only, nothing of ours."""

import numpy as np


def hadamard_matrix(width, limit):
    """Block-diagonal, orthonormal: blocks of the largest power of two up to ``limit`` that divides ``width``."""
    block = max(size for size in range(1, limit + 1) if width % size == 0 and size & (size - 1) == 0)
    out = np.zeros((width, width))
    for i in range(width):
        for j in range(width):
            if i // block == j // block:  # Sylvester: the sign is the parity of the bits that both indices have
                out[i, j] = (-1) ** bin((i % block) & (j % block)).count("1") / np.sqrt(block)
    return out


def signs(packed, width):
    """From one bit an input, set where negative, the first in the lowest place of the first byte."""
    return np.array([-1.0 if packed[i // 8] >> (i % 8) & 1 else 1.0 for i in range(width)])


def hadamard_sides(shape, packed, scale, limit, *, rotate_outputs):
    """``L`` and ``R`` of ``T' = L T R``."""
    rows, width = shape
    left = np.diag(1 / scale)
    if rotate_outputs:
        left = hadamard_matrix(rows, limit) @ left
    return left, np.diag(signs(packed, width)) @ hadamard_matrix(width, limit)


def odd_hadamard(side, size):
    """Signs, then a Kronecker product of an odd matrix and a Hadamard matrix, as one matrix."""
    sign, left = (np.asarray(part) for part in side)
    block = size // len(left)
    return np.kron(left, hadamard_matrix(block, block)) @ np.diag(sign)


def kronecker(side, size):
    """A permutation, then a Kronecker product, as one matrix."""
    permutation, left, right = (np.asarray(part) for part in side)
    return np.kron(left, right) @ np.eye(size)[permutation]
