"""``python -m benchmarks.latency --model DIR --work FOLDER``: predicted against measured time of a token.

Five allocations of bits, rounded to nearest (values do not matter), are loaded by transformers and generate greedily.
The prediction is that of ``--tokens-per-second``: a constant, and every matrix by itself. Both are measured in turns,
so that another load on the machine meets both. The result is ``benchmarks/results/latency.json``.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import mezzotint
from benchmarks.__main__ import HERE, machine, versions
from benchmarks.decoding import PROMPT, seconds_per_token
from mezzotint.budgeting.latency import Latency
from mezzotint.budgeting.pricing import labelled
from mezzotint.engines.packed import QuantizedLinear
from mezzotint.models import Source, open_model

RESULT = HERE / "results" / "latency.json"
_INTEGERS = {"kind": "uniform", "range": "error", "group_size": 64}
_TRELLIS = {"kind": "trellis"}
_PARTS = ("*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", "*.gate_proj", "*.up_proj", "*.down_proj")


def _rules(bits: list[float]) -> list[dict[str, Any]]:
    """Bits by kind of matrix."""
    return [{"match": part, "set": {"grid.bits": b}} for part, b in zip(_PARTS, bits, strict=True)]


ALLOCATIONS: dict[str, dict[str, Any]] = {
    "integers, 4 bits": {"grid": {**_INTEGERS, "bits": 4}},
    "integers, 2 to 8 bits": {"grid": {**_INTEGERS, "bits": 4}, "rules": _rules([8, 8, 6, 4, 3, 3, 2])},
    "trellis, 2 bits": {"grid": {**_TRELLIS, "bits": 2.0}, "transform": {"kind": "hadamard"}},
    "trellis, 4 bits": {"grid": {**_TRELLIS, "bits": 4.0}, "transform": {"kind": "hadamard"}},
    "trellis, 2 to 5 bits": {
        "grid": {**_TRELLIS, "bits": 3.0},
        "transform": {"kind": "hadamard"},
        "rules": _rules([3.5, 3.75, 5.0, 4.25, 2.75, 2.5, 3.25]),
    },
}


MIDDLE = {"uniform": 5, "trellis": 3.5}  # bits of the allocation that the constant is measured with


def predicted(source: Source, packed: Any) -> tuple[float, float]:
    """Seconds of a token of a packed model, and how many of them are constant; nothing is known from before."""
    schemes = {name: m.scheme for name, m in packed.named_modules() if isinstance(m, QuantizedLinear)}
    middle = {
        name: replace(scheme, grid=labelled(scheme.grid, MIDDLE[scheme.grid.kind])) for name, scheme in schemes.items()
    }
    with tempfile.TemporaryDirectory() as fresh:
        latency = Latency(sum(s.shape[0] * s.shape[1] for s in schemes.values()), Path(fresh) / "latency.json")
        constant = latency.constant(source, middle)
        return constant + sum(latency.seconds(s.shape, s.grid, s.transform) for s in schemes.values()), constant


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the folders are, or are made")
    parser.add_argument("--name", help="of the model in the results; its folder's if left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--make", action="store_true", help="make the folders and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for place, (name, parts) in enumerate(ALLOCATIONS.items()):
        out = options.work / str(place)
        if not out.exists():
            recipe = mezzotint.Recipe(name=name, rounding={"kind": "nearest"}, **parts)
            mezzotint.quantize(options.model, recipe, out=out, engine="mezzotint")
    if options.make:
        return
    tokens = AutoTokenizer.from_pretrained(options.model)(PROMPT, return_tensors="pt").input_ids
    source = open_model(options.model)
    rows = []
    for place, name in enumerate(ALLOCATIONS):
        folder = options.work / str(place)
        report = json.loads((folder / "mezzotint.json").read_text(encoding="utf-8"))
        packed = mezzotint.load(folder, dtype=torch.bfloat16).eval()
        seconds_per_token(packed, tokens, 4)
        pairs = []
        for _ in range(options.repeat):
            whole, constant = predicted(source, packed)
            pairs.append((whole, constant, seconds_per_token(packed, tokens, options.tokens)))
        found = [1e3 * statistics.median(part) for part in zip(*pairs, strict=True)]
        rows.append(
            {
                "allocation": name,
                "bits_per_weight": report["bits_per_weight"],
                "predicted_ms": found[0],
                "constant_ms": found[1],
                "measured_ms": found[2],
                "ratio": statistics.median(whole / real for whole, _, real in pairs),
            }
        )
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    result = {
        "model": options.name or options.model.name,
        "settings": {"threads": options.threads, "tokens": options.tokens, "repeat": options.repeat},
        "load_average": os.getloadavg()[0],
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
