"""Float64 twins of the kernels: loops over numbers, numpy only, nothing of ours."""

import numpy as np


def pack(code, bits):
    rows, n = code.shape
    words = -(-n * bits // 32)
    out = np.zeros((rows, words), dtype=np.int64)
    for r in range(rows):
        stream = sum(int(c) << (i * bits) for i, c in enumerate(code[r]))  # one large integer
        for w in range(words):
            out[r, w] = (stream >> (32 * w)) & 0xFFFFFFFF
    return out.astype(np.uint32).view(np.int32)


def unpack(packed, bits, n):
    rows = packed.shape[0]
    out = np.zeros((rows, n), dtype=np.uint8)
    for r in range(rows):
        stream = sum(int(w) << (32 * i) for i, w in enumerate(packed[r].view(np.uint32)))
        for i in range(n):
            out[r, i] = (stream >> (i * bits)) & (2**bits - 1)
    return out


def encode(value, scale, zero_point, bits):
    return np.clip(np.rint(value / scale) + zero_point, 0, 2**bits - 1)


def decode(code, scale, zero_point):
    return scale * (code - zero_point)


def groups(n, group_size):
    return [slice(start, min(start + group_size, n)) for start in range(0, n, group_size)]


def full_range(w, bits, symmetric):
    """Scale and zero point of one group, in exact scales."""
    low, high, half, top = min(w.min(), 0.0), max(w.max(), 0.0), 2 ** (bits - 1), 2**bits - 1
    if low == high:
        return 1.0, float(half if symmetric else 0)
    if symmetric:
        return max(-low / half, high / (half - 1)), float(half)
    scale = (high - low) / top
    return scale, float(np.clip(np.rint(-low / scale), 0, top))


def candidates(w, bits, symmetric, *, steps, shrink, span):
    """Every scale and zero point that the search of one group may choose, in exact scales."""
    low, high, half, top = min(w.min(), 0.0), max(w.max(), 0.0), 2 ** (bits - 1), 2**bits - 1
    extreme = max(-low, high)
    for i in range(steps):
        p, between = 1 - i * shrink / steps, 1 - (i + 0.5) * shrink / steps
        if symmetric:
            yield p * extreme / half, half
            yield between * extreme / (half - 0.5), half
        else:
            scale = p * (high - low) / top
            centre = np.clip(np.rint(-low * p / scale), 0, top)
            for d in range(-span, span + 1):
                yield scale, np.clip(centre + d, 0, top)


def error(w, importance, scale, zero_point, bits, power):
    difference = decode(encode(w, scale, zero_point, bits), scale, zero_point) - w
    return float((importance * abs(difference) ** power).sum())


def gptq(work, factor, scale, zero_point, bits):
    """Code, error and the values at the moment of rounding."""
    work = work.copy()
    rows, k = work.shape
    code, error = np.zeros((rows, k)), np.zeros((rows, k))
    for r in range(rows):
        for j in range(k):
            code[r, j] = encode(work[r, j], scale[r, j], zero_point[r, j], bits)
            error[r, j] = (work[r, j] - decode(code[r, j], scale[r, j], zero_point[r, j])) / factor[j, j]
            for c in range(j + 1, k):
                work[r, c] -= error[r, j] * factor[j, c]
    return code, error, work


def gptq_joint(work, factor, scale, zero_point, bits, curvature):
    """The same where each row is rounded from what is best for its block, given the errors of the rows before it.

    ``curvature`` is one square for each block. What is best for the rows that are left, were they free, solves a system
    of their own part of it.
    """
    work = work.copy()
    rows, k = work.shape
    size = curvature.shape[1]
    code, error, before = np.zeros((rows, k)), np.zeros((rows, k)), work.copy()
    for j in range(k):
        missed = np.zeros(rows)
        for r in range(rows):
            first = r // size * size
            end = min(first + size, rows)
            a = curvature[r // size][: end - first, : end - first]
            here = r - first
            if here:
                best = -np.linalg.solve(a[here:, here:], a[here:, :here] @ missed[first:r])
                before[r, j] = work[r, j] + best[0]
            else:
                before[r, j] = work[r, j]
            code[r, j] = encode(before[r, j], scale[r, j], zero_point[r, j], bits)
            missed[r] = decode(code[r, j], scale[r, j], zero_point[r, j]) - work[r, j]
        error[:, j] = -missed / factor[j, j]
        work[:, j + 1 :] -= np.outer(error[:, j], factor[j, j + 1 :])
    return code, error, before


def descend_joint(value, gradient, gram, scale, zero_point, bits, curvature):
    """Codes and values after every weight has moved to the best of its codes, rows of a column in turn.

    ``gradient`` and ``curvature`` are of all rows together, ``[rows, k]`` and ``[rows, rows]``.
    """
    value, slope = value.copy(), gradient.copy()
    rows, k = value.shape
    code = np.zeros((rows, k))
    levels = np.arange(2**bits)
    for j in range(k):
        for r in range(rows):
            steps = scale[r, j] * (levels - zero_point[r, j]) - value[r, j]
            gains = curvature[r, r] * gram[j, j] * steps**2 + 2 * slope[r, j] * steps
            code[r, j] = np.argmin(gains) if gram[j, j] > 0 else np.argmin(np.abs(steps))
            step = steps[int(code[r, j])]
            value[r, j] += step
            slope += np.outer(curvature[:, r], gram[j]) * step
    return code, value


def descend(value, gradient, gram, scale, zero_point, bits):
    """Code and value after every column of every row has moved to the best one of all its codes."""
    value = value.copy()
    rows, k = value.shape
    code = np.zeros((rows, k))
    levels = np.arange(2**bits)
    for r in range(rows):
        slope = gradient[r].copy()
        for j in range(k):
            steps = scale[r, j] * (levels - zero_point[r, j]) - value[r, j]
            gains = gram[j, j] * steps**2 + 2 * slope[j] * steps
            code[r, j] = np.argmin(gains) if gram[j, j] > 0 else np.argmin(np.abs(steps))
            step = steps[int(code[r, j])]
            value[r, j] += step
            slope += step * gram[j]
    return code, value


def hadamard(values, block):
    """Blocks of columns times the matrix, made by Sylvester's rule."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    out = np.zeros(values.shape)
    for start in range(0, values.shape[1], block):
        out[:, start : start + block] = values[:, start : start + block] @ matrix / np.sqrt(block)
    return out
