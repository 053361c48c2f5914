"""``python -m benchmarks.trellis_table``: the error of the trellis code at every rate, at the best scale.

Writes ``src/mezzotint/grids/trellis_table.toml``: for each number of states and rate, what weights of unit variance are
best multiplied by before `trellis_encode`, and the mean squared error that is left. The factor is the minimum of a
parabola through the errors at seven factors; the error is that of other weights. About ten minutes on one core.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from mezzotint import kernels

TABLE = Path(__file__).resolve().parents[1] / "src" / "mezzotint" / "grids" / "trellis_table.toml"
RATES = range(8, 49)
WINDOW = 32
STEP = 0.02  # between factors
SEARCHED = {12: 2**18, 16: 2**16}  # weights
MEASURED = {12: 2**20, 16: 2**18}
HEADER = f"""\
# Made by `python -m benchmarks.trellis_table`. Gaussian weights of unit variance are multiplied by `factor`, encoded
# with a window of {WINDOW}, decoded and divided by it: `distortion` is the mean squared error of `weights` of them.
# `rate` is in bits per eight weights.
"""


def gaussian(weights: int, seed: int) -> torch.Tensor:
    """Tiles whose mean square is 1: the error of a sample follows its power."""
    values = torch.randn(weights // 256, 256, generator=torch.Generator().manual_seed(seed))
    return values / values.square().mean().sqrt()


def distortion(values: torch.Tensor, rate: int, states: int, factor: float) -> float:
    """Mean squared error at one factor."""
    packed = kernels.trellis_encode(values * factor, rate, states=states, window=WINDOW)
    return float((kernels.trellis_decode(packed, states=states) / factor - values).square().mean())


def best_factor(values: torch.Tensor, rate: int, states: int, start: float) -> float:
    """The minimum near `start`, or wherever the errors lead from there."""
    known: dict[int, float] = {}
    centre = round(start / STEP)
    while True:
        near = range(centre - 3, centre + 4)
        known |= {i: distortion(values, rate, states, i * STEP) for i in near if i not in known}
        lowest = min(near, key=known.__getitem__)
        if abs(lowest - centre) <= 1:
            break
        centre = lowest
    a, b, _ = np.polyfit([i - centre for i in near], [known[i] for i in near], 2)
    return round(STEP * (centre + float(np.clip(-b / (2 * a), -2, 2))), 3)


def main() -> None:
    """Measure all and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    text = HEADER
    for states in (12, 16):
        searched, measured = gaussian(SEARCHED[states], 1), gaussian(MEASURED[states], 2)
        text += f"\n[states_{states}]\nweights = {MEASURED[states]}\nrates = [\n"
        factor = 1.0
        for rate in RATES:
            factor = best_factor(searched, rate, states, factor)
            error = distortion(measured, rate, states, factor)
            text += f"    {{ rate = {rate}, factor = {factor:.3f}, distortion = {error:.4g} }},\n"
            sys.stdout.write(
                f"{states} {rate}: factor {factor:.3f}, {error:.4g} = {error * 4 ** (rate / 8):.3f} D(R)\n"
            )
            sys.stdout.flush()
        text += "]\n"
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
