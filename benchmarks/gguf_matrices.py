"""``python -m benchmarks.gguf_matrices --python PYTHON``: random matrices, our blocks against those of ggml.

Weights are normal, inputs correlated and of unequal size, as in the tests (`mezzotint.testing.problems`), 4096 wide.
Both get the mean squares of the inputs, ours has the whole Hessian besides. h_error is ``tr(E H E') / tr(W H W')``.
PYTHON is one that has llama-cpp-python. The rows replace ``benchmarks/results/gguf_matrices.json``.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType

from benchmarks.__main__ import HERE, machine, versions
from benchmarks.gguf import run_worker
from mezzotint.core.metrics import h_error
from mezzotint.grids.gguf.grid import GgufGrid
from mezzotint.grids.gguf.types import BLOCK_TYPES
from mezzotint.rounding.gptq import Gptq
from mezzotint.testing.problems import ProblemSettings, make_problem

RESULTS = HERE / "results" / "gguf_matrices.json"
ROWS, COLUMNS, TOKENS = 256, 4096, 16384


def main() -> None:
    """Every type, by nearest rounding and by GPTQ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="python that has llama-cpp-python")
    options = parser.parse_args()
    settings = ProblemSettings(
        grid=GgufGrid(type="Q8_0"), rows=ROWS, columns=COLUMNS, tokens=TOKENS, seed=0, dtype=torch.float32
    )
    problem = make_problem(settings)
    weight, statistics = problem.weight, problem.statistics
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("weight.npy", "importance.npy", "blocks.npy")]
        np.save(files[0], weight.numpy())
        np.save(files[1], statistics.importance.numpy())
        for name, block_type in BLOCK_TYPES.items():
            row_bytes = COLUMNS // block_type.block * block_type.nbytes
            run_worker(options.python, "matrix", *files, str(int(GGMLQuantizationType[name])), str(row_bytes))
            grid = GgufGrid(type=name)
            code, theirs = grid.restore((ROWS, COLUMNS), {"blocks": torch.from_numpy(np.load(files[2]))})
            ours = grid.fit(weight, statistics.importance)
            errors = {
                "ggml, importance matrix": theirs.decode(code),
                "mezzotint nearest": ours.decode(ours.encode(weight)),
                "mezzotint gptq": Gptq().round(problem.aim, ours, statistics).value,
            }
            row = {"type": name, "bits": grid.stored_bits((ROWS, COLUMNS)).total / (ROWS * COLUMNS)}
            row |= {what: h_error(weight, value, statistics.gram) for what, value in errors.items()}
            print(json.dumps(row))
            rows.append({**row, "rows": ROWS, "columns": COLUMNS, "tokens": TOKENS})
    RESULTS.write_text(json.dumps({"machine": machine(), "versions": versions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
