"""``python -m benchmarks.decoding --model DIR --packed DIR``: generation token by token, packed against bfloat16.

Both models are loaded by transformers and generate greedily from the same prompt, in turns in one process, so that
their ratio holds on a busy machine too. The products' own share is the time inside the kernels, from a profile of one
more run. Rows are appended to ``benchmarks/results/decoding.json``.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mezzotint
from benchmarks.__main__ import HERE, machine, versions

RESULTS = HERE / "results" / "decoding.json"
PROMPT = "The history of printing begins with"


def seconds_per_token(model: Any, tokens: torch.Tensor, count: int) -> float:
    """Of one greedy generation."""
    started = time.perf_counter()
    with torch.no_grad():
        model.generate(tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return (time.perf_counter() - started) / count


def share_of_products(model: Any, tokens: torch.Tensor, count: int) -> float:
    """Of the time of a generation, what is spent in the fused products."""
    profile = cProfile.Profile()
    profile.enable()
    seconds_per_token(model, tokens, count)
    profile.disable()
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    whole = sum(own for _, _, own, _, _ in stats.values())
    kernels = sum(
        all_ for (_, _, name), (_, _, _, all_, _) in stats.items() if name in ("trellis_matmul", "packed_matmul")
    )
    return kernels / whole


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--packed", type=Path, required=True)
    parser.add_argument("--name", help="of the model in the results; its folder's if left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = AutoTokenizer.from_pretrained(options.model)(PROMPT, return_tensors="pt").input_ids
    models = {
        "bfloat16": AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval(),
        "packed": mezzotint.load(options.packed, dtype=torch.bfloat16).eval(),
    }
    runs: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        seconds_per_token(model, tokens, 4)
    for _ in range(options.repeat):
        for name, model in models.items():
            runs[name].append(seconds_per_token(model, tokens, options.tokens))
    ratios = [slow / fast for slow, fast in zip(runs["bfloat16"], runs["packed"], strict=True)]
    report = json.loads((options.packed / "mezzotint.json").read_text(encoding="utf-8"))
    row = {
        "model": options.name or options.model.name,
        "settings": {
            "recipe": report["recipe"]["name"],
            "bits_per_weight": report["bits_per_weight"],
            "threads": options.threads,
            "tokens": options.tokens,
        },
        "milliseconds_per_token": {name: 1e3 * statistics.median(times) for name, times in runs.items()},
        "times_faster": statistics.median(ratios),
        "share_of_products": share_of_products(models["packed"], tokens, options.tokens),
        "versions": versions(),
        "machine": machine(),
    }
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    results.append(row)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(row["milliseconds_per_token"]) + f" {row['times_faster']:.2f} times faster\n")


if __name__ == "__main__":
    main()
