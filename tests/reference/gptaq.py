"""Float64 twin of GPTAQ: column by column, every matrix inverted anew. Numpy only, nothing of ours."""

import numpy as np


def carry(drift, hessian, order):
    """``P`` in visiting order: row q is ``D_q,>q inv(H_>q,>q)``: later columns fitted to the drift of input q."""
    n = len(order)
    result = np.zeros((n, n))
    for q in range(n - 1):
        later = order[q + 1 :]
        result[q, q + 1 :] = drift[order[q], later] @ np.linalg.inv(hessian[np.ix_(later, later)])
    return result


def gptaq(weight, hessian, drift, quantize, order, strength):
    """Each column takes its turn: the columns behind make up for its error, and for its input's drift.

    With t the column, F those behind it, ``V`` the inverse of the Hessian of both:

        w_F += -(w_t - q_t) V_tF / V_tt + strength * w_t D_tF inv(H_FF)

    ``quantize`` is as in `reference.gptq`. Gives the quantized matrix and the values at the moment of rounding.
    """
    work = weight.astype(np.float64).copy()
    value, before = np.zeros_like(work), np.zeros_like(work)
    left = list(order)
    while left:
        t, later = left[0], left[1:]
        before[:, t] = work[:, t]
        value[:, [t]] = quantize(work[:, [t]], [t])
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        work[:, later] -= np.outer(work[:, t] - value[:, t], inverse[0, 1:] / inverse[0, 0])
        if later:
            behind = np.linalg.inv(hessian[np.ix_(later, later)])
            work[:, later] += strength * np.outer(before[:, t], drift[t, later] @ behind)
        left = later
    return value, before
