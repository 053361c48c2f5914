"""Twin of ExLlamaV3's reading of a matrix, from its sources' description: numpy only, in its half precision."""

import numpy as np
from scipy.linalg import hadamard

MUL1 = 0x83DCD12D
SCALE = np.float16(0.0067672729)  # bits 0x1eee
BIAS = np.float16(-10.3828125)  # bits 0xc931


def states_of(tile: np.ndarray, bits: int) -> np.ndarray:
    """The 16 bits that each of 256 elements ends with; of every two int16 numbers the second comes first."""
    words = tile.astype(np.uint16).reshape(-1, 2)[:, ::-1].ravel()
    string = np.unpackbits(words.astype(">u2").view(np.uint8))
    ends = (np.arange(256) + 1) * bits
    places = (ends[:, None] - 16 + np.arange(16)) % len(string)
    return string[places].astype(np.int64) @ (1 << np.arange(15, -1, -1))


def value_of(states: np.ndarray) -> np.ndarray:
    """One fused multiplication and addition of float16 numbers; 1024 plus a sum of four bytes is one."""
    product = states * MUL1 % 2**32
    total = sum(product >> shift & 255 for shift in (0, 8, 16, 24))
    return ((1024 + total) * float(SCALE) + float(BIAS)).astype(np.float16)


def inner(trellis: np.ndarray) -> np.ndarray:
    """``V`` as ``[in, out]``."""
    tiles_in, tiles_out, words = trellis.shape
    lane, m = np.divmod(np.arange(256), 8)
    row = lane % 4 * 2 + np.array([0, 1, 8, 9])[m % 4]
    column = lane // 4 + m // 4 * 8
    found = np.zeros((tiles_in, tiles_out, 16, 16), dtype=np.float16)
    for a, b in np.ndindex(tiles_in, tiles_out):
        found[a, b, row, column] = value_of(states_of(trellis[a, b], words // 16))
    return found.transpose(0, 2, 1, 3).reshape(16 * tiles_in, 16 * tiles_out)


def weight(trellis: np.ndarray, suh: np.ndarray, svh: np.ndarray) -> np.ndarray:
    """The matrix ``[out, in]`` in float64; only ``V`` has been rounded to float16."""
    turn = hadamard(128) / 128**0.5
    value = inner(trellis).astype(np.float64)
    rows, columns = value.shape
    value = np.einsum("ij,bjn->bin", turn, value.reshape(-1, 128, columns)).reshape(rows, columns)
    value = value * suh.astype(np.float64)[:, None]
    value = np.einsum("nbj,ji->nbi", value.reshape(rows, -1, 128), turn).reshape(rows, columns)
    return (value * svh.astype(np.float64)).T
