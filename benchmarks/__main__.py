"""``python -m benchmarks SUITE --model DIR --data DIR``: run the rows of a suite that are not there yet.

Results are appended to ``benchmarks/results/SUITE.json``, a list with one object a row, so that a suite that was
interrupted continues where it stopped. Each row runs in processes of its own: peak memory is the process's own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KEPT = (
    "seconds", "cpu_seconds", "peak_rss_bytes", "output_bytes", "bits_per_weight", "bits_per_weight_without_side_data",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """The machine, in words that hold elsewhere."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {"processor": model, "cores": os.cpu_count()}


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    return {name: version(name) for name in ("mezzotint", "torch", "transformers", "numpy")}


def call(arguments: list[str]) -> dict[str, Any]:
    """Run the command line and read the JSON on its last line."""
    command = [sys.executable, "-m", "mezzotint", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def quantize_arguments(row: dict[str, Any], suite: dict[str, Any], protocol: dict[str, Any]) -> list[str]:
    """The arguments of ``mezzotint quantize`` for a row, without model and output."""
    arguments = ["--recipe", row["recipe"], "--bits", str(row["bits"]), "--calibration", protocol["calibration"]]
    arguments += ["--samples", str(row.get("samples", protocol["samples"])), "--seqlen", str(protocol["seqlen"])]
    for setting in (*suite.get("common", ()), *row.get("set", ())):
        arguments += ["--set", setting]
    if "memory" in row:
        arguments += ["--memory", row["memory"]]
    return arguments


def run_row(model: Path, row: dict[str, Any], suite: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    """One row: quantize (several times if asked), evaluate."""
    arguments = quantize_arguments(row, suite, protocol)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(row.get("repeat", 1)):
            out = Path(scratch) / str(repeat)
            report = call(["quantize", str(model), "--out", str(out), *arguments])
            runs.append({key: report[key] for key in KEPT} | {"times": report["times"]})
        result: dict[str, Any] = {"quantize": runs[0] if len(runs) == 1 else runs}
        if suite.get("evaluate", True):
            text = ["--text", protocol["text"], "--against", str(model)]
            sizes = ["--seqlen", str(protocol["eval_seqlen"]), "--windows", str(protocol["eval_windows"])]
            result["evaluate"] = call(["evaluate", str(out), *text, *sizes])
    return result


def filled(value: Any, names: dict[str, str]) -> Any:
    """A configuration with its placeholders replaced."""
    if isinstance(value, str):
        return value.format(**names) if "{" in value else value
    if isinstance(value, list):
        return [filled(part, names) for part in value]
    if isinstance(value, dict):
        return {key: filled(part, names) for key, part in value.items()}
    return value


def main() -> None:
    """Run a suite."""
    config = tomllib.loads((HERE / "suites.toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(config["suites"]))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with calibration/ and wikitext2/")
    parser.add_argument("--name", help="of the model in the results; its folder's if left out")
    parser.add_argument("--protocol", choices=sorted(config["protocols"]))
    options = parser.parse_args()
    model = options.name or options.model.name
    names = {"data": str(options.data), "here": str(HERE)}
    suite = config["suites"][options.suite]
    name = options.protocol or suite["protocol"]
    path = HERE / "results" / (f"{options.suite}.json" if name == suite["protocol"] else f"{options.suite}-{name}.json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for row in suite["rows"]:
        settings = {
            "row": row,
            "common": suite.get("common", []),
            "protocol": config["protocols"][name],
            "protocol_name": name,
        }
        if any(result["settings"] == settings and result["model"] == model for result in results):
            continue
        measured = run_row(options.model, filled(row, names), suite, filled(config["protocols"][name], names))
        results.append(
            {
                "model": model,
                "settings": settings,
                **measured,
                "versions": versions(),
                "machine": machine(),
            }
        )
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        shown = measured.get("evaluate", measured["quantize"])
        sys.stdout.write(f"{row['name']} {row['bits']} bits: {json.dumps(shown)[:300]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
