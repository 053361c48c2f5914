"""``python -m benchmarks.peers --model DIR --data DIR [--only PEER]``: mezzotint beside other quantizers.

Every row is one quantization in a process of its own, by a peer in its own environment or by mezzotint, and one
evaluation of the dense weights it made, the same for all. Peers get the token windows that mezzotint calibrates on.
A row whose quantizer fails is a row with the reason. Rows are appended to ``benchmarks/results/peers.json``; those
that are there are not run again, so delete a row to repeat it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.__main__ import HERE as BENCHMARKS
from benchmarks.__main__ import KEPT, call, filled, machine, versions
from mezzotint.blockwise.source import open_original
from mezzotint.planning.plan import make_plan
from mezzotint.recipes.request import CalibrationRequest, Request, resolve_recipe
from mezzotint.sweep.calibrate import calibration_windows

HERE = Path(__file__).resolve().parent
RESULTS = BENCHMARKS / "results" / "peers.json"
ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mezzotint" / "peers"
OURS = "mezzotint"
TILES = "tiles"  # in place of a group size: the trellis has none
MESSAGE_CHARACTERS = 300


class FailedError(Exception):
    """A quantizer did not do its work; the message says why."""


def expanded(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What identifies each row: its peer, method, bits and settings."""
    for bits in config["bits"]:
        for row in config["rows"]:
            one = {"peer": row["peer"], "method": row["method"], "bits": bits, "settings": row.get("settings", {})}
            one["group_size"] = row.get("group_size", config["group_size"])
            if "stored" in row:
                one["stored"] = row["stored"][str(bits)]
            yield one


def reason(output: str) -> str:
    """The last line of what a process said, or the last that names an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0] or line.startswith("Killed")]
    return (named or lines or ["it said nothing"])[-1][:MESSAGE_CHARACTERS]


def finished(command: list[str], limit_seconds: float, folder: Path | None = None) -> str:
    """Standard output of a process that has one thread for its mathematics and asks no hub.

    Args:
        command: its arguments.
        limit_seconds: of processor, for the message: workers hold themselves to it.
        folder: where it runs; some peers leave logs there.

    Raises:
        FailedError: it ended with an error, or was cut.
    """
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **settings}, cwd=folder
    )
    if done.returncode == -signal.SIGXCPU:
        raise FailedError(f"cut: it took longer than {limit_seconds} seconds of processor")
    if done.returncode != 0:
        raise FailedError(f"ended with {done.returncode}: {reason(done.stderr)}")
    return done.stdout


def by_peer(options: argparse.Namespace, row: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """What a worker hands over."""
    python = options.environments.absolute() / row["peer"] / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{row['peer']} has no environment at {python}. Make it: make peers DATA=FOLDER")
    scratch = Path(job["out"]).parent
    asked = scratch / "job.json"
    asked.write_text(json.dumps(job), encoding="utf-8")
    worker = HERE / "workers" / f"{row['peer'].replace('-', '_')}_worker.py"
    output = finished([str(python), str(worker), str(asked)], job["limit_seconds"], scratch)
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    made = json.loads(lines[-1].removeprefix("RESULT "))
    if made["weights"] != job["weights"]:
        raise FailedError(f"it quantized {made['weights']} weights of {job['weights']}")
    return made


def by_us(row: dict[str, Any], job: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    """The same of our own command line: packed as the recipe usually is, then unpacked, which is not timed."""
    command = [sys.executable, "-m", "mezzotint", "quantize", job["model"], "--out", job["packed"], "--device", "cpu"]
    command += ["--recipe", row["method"], "--bits", str(row.get("stored", row["bits"]))]
    command += ["--calibration", protocol["calibration"], "--samples", str(protocol["samples"])]
    command += ["--seqlen", str(protocol["seqlen"]), "--json"]
    if row["group_size"] != TILES:
        command += ["--set", f"grid.group_size={row['group_size']}"]
    for name, value in row["settings"].items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    report = json.loads(finished(command, job["limit_seconds"]).splitlines()[-1])
    call(["convert", job["packed"], "--out", job["out"], "--format", "dense"])
    return {key: report[key] for key in KEPT} | {"weights": job["weights"], "versions": versions()}


def measured(
    options: argparse.Namespace,
    config: dict[str, Any],
    protocol: dict[str, Any],
    row: dict[str, Any],
    handed: dict[str, Any],
) -> dict[str, Any]:
    """One row: what it cost and how far the model is from the original, or why there is none.

    ``handed`` is what `hand_over` gave.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        out = scratch / "dense"
        job = {**row, **handed, "model": str(options.model.absolute()), "out": str(out)}
        job |= {"packed": str(scratch / "packed"), "limit_seconds": config["limit_seconds"]}
        before = os.getloadavg()[0]
        try:
            made = by_us(row, job, protocol) if row["peer"] == OURS else by_peer(options, row, job)
        except FailedError as error:
            return {"status": "failed", "message": str(error).replace(folder, "")}
        load = [before, os.getloadavg()[0]]
        arguments = ["evaluate", str(out), "--text", protocol["text"], "--against", str(options.model)]
        arguments += ["--seqlen", str(protocol["eval_seqlen"]), "--windows", str(protocol["eval_windows"])]
        arguments += ["--precision", config["eval_precision"], "--cache", str(options.cache)]
        return {"status": "done", "quantize": made, "load_average": load, "evaluate": call(arguments)}


def hand_over(model: Path, protocol: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What all peers get alike: a file with the calibration windows, and how many weights to quantize.

    The windows are those that mezzotint calibrates on, ``[windows, seqlen]`` int64.
    """
    source = open_original(model)
    calibration = CalibrationRequest(
        source=protocol["calibration"], samples=protocol["samples"], seqlen=protocol["seqlen"]
    )
    request = Request(model=model, recipe=resolve_recipe("gptq"), engine="dense", calibration=calibration)
    planned = make_plan(source, request)
    assert planned.calibration is not None, "gptq calibrates"
    tokens = calibration_windows(source, planned.calibration, request, lambda *_: None).tokens
    np.save(folder / "windows.npy", tokens.numpy())
    return {"tokens": str(folder / "windows.npy"), "weights": planned.weights}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results, none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def append(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows with one more, read again first: another run may have appended to the file meanwhile."""
    results = [*rows_of(path), result]
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def main() -> None:
    """Run the rows that are not there yet."""
    config = tomllib.loads((HERE / "peers.toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with calibration/ and wikitext2/")
    parser.add_argument("--name", help="of the model in the results; its folder's if left out")
    parser.add_argument("--only", nargs="+", choices=sorted({row["peer"] for row in config["rows"]}))
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--bits", nargs="+", type=int, help="only these")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="folder with one environment a peer")
    parser.add_argument("--cache", type=Path, help="folder that keeps the original's states")
    options = parser.parse_args()
    model = options.name or options.model.name
    suites = tomllib.loads((BENCHMARKS / "suites.toml").read_text(encoding="utf-8"))
    described = suites["protocols"][config["protocol"]]
    protocol = filled(described, {"data": str(options.data)})
    results = rows_of(RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        handed = hand_over(options.model, protocol, Path(folder))
        options.cache = options.cache or Path(folder) / "states"
        for row in expanded(config):
            chosen = {"peer": options.only, "method": options.methods, "bits": options.bits}
            if any(allowed is not None and row[key] not in allowed for key, allowed in chosen.items()):
                continue
            settings = {"row": row, "protocol": described, "eval_precision": config["eval_precision"]}
            if any(result["settings"] == settings and result["model"] == model for result in results):
                continue
            found = measured(options, config, protocol, row, handed)
            results = append(RESULTS, {"model": model, "settings": settings, **found, "machine": machine()})
            print(json.dumps({**row, **{key: found.get(key) for key in ("message", "quantize", "evaluate")}})[:900])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
