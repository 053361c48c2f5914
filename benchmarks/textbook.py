"""``python -m benchmarks.textbook --model DIR --text FILE``: a run against the float64 textbook of the tests.

Calibrates on the first half of the text and evaluates on the second, once for each group size; a row of differences is
appended to ``benchmarks/results/textbook.json``. The textbook (``tests/reference/textbook.py``) goes through the model
by itself; only the windows and the grids' scales and zero points are the run's.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM

import mezzotint
from benchmarks.__main__ import HERE, halves, machine, versions
from mezzotint.calibration import consecutive_windows, load_tokenizer, read_text
from mezzotint.core.contracts import QuantizedWeight
from mezzotint.jobs.output import Output
from mezzotint.jobs.run import quantize
from mezzotint.models import open_model
from mezzotint.planning.plan import make_plan
from mezzotint.recipes.request import CalibrationRequest, Request, resolve_recipe
from mezzotint.sweep.calibrate import calibration_windows

RESULTS = HERE / "results" / "textbook.json"
LIMITS = {"h_error": 1e-3, "kl_nats": 0.02}


def load_textbook() -> Any:
    """The module of the tests."""
    path = HERE.parent / "tests" / "reference" / "textbook.py"
    spec = util.spec_from_file_location("textbook", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["textbook"] = module
    spec.loader.exec_module(module)
    return module


def our_run(request: Request, out: Path) -> tuple[dict[str, float], dict[str, QuantizedWeight]]:
    """The h_error of every matrix, and its codes and grid."""
    kept: dict[str, QuantizedWeight] = {}
    put = Output.put

    def keep(self: Output, matrix: Any, weight: QuantizedWeight) -> None:
        kept[matrix.name] = weight
        put(self, matrix, weight)

    with mock.patch.object(Output, "put", keep):
        report = quantize(request, out)
    return {linear["name"]: linear["h_error"] for linear in report["linears"]}, kept


def textbook_run(
    request: Request, kept: Mapping[str, QuantizedWeight], evaluated: torch.Tensor
) -> tuple[dict[str, Any], float]:
    """The textbook's matrices and its divergence."""
    textbook = load_textbook()
    source = open_model(request.model)
    planned = make_plan(source, request)
    assert planned.calibration is not None
    fit, _ = calibration_windows(source, planned.calibration, request, lambda *_: None).split(seed=request.seed)
    grids = {
        name: textbook.Grid(
            scale=weight.grid.parameters["scale"].double().numpy(),
            zero_point=weight.grid.parameters["zero_point"].double().numpy(),
            group_size=weight.grid.affine.group_size,
            bits=int(weight.grid.grid.bits),
        )
        for name, weight in kept.items()
    }
    original, model = (AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float64) for _ in range(2))
    done = textbook.quantize(model.eval(), fit.tokens, grids)
    return done, textbook.kl_nats(original.eval(), model, evaluated)


def compare(model: Path, text: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as scratch:
        first, second = (Path(half) for half in halves(text, Path(scratch)).values())
        request = Request(
            model=model,
            recipe=resolve_recipe(
                "gptq", bits=float(settings["bits"]), settings={"grid.group_size": settings["group_size"]}
            ),
            engine="dense",
            calibration=CalibrationRequest(source=str(first), samples=settings["samples"], seqlen=settings["seqlen"]),
        )
        marks = [time.perf_counter()]
        h_errors, kept = our_run(request, Path(scratch) / "out")
        marks.append(time.perf_counter())
        sizes = {"seqlen": settings["eval_seqlen"], "windows": settings["eval_windows"]}
        kl = mezzotint.evaluate(Path(scratch) / "out", second, against=model, **sizes).kl_nats
        assert kl is not None
        evaluated = consecutive_windows(read_text(str(second)), load_tokenizer(model), **sizes)
        marks.append(time.perf_counter())
        done, textbook_kl = textbook_run(request, kept, evaluated.tokens)
        marks.append(time.perf_counter())
    differences = {name: h_errors[name] / result.h_error - 1 for name, result in done.items()}
    other = {
        name: int((~torch.isclose(weight.dense(torch.float64), torch.from_numpy(done[name].weight), atol=0)).sum())
        for name, weight in kept.items()
    }
    worst = max(differences, key=lambda name: abs(differences[name]))
    return {
        "h_error": {
            "largest_relative_difference": abs(differences[worst]),
            "where": worst,
            "relative_differences": differences,
        },
        "values_that_differ": sum(other.values()),
        "kl_nats": {"mezzotint": kl, "textbook": textbook_kl, "relative_difference": kl / textbook_kl - 1},
        "seconds": {"mezzotint": marks[1] - marks[0], "textbook": marks[3] - marks[2]},
    }


def main() -> None:
    """Compare and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-sizes", default="channel,32", help="numbers and `channel`, with commas")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40, help="of as many tokens, for the divergence")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    missed = False
    for group_size in options.group_sizes.split(","):
        settings = {
            "recipe": "gptq",
            "bits": options.bits,
            "group_size": None if group_size == "channel" else int(group_size),
            "text": options.text.name,
            "samples": options.samples,
            "seqlen": options.seqlen,
            "eval_windows": options.windows,
            "eval_seqlen": options.seqlen,
        }
        row = compare(options.model, options.text, settings)
        results.append(
            {"model": options.model.name, "settings": settings, **row, "versions": versions(), "machine": machine()}
        )
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        largest, kl = row["h_error"]["largest_relative_difference"], row["kl_nats"]
        missed |= largest > LIMITS["h_error"] or abs(kl["relative_difference"]) > LIMITS["kl_nats"]
        sys.stdout.write(
            f"{options.model.name}, {options.bits} bits, group size {group_size}: h_error differs by {largest:.1e} at "
            f"most, {row['values_that_differ']} values differ, KL {kl['mezzotint']:.6f} and {kl['textbook']:.6f}\n"
        )
        sys.stdout.flush()
    if missed:
        raise SystemExit(f"beyond the limits {LIMITS}")


if __name__ == "__main__":
    main()
