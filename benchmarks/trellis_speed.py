"""``python -m benchmarks.trellis_speed``: how fast the trellis code is encoded and decoded on one core, at every level.

Writes ``benchmarks/results/trellis_speed.json``. Time is the processor's, the best of several runs on one thread, so
that other programs matter little; both passes of the encoder count. About two minutes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.__main__ import HERE, machine, versions
from mezzotint import kernels

RESULTS = HERE / "results" / "trellis_speed.json"
RATES = (8, 12, 16, 20, 24, 26, 28, 32, 40, 48)
WINDOW = 32
ENCODED = {"avx512": 2**18, "avx2": 2**17, "portable": 2**15}  # weights at 12 bits of state; a sixteenth of it at 16
DECODED = 2**22
RUNS = 5


def megaweights_per_second(weights: int, work: Callable[[], Any]) -> float:
    """The best of several runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(RUNS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return round(weights / min(seconds) / 1e6, 4)


def encoding(level: str, states: int, rate: int) -> dict[str, Any]:
    """One row."""
    weights = ENCODED[level] >> (states - 12)
    values = torch.randn(weights // 256, 256, generator=torch.Generator().manual_seed(rate))
    options = {"states": states, "window": WINDOW, "threads": 1, "level": level}
    speed = megaweights_per_second(weights, lambda: kernels.trellis_encode(values, rate, **options))
    return {"level": level, "states": states, "rate": rate, "megaweights_per_second": speed}


def decoding(level: str, states: int, rate: int, dtype: torch.dtype) -> dict[str, Any]:
    """One row; the codes are any bits."""
    generator = torch.Generator().manual_seed(rate)
    packed = torch.randint(-(2**31), 2**31, (DECODED // 256, rate), generator=generator).to(torch.int32)
    options = {"states": states, "threads": 1, "level": level, "dtype": dtype}
    speed = megaweights_per_second(DECODED, lambda: kernels.trellis_decode(packed, **options))
    name = str(dtype).removeprefix("torch.")
    return {"level": level, "states": states, "rate": rate, "dtype": name, "megaweights_per_second": speed}


def main() -> None:
    """Measure all and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    encode, decode = [], []
    for level in kernels.available_levels():
        for states in (12, 16):
            for rate in RATES:
                encode.append(encoding(level, states, rate))
                sys.stdout.write(f"encode {json.dumps(encode[-1])}\n")
                sys.stdout.flush()
            for dtype in (torch.float32, torch.bfloat16):
                decode.append(decoding(level, states, 24, dtype))
                sys.stdout.write(f"decode {json.dumps(decode[-1])}\n")
    settings = {"window": WINDOW, "threads": 1, "runs": RUNS, "clock": "processor time"}
    result = {
        "settings": settings,
        "encode": encode,
        "decode": decode,
        "versions": versions(),
        "machine": machine(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
