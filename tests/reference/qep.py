"""Float64 twins of the corrected targets: least squares over tokens, no sum formed. Numpy only, nothing of ours.

``x, xh`` are the original and the quantized inputs ``[tokens, in]``; ``difference`` is ``r - rh``, ``[tokens, out]``.
"""

import numpy as np


def ridge_of(xh, damping):
    """``damping`` times the mean over columns of ``sum xh^2``."""
    return damping * np.square(xh).sum(axis=0).mean()


def least_squares(inputs, outputs, ridge=0.0):
    """``E [out, in]`` that minimises ``||outputs - inputs E'||^2 + ridge ||E||^2``, the smallest such."""
    width = inputs.shape[1]
    rows = np.vstack([inputs, np.sqrt(ridge) * np.eye(width)])
    wanted = np.vstack([outputs, np.zeros((width, outputs.shape[1]))])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].T


def qep(weight, x, xh, alpha, ridge):
    """By the proximal identity: with ``E = V - W``, minimise

    ||W (x - xh) - E xh||^2 + (1 - alpha) / alpha ||E xh||^2 + ridge / alpha ||E||^2
    """
    if alpha == 0:
        return weight.copy()
    share = np.sqrt((1 - alpha) / alpha)
    wanted = (x - xh) @ weight.T
    return weight + least_squares(np.vstack([xh, share * xh]), np.vstack([wanted, 0 * wanted]), ridge / alpha)


def loaq(weight, x, xh, difference, *, alpha, beta, ridge):
    """Minimises ``||alpha W (x - xh) + beta (r - rh) - E xh||^2 + ridge ||E||^2``."""
    return weight + least_squares(xh, alpha * (x - xh) @ weight.T + beta * difference, ridge)


def loss(value, weight, x, xh, difference=None):
    """``||W x + r - (V xh + rh)||^2`` of each output."""
    error = x @ weight.T - xh @ value.T
    return np.square(error if difference is None else error + difference).sum(axis=0)
