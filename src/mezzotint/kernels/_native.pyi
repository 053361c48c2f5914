from torch import Tensor

def available_levels() -> list[str]: ...
def multiplies_bfloat16() -> bool: ...
def pack(code: Tensor, packed: Tensor, bits: int, threads: int, level: str) -> bool: ...
def unpack(packed: Tensor, code: Tensor, bits: int, threads: int, level: str) -> None: ...
def encode(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    code: Tensor,
    group_size: int,
    bits: int,
    threads: int,
    level: str,
) -> None: ...
def decode(
    code: Tensor, scale: Tensor, zero_point: Tensor, decoded: Tensor, group_size: int, threads: int, level: str
) -> None: ...
def min_max(values: Tensor, lowest: Tensor, highest: Tensor, group_size: int, threads: int, level: str) -> None: ...
def search(
    values: Tensor,
    importance: Tensor | None,
    fractions: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bits: int,
    span: int,
    symmetric: bool,
    power: float,
    dropped_bits: int,
    threads: int,
    level: str,
) -> None: ...
def gptq(
    work: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    code: Tensor,
    error: Tensor,
    taken: Tensor | None,
    bits: int,
    threads: int,
    level: str,
) -> None: ...
def descend(
    value: Tensor,
    gradient: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    code: Tensor,
    curvature: Tensor | None,
    bits: int,
    threads: int,
    level: str,
) -> None: ...
def refit(
    scale: Tensor,
    zero_point: Tensor,
    pulls: Tensor,
    bends: Tensor,
    flat: float,
    between: Tensor,
    curvature: Tensor,
    steps: Tensor,
    bits: int,
    symmetric: bool,
    dropped_bits: int,
    threads: int,
    level: str,
) -> None: ...
def product_levels() -> list[str]: ...
def trellis_matmul(
    x: int,
    packed: int,
    out: int,
    batch: int,
    in_tiles: int,
    out_tiles: int,
    rate: int,
    states: int,
    threads: int,
    level: str,
) -> None: ...
def packed_matmul(
    x: int,
    words: int,
    scale: int,
    zero_point: int,
    out: int,
    batch: int,
    n: int,
    rows: int,
    group_size: int,
    bits: int,
    threads: int,
    level: str,
) -> None: ...
def table_matmul(
    x: int,
    words: int,
    scale: int,
    levels: int,
    step: float,
    out: int,
    batch: int,
    n: int,
    rows: int,
    group_size: int,
    width: int,
    bits: int,
    threads: int,
    level: str,
) -> None: ...
def hadamard(values: Tensor, out: Tensor, block: int, threads: int, level: str) -> None: ...
def trellis_encode(values: Tensor, packed: Tensor, states: int, window: int, threads: int, level: str) -> None: ...
def trellis_decode(packed: Tensor, decoded: Tensor, states: int, threads: int, level: str) -> None: ...
