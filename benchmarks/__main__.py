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
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
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


def call(arguments: list[str], ranks: int | None = None) -> dict[str, Any]:
    """Run the command line and read the JSON on its last line; with ``ranks`` by so many processes of one thread."""
    launcher, environment = [], dict(os.environ)
    if ranks is not None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, *launcher, "-m", "mezzotint", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def call_here(arguments: list[str], ranks: int | None = None) -> dict[str, Any]:
    """The same without a process of its own: peak memory is not the row's."""
    assert ranks is None, "rows of one process have no ranks"
    from typer.testing import CliRunner

    from mezzotint.cli.app import app

    done = CliRunner().invoke(app, [*arguments, "--json"])
    if done.exit_code != 0:
        raise SystemExit(f"mezzotint {' '.join(arguments)} ended with {done.exit_code}:\n{done.output[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def quantize_arguments(row: dict[str, Any], suite: dict[str, Any], protocol: dict[str, Any]) -> list[str]:
    """The arguments of ``mezzotint quantize`` for a row, without model and output."""
    budget = ["--size", row["size"]] if "size" in row else ["--bits", str(row["bits"])]
    arguments = ["--recipe", row["recipe"], *budget, "--calibration", protocol["calibration"]]
    arguments += ["--samples", str(row.get("samples", protocol["samples"])), "--seqlen", str(protocol["seqlen"])]
    for setting in (*suite.get("common", ()), *row.get("set", ())):
        arguments += ["--set", setting]
    if "engine" in row:
        arguments += ["--for", row["engine"]]
    if "memory" in row:
        arguments += ["--memory", row["memory"]]
    return arguments


def run_row(
    model: Path, row: dict[str, Any], suite: dict[str, Any], protocol: dict[str, Any], cache: Path
) -> dict[str, Any]:
    """One row: quantize (several times if asked), evaluate on every text; ``cache`` keeps the original's states."""
    arguments = quantize_arguments(row, suite, protocol)
    shared = suite.get("one_process", False)
    run = call_here if shared else call
    kept = [key for key in (*KEPT, *suite.get("keep", ())) if not (shared and key == "peak_rss_bytes")]
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(row.get("repeat", 1)):
            out = Path(scratch) / str(repeat)
            before = os.getloadavg()[0]
            report = run(["quantize", str(model), "--out", str(out), *arguments], row.get("ranks"))
            runs.append({key: report[key] for key in kept} | {"times": report["times"]})
            if "ranks" in row:  # times say little where others compute too
                runs[-1] |= {"by_rank": report["by_rank"], "load_average": [before, os.getloadavg()[0]]}
            if "allocation" in report:
                found = report["allocation"]
                runs[-1]["allocation"] = {key: found[key] for key in ("chosen", "uniform", "gap", "kept")}
        result: dict[str, Any] = {"quantize": runs[0] if len(runs) == 1 else runs}
        if not suite.get("evaluate", True):
            return result
        sizes = ["--seqlen", str(protocol["eval_seqlen"]), "--windows", str(protocol["eval_windows"])]
        sizes += ["--precision", protocol.get("eval_precision", "float32")]
        compared = [*sizes, "--against", str(model), "--cache", str(cache)]
        if "text" in protocol:
            result["evaluate"] = run(["evaluate", str(out), "--text", protocol["text"], *compared])
        else:
            result["evaluate"] = {
                name: run(["evaluate", str(out), "--text", text, *compared]) for name, text in protocol["texts"].items()
            }
    return result


def halves(text: Path, folder: Path) -> dict[str, str]:
    """Files with the first and the second half of a text, cut at a line end."""
    whole = text.read_text(encoding="utf-8")
    middle = whole.index("\n", len(whole) // 2) + 1
    parts = {"first": whole[:middle], "second": whole[middle:]}
    for name, part in parts.items():
        (folder / f"{text.stem}-{name}.txt").write_text(part, encoding="utf-8")
    return {name: str(folder / f"{text.stem}-{name}.txt") for name in parts}


def halved(value: Any, folder: Path) -> Any:
    """A configuration with ``FILE#first`` and ``FILE#second`` replaced by files that hold these halves."""
    if isinstance(value, str) and value.endswith(("#first", "#second")):
        path, _, half = value.rpartition("#")
        return halves(Path(path), folder)[half]
    if isinstance(value, dict):
        return {key: halved(part, folder) for key, part in value.items()}
    return value


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
    suite = config["suites"][options.suite]
    name = options.protocol or suite["protocol"]
    path = HERE / "results" / (f"{options.suite}.json" if name == suite["protocol"] else f"{options.suite}-{name}.json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    with tempfile.TemporaryDirectory() as scratch:
        run_rows(options, config, name, results, path, scratch=Path(scratch))


def expanded(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows with lists in ``bits`` or ``grid`` stand for every combination; ``grid`` is a group size or "channel"."""
    for row in rows:
        bits = row["bits"] if isinstance(row.get("bits"), list) else [row.get("bits")]
        for b, grid in product(bits, row.get("grid", [None])):
            one = {**row, "bits": b}
            one = {key: value for key, value in one.items() if key != "grid" and value is not None}
            if grid is not None:
                size = "null" if grid == "channel" else grid
                one["set"] = [*row.get("set", []), f"grid.group_size={size}"]
            yield one


def run_rows(
    options: argparse.Namespace,
    config: dict[str, Any],
    name: str,
    results: list[dict[str, Any]],
    path: Path,
    *,
    scratch: Path,
) -> None:
    """Every row that is not among the results yet."""
    suite = config["suites"][options.suite]
    model = options.name or options.model.name
    names = {"data": str(options.data), "here": str(HERE)}
    protocol = halved(filled(config["protocols"][name], names), scratch)
    for row in expanded(suite["rows"]):
        settings = {
            "row": row,
            "common": suite.get("common", []),
            "protocol": config["protocols"][name],
            "protocol_name": name,
        }
        if any(result["settings"] == settings and result["model"] == model for result in results):
            continue
        measured = run_row(options.model, filled(row, names), suite, protocol, scratch / "states")
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
        sys.stdout.write(
            f"{row['name']} {row.get('size') or row['bits']} {row.get('set', '')}: {json.dumps(shown)[:300]}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
