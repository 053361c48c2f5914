"""``python -m benchmarks.products``: speed of the products with packed weights, on one core.

From the cache one matrix of about a MiB is used again and again; from memory 256 MiB of matrices follow one another,
as the layers of a model do. Each row also has, from the same run, the rate of a plain read of the same bytes and of
torch's product with bfloat16 matrices of the same shape. Times are medians, of the thread, so that others on the core
count little, and include the call. The rows replace ``benchmarks/results/products.json``.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.__main__ import HERE, machine, versions
from mezzotint import kernels

RESULTS = HERE / "results" / "products.json"
CACHE, MEMORY = 2**20, 2**28
WIDTH = 4096
SEED = 0


@dataclass(frozen=True)
class Format:
    """Packed weights: a trellis of `words` words a tile, or integers or indices into a table in groups."""

    name: str
    words: int = 0
    states: int = 0
    bits: int = 0
    group_size: int = 0
    width: int = 0  # columns that an index stands for

    @property
    def bits_per_weight(self) -> float:
        """Without scales."""
        return self.words / 8 if self.words else self.bits / (self.width or 1)

    def product(self, pool: Tensor, rows: int, columns: int, level: str) -> Callable[[Tensor], Tensor]:
        """The product with a matrix whose words are the first of the pool."""
        if self.words:
            tiles = pool[: columns * rows // 256 * self.words].view(columns // 16, rows // 16, self.words)
            return lambda x: kernels.trellis_matmul(x, tiles, states=self.states, threads=1, level=level)
        words = pool[: int(rows * columns * self.bits_per_weight) // 32].view(rows, -1)
        scale = torch.full((rows, -(-columns // self.group_size)), 0.01)
        if self.width:
            table = kernels.LevelTable.of(torch.linspace(-3, 3, 2**self.bits * self.width).view(-1, self.width))
            return lambda x: kernels.table_matmul(x, words, scale, table, self.group_size, threads=1, level=level)
        zero_point = torch.full_like(scale, 2.0 ** (self.bits - 1))
        options = {"bits": self.bits, "threads": 1, "level": level}
        return lambda x: kernels.packed_matmul(x, words, scale, zero_point, self.group_size, **options)


TRELLISES = tuple(
    Format("trellis", words=words, states=states)
    for states, rates in ((16, (8, 16, 18, 24, 26, 28, 32, 40, 46, 48)), (12, (16, 26, 32)))
    for words in rates
)
INTEGERS = tuple(Format("integers", bits=bits, group_size=128) for bits in range(2, 9))
TABLES = tuple(
    Format("lookup" if width == 1 else "vector", bits=bits, group_size=128, width=width)
    for width, widths in ((1, range(2, 9)), (2, range(3, 13)))
    for bits in widths
)
GROUPS = tuple(Format("integers", bits=4, group_size=size) for size in (32, 64, WIDTH))
SAMPLES = (
    Format("trellis", words=26, states=16),
    Format("integers", bits=4, group_size=128),
    Format("lookup", bits=4, group_size=128, width=1),
    Format("vector", bits=6, group_size=128, width=2),
)


def seconds(work: Callable[[], Any], budget: float) -> float:
    """Median of the thread's time; calls are grouped so that the clock is no part of it."""
    work()
    start = time.thread_time()
    work()
    once = max(time.thread_time() - start, 1e-7)
    together = max(1, int(1e-4 / once))
    times: list[float] = []
    end = time.thread_time() + budget
    while len(times) < 5 or time.thread_time() < end:
        start = time.thread_time()
        for _ in range(together):
            work()
        times.append((time.thread_time() - start) / together)
    return statistics.median(times)


def measure(
    form: Format, size: int, shape: tuple[int, int], batch: int, level: str, *, pools: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """One row: one matrix, or as many of its shape, out by in, as fill the memory."""
    pool, dense = pools
    rows, columns = shape
    words = int(rows * columns * form.bits_per_weight) // 32
    count = size // 4 // words if size == MEMORY else 1
    products = [form.product(pool[i * words :], rows, columns, level) for i in range(count)]
    halves = size // 2 // (rows * columns) if size == MEMORY else 1
    matrices = dense[: halves * rows * columns].view(halves, rows, columns)
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(SEED))
    half = x.bfloat16()
    read = pool[: count * words].numpy()

    def multiply() -> None:
        for product in products:
            product(x)

    def multiply_dense() -> None:
        for matrix in matrices:
            half @ matrix.t()

    budget = 0.3
    ours = count * rows * columns / seconds(multiply, budget)
    of_read = count * rows * columns / seconds(read.max, budget)
    of_dense = halves * rows * columns / seconds(multiply_dense, budget)
    return {
        "settings": {
            "format": form.name,
            "bits_per_weight": form.bits_per_weight,
            **({"states": form.states} if form.words else {"group_size": form.group_size}),
            "out": rows,
            "in": columns,
            "matrices": count,
            "batch": batch,
            "level": level,
            "where": "memory" if size == MEMORY else "cache",
            "seed": SEED,
        },
        "weights_per_second": ours,
        "bytes_per_second": ours * form.bits_per_weight / 8,
        "times_a_read": ours / of_read,
        "times_bfloat16": ours / of_dense,
    }


def cases() -> Iterator[tuple[Format, int, tuple[int, int], int, str]]:
    """Format, bytes, shape, batch and level of every row."""
    best, *others = reversed(kernels.product_levels())
    for form in (*TRELLISES, *INTEGERS, *TABLES, *GROUPS):
        fitting = int(CACHE * 8 / form.bits_per_weight / WIDTH) // 16 * 16
        yield form, CACHE, (fitting, WIDTH), 1, best
        if form not in GROUPS:
            yield form, MEMORY, (WIDTH, WIDTH), 1, best
    for form in SAMPLES:
        fitting = int(CACHE * 8 / form.bits_per_weight / WIDTH) // 16 * 16
        for batch in (2, 4, 8):
            yield form, CACHE, (fitting, WIDTH), batch, best
        yield form, CACHE, (576, 576), 1, best  # a small model's matrix, the call included
        for level in others:
            yield form, CACHE, (fitting, WIDTH), 1, level


def main() -> None:
    """Measure every row and write the results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    pool = torch.randint(-(2**31), 2**31 - 1, (MEMORY // 4,), dtype=torch.int32, generator=generator)
    dense = torch.randint(-100, 100, (MEMORY // 2,), dtype=torch.int8, generator=generator).bfloat16()
    results = []
    for form, size, shape, batch, level in cases():
        row = measure(form, size, shape, batch, level, pools=(pool, dense))
        results.append({**row, "versions": versions(), "machine": machine()})
        s = row["settings"]
        what = (
            f"{s['format']} {s['bits_per_weight']} bits, {s.get('states', s.get('group_size'))}, {s['out']} x {s['in']}"
        )
        sys.stdout.write(
            f"{what}, batch {batch}, {level}, {s['where']}: {row['weights_per_second'] / 1e9:.2f} G weights/s, "
            f"{row['times_a_read']:.2f} of a read, {row['times_bfloat16']:.1f} of bfloat16\n"
        )
        sys.stdout.flush()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
