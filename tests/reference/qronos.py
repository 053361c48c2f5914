"""Float64 twin of Qronos: its definition on tokens, no sum formed. Numpy only, nothing of ours."""

import numpy as np


def damped_tokens(x, xh, ridge):
    """Tokens that add the ridge to ``xh' xh`` and ``x' xh`` alike: one of each input alone, equal in both streams."""
    extra = np.sqrt(ridge) * np.eye(xh.shape[1])
    return np.vstack([x, extra]), np.vstack([xh, extra])


def qronos(weight, x, xh, quantize, order):
    """Each column takes its turn. Correct the past: the best value of the grid with all else fixed. Shape the future:
    all later columns are fitted again to what is left of the original output ``x W'``.

    ``quantize`` is as in `reference.gptq`. Gives the quantized matrix and the values at the moment of rounding.
    """
    wanted = x @ weight.astype(np.float64).T  # [tokens, out]
    value, before = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    left = list(order)
    while left:
        t, left = left[0], left[1:]
        others = [j for j in range(weight.shape[1]) if j != t]
        rest = wanted - xh[:, others] @ value[:, others].T
        before[:, t] = xh[:, t] @ rest / (xh[:, t] @ xh[:, t])
        value[:, [t]] = quantize(before[:, [t]], [t])
        done = [j for j in range(weight.shape[1]) if j not in left]
        if left:
            rest = wanted - xh[:, done] @ value[:, done].T
            value[:, left] = np.linalg.lstsq(xh[:, left], rest, rcond=None)[0].T
    return value, before
