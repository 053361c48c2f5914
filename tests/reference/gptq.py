"""Float64 twins of GPTQ and block LDLQ, none with the Cholesky factor of the inverse. Numpy only, nothing of ours.

``quantize(values, columns)`` gives the nearest values of the grid for these columns of the matrix. All three walk the
columns in the given order, ``tile`` at a time, and return (the quantized matrix, the values at the moment of rounding).
"""

import numpy as np


def gptq(weight, hessian, quantize, order, tile=1):
    """Optimal brain quantization in a given order: the inverse Hessian is explicit and shrinks by elimination.

    For the tile t among the columns F not yet rounded, with ``V = inv(H_FF)`` (GPTQ eq. 2 and 3):

        w_F -= (w_t - quantize(w_t)) inv(V_tt) V_tF;    V -= V_Ft inv(V_tt) V_tF
    """
    work, inverse = weight.astype(np.float64).copy(), np.linalg.inv(hessian)
    value, before = np.zeros_like(work), np.zeros_like(work)
    left = list(order)
    while left:
        now, left = left[:tile], left[tile:]
        before[:, now] = work[:, now]
        value[:, now] = quantize(work[:, now], now)
        gain = np.linalg.inv(inverse[np.ix_(now, now)])
        work[:, left] -= (work[:, now] - value[:, now]) @ gain @ inverse[np.ix_(now, left)]
        inverse[np.ix_(left, left)] -= inverse[np.ix_(left, now)] @ gain @ inverse[np.ix_(now, left)]
    return value, before


def gptq_by_refit(weight, hessian, quantize, order, tile=1):
    """By the definition: after each tile, the columns left are fitted again by least squares to the original output.

    ``argmin tr((V - W) H (V - W)')`` over the columns left L, with those done D fixed, is
    ``V_L = W_L + (W_D - V_D) H_DL inv(H_LL)``.
    """
    weight = weight.astype(np.float64)
    value, before = np.zeros_like(weight), np.zeros_like(weight)
    done, left = [], list(order)
    while left:
        shift = (
            (weight[:, done] - value[:, done])
            @ hessian[np.ix_(done, left)]
            @ np.linalg.inv(hessian[np.ix_(left, left)])
        )
        now = left[:tile]
        before[:, now] = weight[:, now] + shift[:, :tile]
        value[:, now] = quantize(before[:, now], now)
        done, left = done + now, left[tile:]
    return value, before


def ldlq(weight, hessian, quantize, order, tile=1):
    """LDLQ of QuIP by its explicit feedback matrix: ``H = M D M'``, M unit upper triangular in blocks of a tile.

    Block k is rounded from ``W_k + (W_done - V_done) M_done,k``.
    """
    weight, order = weight.astype(np.float64), list(order)
    feedback = unit_upper(hessian[np.ix_(order, order)], tile)
    value, before = np.zeros_like(weight), np.zeros_like(weight)
    for start in range(0, len(order), tile):
        done, now = order[:start], order[start : start + tile]
        shift = (weight[:, done] - value[:, done]) @ feedback[:start, start : start + tile]
        before[:, now] = weight[:, now] + shift
        value[:, now] = quantize(before[:, now], now)
    return value, before


def unit_upper(matrix, tile):
    """``M`` of ``matrix = M D M'`` with D block diagonal and M unit upper in blocks: from the last block on."""
    n = matrix.shape[0]
    rest, unit = matrix.copy(), np.eye(n)
    for start in reversed(range(0, n, tile)):
        end = start + tile
        pivot = rest[start:end, start:end]
        column = rest[:start, start:end] @ np.linalg.inv(pivot)
        unit[:start, start:end] = column
        rest[:start, :start] -= column @ pivot @ column.T
    return unit


def objective(value, weight, hessian):
    """``tr((V - W) H (V - W)')``."""
    return float(np.trace((value - weight) @ hessian @ (value - weight).T))
