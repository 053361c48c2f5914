"""Float64 and integer twins of the products with packed weights: loops over numbers, numpy only, nothing of ours."""

import numpy as np

TOP = 32639


def trellis_codes(packed, states):
    """Byte sums minus 510 of a matrix [out, in], from words [in/16, out/16, P]."""
    in_tiles, out_tiles, rate = packed.shape
    codes = np.zeros((16 * out_tiles, 16 * in_tiles), dtype=np.int64)
    for i in range(in_tiles):
        for o in range(out_tiles):
            string = "".join(f"{int(word):032b}" for word in packed[i, o].view(np.uint32))
            for e in range(256):
                end = (e + 1) * rate // 8
                state = int((string + string)[len(string) + end - states : len(string) + end], 2)
                hashed = state * 0x83DCD12D % 2**32
                t, m = e // 8, e % 8
                row, column = (t % 4) * 2 + (0, 1, 8, 9)[m % 4], t // 4 + 8 * (m // 4)
                codes[16 * o + column, 16 * i + row] = sum(hashed.to_bytes(4, "little")) - 510
    return codes


def quantized_inputs(x):
    """Whole multiples of max|x| / 32639 in each row, and the float64 units."""
    q, unit = np.zeros(x.shape, dtype=np.int64), np.zeros(len(x))
    for b, row in enumerate(x):
        largest = np.abs(row).max(initial=np.float32(0))
        if largest == 0:
            continue
        if not np.isfinite(largest):
            unit[b] = np.nan
            continue
        lift = np.float32(2.0**90 if largest < 2.0**-60 else 1)
        q[b] = np.rint((row * lift) * (np.float32(TOP) / (largest * lift)))
        unit[b] = np.float64(largest) / TOP
    return q, unit


def trellis_matmul(x, codes):
    q, unit = quantized_inputs(x)
    return ((unit / 147.7)[:, None] * (q @ codes.T).astype(np.float64)).astype(np.float32)


def pieces(n, group_size):
    """Begin, end and group of the runs of columns whose products are summed as integers."""
    if group_size >= n:
        group_size = -(-n // 128) * 128
    piece = int(np.gcd(group_size, 128))
    piece = piece if piece >= 32 else 128
    return [
        (begin, min(begin + piece, start + group_size, n), start // group_size)
        for start in range(0, n, group_size)
        for begin in range(start, min(start + group_size, n), piece)
    ]


def table_matmul(x, code, levels, step, scale, group_size):
    """As `packed_matmul`; a code stands for as many neighbouring columns as the table has values for it."""
    q, unit = quantized_inputs(x)
    level = levels.astype(np.int64)[code].reshape(len(code), x.shape[1])
    out = np.zeros((len(x), len(code)), dtype=np.float32)
    for b in range(len(x)):
        lanes = np.zeros((16, len(code)), dtype=np.float32)
        for p, (begin, end, group) in enumerate(pieces(x.shape[1], group_size)):
            lanes[p % 16] += scale[:, group] * (level[:, begin:end] @ q[b, begin:end]).astype(np.float32)
        for half in (8, 4, 2, 1):
            lanes = lanes[:half] + lanes[half : 2 * half]
        out[b] = (unit[b] * step * lanes[0].astype(np.float64)).astype(np.float32)
    return out


def packed_matmul(x, code, scale, zero_point, group_size):
    """In float32, sixteen accumulators and a tree, as the kernels."""
    q, unit = quantized_inputs(x)
    out = np.zeros((len(x), len(code)), dtype=np.float32)
    for b in range(len(x)):
        lanes = np.zeros((16, len(code)), dtype=np.float32)
        for p, (begin, end, group) in enumerate(pieces(x.shape[1], group_size)):
            whole = (code[:, begin:end].astype(np.int64) @ q[b, begin:end]).astype(np.float32)
            inputs = np.float32(q[b, begin:end].sum())
            lanes[p % 16] += scale[:, group] * (whole - zero_point[:, group] * inputs)
        for half in (8, 4, 2, 1):
            lanes = lanes[:half] + lanes[half : 2 * half]
        out[b] = (unit[b] * lanes[0].astype(np.float64)).astype(np.float32)
    return out
