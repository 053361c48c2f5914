"""``python -m benchmarks.growth --data DIR``: time and peak memory against the number of blocks and of tokens.

QEP with GPTQ on random weights in a small shape (`benchmarks/make_random_llama.py`), by one thread and within one
limit of memory. Each point is a process of its own; those that are in ``benchmarks/results/growth.json`` are not
measured again. ``python -m benchmarks.tables`` fits lines and draws ``docs/growth.svg``.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.__main__ import HERE, call, machine, versions
from benchmarks.make_random_llama import make_random_llama

RESULTS = HERE / "results" / "growth.json"
SEQLEN, MEMORY = 256, "1GiB"
POINTS = [{"blocks": b, "windows": 8} for b in (8, 16, 32)] + [{"blocks": 8, "windows": w} for w in (16, 32)]


def measured(point: dict[str, int], data: Path) -> dict[str, Any]:
    """One run: seconds of processor, peak memory, and what was promised."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_random_llama(model, preset="eighth", layers=point["blocks"])
        report = call(
            [
                "quantize", str(model), "--out", str(Path(folder) / "out"), "--recipe", "qep-gptq", "--bits", "4",
                "--calibration", str(data / "calibration" / "wikipedia.txt"), "--samples", str(point["windows"]),
                "--seqlen", str(SEQLEN), "--memory", MEMORY, "--device", "cpu",
            ],
            ranks=1,
        )  # fmt: skip
    kept = ("seconds", "cpu_seconds", "peak_rss_bytes", "promised_peak_memory_bytes")
    return {key: report[key] for key in kept} | {"load_average": os.getloadavg()[0]}


def main() -> None:
    """All points that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with calibration/")
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    for point in POINTS:
        settings = {**point, "seqlen": SEQLEN, "memory": MEMORY}
        if not any(row["settings"] == settings for row in rows):
            found = measured(point, options.data)
            rows.append({"settings": settings, **found, "versions": versions(), "machine": machine()})
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
