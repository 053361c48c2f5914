"""``python -m benchmarks.sensitivity --model DIR --text FILE``: predicted sensitivities against inserted noise.

`measure_sensitivity` predicts, from one backward pass, what `noise_insertion` finds with a forward pass a matrix.
Every ``--every``-th matrix of the blocks is tried, and the embedding. One row is appended to
``benchmarks/results/sensitivity.json``.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.__main__ import HERE, machine, versions
from mezzotint.budgeting.noise import noise_insertion
from mezzotint.budgeting.sensitivity import measure_sensitivity
from mezzotint.calibration import consecutive_windows, load_tokenizer
from mezzotint.models import open_model

RESULTS = HERE / "results" / "sensitivity.json"
ENERGY = 1e-3


def ranks(values: np.ndarray) -> np.ndarray:
    """Of each value among all."""
    return values.argsort().argsort().astype(float)


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--name", help="of the model in the results; its folder's if left out")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--windows", type=int, default=8, help="for the prediction")
    parser.add_argument("--tried", type=int, default=2, help="of them, for the noise")
    parser.add_argument("--seqlen", type=int, default=512)
    options = parser.parse_args()
    source, tokenizer = open_model(options.model), load_tokenizer(options.model)
    windows = consecutive_windows(
        options.text.read_text(encoding="utf-8"), tokenizer, seqlen=options.seqlen, windows=options.windows
    )
    names = [name for block in source.map.blocks for group in block.groups for name in group.matrices][:: options.every]
    names.append(source.map.embedding)
    seconds: dict[str, float] = {}
    started = time.process_time()
    predicted = measure_sensitivity(source, windows)
    seconds["predicted"] = time.process_time() - started
    started = time.process_time()
    tried = noise_insertion(source, windows.take(torch.arange(options.tried)), names, energy=ENERGY)
    seconds["noise"] = time.process_time() - started
    pairs = np.array([[predicted[name].fisher, tried[name]] for name in names])
    ratios = pairs[:, 0] / pairs[:, 1]
    row: dict[str, Any] = {
        "model": options.name or options.model.name,
        "settings": {
            "text": options.text.name, "windows": options.windows, "tried": options.tried, "seqlen": options.seqlen,
            "energy": ENERGY, "every": options.every, "matrices": len(names),
        },
        "rank_correlation": float(np.corrcoef(ranks(pairs[:, 0]), ranks(pairs[:, 1]))[0, 1]),
        "ratio": {"median": float(np.median(ratios)), "p5": float(np.percentile(ratios, 5)),
                  "p95": float(np.percentile(ratios, 95))},
        "sum": {"predicted": float(pairs[:, 0].sum()), "noise": float(pairs[:, 1].sum())},
        "cpu_seconds": seconds,
        "by_matrix": {name: [float(a), float(b)] for name, (a, b) in zip(names, pairs, strict=True)},
        "versions": versions(),
        "machine": machine(),
    }  # fmt: skip
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({key: row[key] for key in ("rank_correlation", "ratio", "sum", "cpu_seconds")}) + "\n")


if __name__ == "__main__":
    main()
