"""Calibrate and evaluate on one's own records, without using any twice, and tell two recipes apart.

Records are objects, one a line: ``{"text": "..."}``, or chats, ``{"messages": [...]}``, rendered by the tokenizer's
template.

    python examples/own_data.py MODEL RECORDS.jsonl OUT
"""

import random
import sys
from pathlib import Path

import mezzotint
from mezzotint.report.compare import compare
from mezzotint.report.results import keep_results

model, records, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
out.mkdir(parents=True, exist_ok=True)

# One half to calibrate on, the other to measure on: a figure on calibration text flatters.
lines = records.read_text(encoding="utf-8").splitlines()
random.Random(0).shuffle(lines)  # noqa: S311 - no secret
halves = out / "calibration.jsonl", out / "evaluation.jsonl"
for path, half in zip(halves, (lines[::2], lines[1::2]), strict=True):
    path.write_text("\n".join(half) + "\n", encoding="utf-8")

folders = [out / "rtn", out / "gptq"]
for folder in folders:
    options = {"bits": 3, "calibration": halves[0], "samples": 32, "seqlen": 128}
    mezzotint.quantize(model, folder.name, out=folder, **options)
    result = mezzotint.evaluate(folder, halves[1], against=model, seqlen=64, windows=8, cache=out / "states")
    keep_results(folder, text=result, against=Path(model).name)
    print(f"{folder.name:5} KL {result.kl_nats:.4f} ± {result.kl_stderr:.4f}")

# On the same windows: the difference has a narrower interval than the two figures suggest.
for pair in compare(folders)[1]:
    d = pair.difference
    told = "significant" if d.clear else "could be chance"
    print(f"{pair.measure}, {pair.first} minus {pair.second}: {d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}], {told}")
