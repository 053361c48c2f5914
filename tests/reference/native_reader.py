"""A reader of the format ``mezzotint`` after docs/format.md. Numpy and the standard library only, nothing of ours."""

import json
import struct
import zlib
from itertools import pairwise
from math import erf, exp, inf, pi, sqrt
from pathlib import Path
from statistics import NormalDist

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<u4", "I64": "<i8", "U8": "u1"}


def read_file(path: Path) -> dict[str, tuple[str, np.ndarray, bytes]]:
    """Dtype, values (integers as they are, without a sign; floats in float64) and bytes of every tensor."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        value = np.frombuffer(data[begin:end], dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            value = (value.astype("<u4") << 16).view("<f4")
        if value.dtype.kind == "f":
            value = value.astype(np.float64)
        found[name] = entry["dtype"], value, data[begin:end]
    return found


def decode_folder(path: Path, quantization: dict) -> dict[str, np.ndarray]:
    """Every weight, in float64."""
    assert quantization["quant_method"] == "mezzotint"
    assert quantization["format_version"] == 2
    stored = read_file(path)
    weights = {}
    for module, number in quantization["modules"].items():
        inside = {n.removeprefix(f"{module}."): t for n, t in stored.items() if n.startswith(f"{module}.weight_")}
        crc = 0
        for name in sorted(inside):
            crc = crc if name == "weight_checksum" else zlib.crc32(inside[name][2], crc)
        assert crc == inside["weight_checksum"][1][0], module
        values = {name.removeprefix("weight_"): tensor[1] for name, tensor in inside.items()}
        weights[module] = decode(quantization["schemes"][number], values)
    return weights


def decode(scheme: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    rows, columns = scheme["shape"]
    grid = scheme["grid"]
    if grid["kind"] == "trellis":
        value = trellis(grid, tensors, rows)[:rows, :columns]
    else:
        value = grouped(grid, tensors, columns)
    transform = scheme["transform"]
    if transform is None:
        return value
    if transform["kind"] == "quip":
        inner, outer = (
            turned(n, seed, transform["matrices"])
            for n, seed in zip((columns, rows), tensors["basis_seed"].tolist(), strict=True)
        )
        return outer.T @ value @ inner / tensors["basis_input_scale"]
    assert transform["kind"] == "hadamard"
    byte = tensors["basis_input_sign"]
    sign = np.array([-1.0 if byte[j // 8] >> (j % 8) & 1 else 1.0 for j in range(columns)])
    left = blocks(rows, transform["block"]) if transform["sides"] == "both" else np.eye(rows)
    right = blocks(columns, transform["block"])
    return tensors["basis_output_scale"][:, None] * (left @ value @ right) * sign


def grouped(grid: dict, tensors: dict[str, np.ndarray], columns: int) -> np.ndarray:
    bits, size = grid["bits"], grid["group_size"] or columns
    group = np.arange(columns) // size
    code = codes(tensors["packed"], 32, bits, columns)
    scale = tensors["scale"] if grid.get("scale_per") == "matrix" else tensors["scale"][:, group]
    if grid["kind"] == "lookup":
        tables = {"nf4": nf4, "gaussian": lambda: gaussian(2**bits), "even": lambda: np.linspace(-2.4, 2.4, 2**bits)}
        return scale * np.array(tables[grid["table"]]())[code]
    assert grid["kind"] == "uniform"
    if grid["symmetric"]:
        return scale * (code - 2 ** (bits - 1))
    return scale * (code - codes(tensors["zero_point"], 8, bits, tensors["scale"].shape[1])[:, group])


def codes(packed: np.ndarray, width: int, bits: int, count: int) -> np.ndarray:
    """Of rows of words of ``width`` bits."""
    code = np.zeros((len(packed), count), dtype=np.int64)
    for row, words in enumerate(packed.tolist()):
        stream = sum(word << (width * k) for k, word in enumerate(words))
        code[row] = [stream >> (j * bits) & (2**bits - 1) for j in range(count)]
        assert stream >> (count * bits) == 0
    return code


def turned(size: int, seed: int, matrices: str) -> np.ndarray:
    """The orthogonal matrix of a seed."""
    draw = np.random.RandomState(seed)

    def factor(n: int) -> np.ndarray:
        q, r = np.linalg.qr(draw.standard_normal((n, n)))
        return q * np.sign(np.diag(r))

    primes = [d for d in range(2, size + 1) if all(d % e for e in range(2, d))]
    found = [d for d in primes for k in range(1, size.bit_length() + 1) if size % d**k == 0]
    if matrices == "hadamard":
        sign = np.where(draw.random_sample(size) < 0.5, -1.0, 1.0)
        odd = int(np.prod([d for d in found if d > 2]))
        return np.kron(factor(odd) if odd > 1 else np.eye(1), blocks(size // odd, size // odd)) * sign
    permutation = draw.permutation(size)
    return np.kron(*(factor(int(np.prod(take))) for take in (found[::2], found[1::2])))[:, np.argsort(permutation)]


def gaussian(levels: int) -> list[float]:
    """Mean and middle in turns, until nothing moves."""
    places = [NormalDist(0, sqrt(3)).inv_cdf((i + 0.5) / levels) for i in range(levels)]
    for _ in range(3000):
        ends = [-inf, *((a + b) / 2 for a, b in pairwise(places)), inf]
        places = [(density(a) - density(b)) / (mass(b) - mass(a)) for a, b in pairwise(ends)]
    return places


def density(x: float) -> float:
    return exp(-x * x / 2) / sqrt(2 * pi)


def mass(x: float) -> float:
    return (1 + erf(x / sqrt(2))) / 2


def nf4() -> list[float]:
    q, p = NormalDist().inv_cdf, 0.9677083
    below = [-q(p - (p - 0.5) * i / 7) for i in range(7)]
    above = [q(0.5 + (p - 0.5) * i / 8) for i in range(1, 9)]
    return [x / q(p) for x in (*below, 0.0, *above)]


def trellis(grid: dict, tensors: dict[str, np.ndarray], rows: int) -> np.ndarray:
    packed, states = tensors["packed"], grid["states"]
    in_tiles, out_tiles, rate = packed.shape
    assert rate == 8 * grid["bits"]
    value = np.zeros((16 * out_tiles, 16 * in_tiles))
    for a in range(in_tiles):
        for b in range(out_tiles):
            string = "".join(f"{int(word):032b}" for word in packed[a, b])
            for element in range(256):
                end = len(string) + (element + 1) * rate // 8
                state = int((string + string)[end - states : end], 2)
                total = sum((state * 0x83DCD12D % 2**32).to_bytes(4, "little"))
                t, m = divmod(element, 8)
                place = 16 * b + t // 4 + 8 * (m // 4), 16 * a + 2 * (t % 4) + (0, 1, 8, 9)[m % 4]
                value[place] = (total - 510) / 147.7
    return value[:rows] * (tensors["scale"][:, None] if grid["scale_per"] == "row" else tensors["scale"][0])


def blocks(size: int, limit: int) -> np.ndarray:
    n = 1
    while 2 * n <= limit and size % (2 * n) == 0:
        n *= 2
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(size // n), h / sqrt(n))
