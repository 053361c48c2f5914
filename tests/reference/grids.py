"""Float64 twins of the grids: every code is tried, every candidate is tried. Numpy only, nothing of ours."""

from itertools import pairwise, product
from math import ceil, erf, exp, inf, pi, sqrt

import numpy as np


def uniform_value(code, scale, zero_point):
    return scale * (code - zero_point)


def nearest_uniform(value, scale, zero_point, bits):
    """The code whose value is nearest, found by trying all of them."""
    distance = [abs(uniform_value(code, scale, zero_point) - value) for code in range(2**bits)]
    return int(np.argmin(distance))


def encode_uniform(values, scale, zero_point, bits, group_size):
    """Codes of a matrix; column ``j`` belongs to group ``j // group_size``."""
    code = np.zeros(values.shape, dtype=np.int64)
    for r, j in product(*map(range, values.shape)):
        g = j // group_size
        code[r, j] = nearest_uniform(values[r, j], scale[r, g], zero_point[r, g], bits)
    return code


def decode_uniform(code, scale, zero_point, group_size):
    value = np.zeros(code.shape)
    for r, j in product(*map(range, code.shape)):
        g = j // group_size
        value[r, j] = uniform_value(int(code[r, j]), scale[r, g], zero_point[r, g])
    return value


def error_of(values, importance, scale, zero_point, bits, power):
    """Of one group, a sum of powers."""
    error = 0.0
    for value, weight in zip(values, importance, strict=True):
        near = uniform_value(nearest_uniform(value, scale, zero_point, bits), scale, zero_point)
        error += weight * abs(near - value) ** power
    return error


def least_error(values, importance, bits, *, power, symmetric, shrink=0.8, steps=80, span=1):
    """The least error of one group over all ranges and zero points of the search, in unrounded scales."""
    top, half = 2**bits - 1, 2 ** (bits - 1)
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    pairs = []
    for i in range(steps):
        p, between = 1 - i * shrink / steps, 1 - (i + 0.5) * shrink / steps
        if symmetric:
            pairs.append((p * max(-low, high) / half, half))
            pairs.append((between * max(-low, high) / (half - 0.5), half))
            continue
        scale = p * (high - low) / top
        near = int(np.clip(np.rint(-low * p / scale), 0, top))
        pairs += [(scale, z) for z in range(max(near - span, 0), min(near + span, top) + 1)]
    return min(error_of(values, importance, scale, zero_point, bits, power) for scale, zero_point in pairs)


def uniform_sizes(shape, *, bits, group_size, scale_bits, symmetric, one_scale=False):
    """Bits of what the uniform grid stores, counted one by one: (codes, scales, zero points and what fills up rows)."""
    rows, columns = shape
    code = sum(bits for _ in range(rows) for _ in range(columns))
    side = sum(unfilled(columns * bits, 32) for _ in range(rows))
    for _ in range(1 if one_scale else rows):
        groups = ceil(columns / (group_size or columns))
        for _ in range(groups):
            side += scale_bits
            if not symmetric:
                side += bits
        if not symmetric:
            side += unfilled(groups * bits, 8)
    return code, side


def unfilled(used, whole):
    """Bits that are left of the last word of ``whole`` bits."""
    left = 0
    while (used + left) % whole:
        left += 1
    return left


def trellis_sizes(shape, *, rate, row_scales):
    """(codes, side data): a tile of 256 weights takes 32 bits for every eighth of a bit; padding is side data."""
    tiles = ceil(shape[0] / 16) * ceil(shape[1] / 16)
    codes = ceil(shape[0] * shape[1] * rate / 8)
    scales = 16 * shape[0] if row_scales else 32
    return codes, tiles * 32 * rate - codes + scales


# columns of a block, bits of a code, of a group's scale and minimum, columns of a group, bits of a block's own numbers
GGUF = {
    "Q4_0": (32, 4, 0, 32, 16),
    "Q4_1": (32, 4, 0, 32, 32),
    "Q5_0": (32, 5, 0, 32, 16),
    "Q5_1": (32, 5, 0, 32, 32),
    "Q8_0": (32, 8, 0, 32, 16),
    "IQ4_NL": (32, 4, 0, 32, 16),
    "Q2_K": (256, 2, 8, 16, 32),
    "Q3_K": (256, 3, 6, 16, 16),
    "Q4_K": (256, 4, 12, 32, 32),
    "Q5_K": (256, 5, 12, 32, 32),
    "Q6_K": (256, 6, 8, 16, 16),
}


def gguf_sizes(shape, *, type_name):
    """Bits of what a block type stores, counted one by one: (codes, scales and minima)."""
    block, bits, group_bits, group, own = GGUF[type_name]
    code = sum(bits for _ in range(shape[0]) for _ in range(shape[1]))
    side = 0
    for _ in range(shape[0]):
        for start in range(0, shape[1], group):
            side += group_bits + (own if start % block == 0 else 0)
    return code, side


def codebook_sizes(shape, *, index_bits, tile, group_size, scale_bits, one_scale=False):
    """Bits of what a grid of a codebook stores, counted one by one: (codes, scales and what fills up rows)."""
    rows, columns = shape
    code = sum(index_bits for _ in range(rows) for _ in range(0, columns, tile))
    side = sum(scale_bits for _ in range(rows) for _ in range(0, columns, group_size or columns))
    side = scale_bits if one_scale else side
    return code, side + sum(unfilled(columns // tile * index_bits, 32) for _ in range(rows))


def lloyd_max(levels, rounds):
    """Values for standard normal numbers: the two conditions of Lloyd in turn, from evenly spaced values."""
    values = [-2.0 + 4.0 * (i + 0.5) / levels for i in range(levels)]
    for _ in range(rounds):
        ends = [-inf, *((a + b) / 2 for a, b in pairwise(values)), inf]
        values = [normal_mean(a, b) for a, b in pairwise(ends)]
    return np.array(values)


def normal_mean(low, high):
    """Of the standard normal numbers between two ends."""
    mass = (erf(high / sqrt(2)) - erf(low / sqrt(2))) / 2
    return (exp(-(low**2) / 2) - exp(-(high**2) / 2)) / sqrt(2 * pi) / mass


def normal_error(values):
    """Mean squared error of standard normal numbers rounded to the nearest of increasing values."""
    ends = [-inf, *((a + b) / 2 for a, b in pairwise(values)), inf]
    error = 1.0  # E x^2 - 2 sum c E[x; cell] + sum c^2 P(cell)
    for value, (a, b) in zip(values, pairwise(ends), strict=True):
        mass = (erf(b / sqrt(2)) - erf(a / sqrt(2))) / 2
        error += value * (value - 2 * normal_mean(a, b)) * mass
    return error


def nearest_entry(point, entries):
    """Index of the nearest entry, a row each; the lowest of those at the same distance."""
    return int(np.argmin([sum((p - e) ** 2 for p, e in zip(point, entry, strict=True)) for entry in entries]))


def codebook_error(values, importance, scale, entries):
    """Weighted squared error of one group, in tiles of as many columns as an entry has."""
    width, error = len(entries[0]), 0.0
    for start in range(0, len(values), width):
        tile = values[start : start + width]
        near = entries[nearest_entry(tile / scale, entries)] * scale
        error += sum(importance[start : start + width] * (near - tile) ** 2)
    return error
