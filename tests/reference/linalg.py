"""Float64 twins of the sums over tokens and of the factorisations: numpy only, nothing of ours."""

import numpy as np


def sums(quantized, original, difference, weights):
    """Token by token: the sum of weights, gram, drift, residual and mean_abs; tokens of weight zero are skipped."""
    width, rows = quantized.shape[1], difference.shape[1]
    total, gram, drift = 0.0, np.zeros((width, width)), np.zeros((width, width))
    residual, mean_abs = np.zeros((rows, width)), np.zeros(width)
    for xh, x, d, w in zip(quantized, original, difference, weights, strict=True):
        if w == 0:
            continue
        total += w
        gram += w * np.outer(xh, xh)
        drift += w * np.outer(x - xh, xh)
        residual += w * np.outer(d, xh)
        mean_abs += w * np.abs(xh)
    return total, gram, drift, residual, mean_abs


def damped(gram, damping):
    """``gram`` with a ridge of ``damping`` times its mean diagonal; a one where the diagonal is still zero."""
    n = gram.shape[0]
    hessian = gram + damping * (np.trace(gram) / n) * np.eye(n)
    for j in range(n):
        if hessian[j, j] == 0:
            hessian[j, j] = 1
    return hessian


def visiting_order(gram, kind, tile=1):
    """Columns in visiting order: whole tiles, those of larger diagonal first, ties in their natural order."""
    n = gram.shape[0]
    if kind == "natural":
        return list(range(n))
    weight = [sum(gram[j, j] for j in range(start, start + tile)) for start in range(0, n, tile)]
    tiles = sorted(range(n // tile), key=lambda t: -weight[t])  # sorted() is stable
    return [t * tile + j for t in tiles for j in range(tile)]


def inverse_factor(hessian):
    """Upper triangular ``U`` with ``inv(H) = U' U``, by way of the explicit inverse."""
    return np.linalg.cholesky(np.linalg.inv(hessian)).T


def block_ldl(hessian, tile):
    """``H = L D L'``, unit upper triangular in blocks: each tile's part that later ones cannot explain, last first."""
    n = len(hessian)
    lower, middle, rest = np.eye(n), np.zeros((n, n)), hessian.astype(np.float64).copy()
    for start in reversed(range(0, n, tile)):
        here = slice(start, min(start + tile, n))
        middle[here, here] = rest[here, here]
        lower[:start, here] = rest[:start, here] @ np.linalg.inv(rest[here, here])
        rest[:start, :start] -= lower[:start, here] @ rest[here, :start]
    return lower, middle
