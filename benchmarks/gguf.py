"""``python -m benchmarks.gguf --model DIR --calibration FILE --text FILE --python PYTHON --work DIR``: GGUF files.

llama.cpp's own quantizer gets the mean squares of all inputs of the full-precision model, on the same calibration
windows, as its importance matrix. Our files have the type of every tensor from its file of the same name, so that the
sizes are equal but for metadata; only how scales and codes are chosen differs. llama.cpp runs them all on held-out
text; PYTHON is one that has llama-cpp-python. Rows are appended to ``benchmarks/results/gguf.json``.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.__main__ import HERE, machine, versions
from mezzotint.blockwise.source import open_original
from mezzotint.calibration import consecutive_windows, load_tokenizer, read_text
from mezzotint.formats.gguf import format as gguf
from mezzotint.formats.gguf import model as gguf_model
from mezzotint.formats.gguf.file import GgufFile
from mezzotint.grids.gguf.types import BLOCK_TYPES
from mezzotint.jobs.run import quantize
from mezzotint.models import Source
from mezzotint.planning.plan import make_plan
from mezzotint.recipes.recipe import Rule
from mezzotint.recipes.request import CalibrationRequest, Request, resolve_recipe
from mezzotint.sweep.calibrate import calibration_windows

RESULTS = HERE / "results" / "gguf.json"
WORKER = HERE / "llama_cpp_worker.py"
FILE_TYPES = {"Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}  # llama_ftype


def importance(source: Source, request: Request, names: dict[str, str]) -> dict[str, np.ndarray]:
    """Mean square of every input of every linear, by the name of its tensor in a GGUF file."""
    planned = make_plan(source, request)
    assert planned.calibration is not None
    windows, _ = calibration_windows(source, planned.calibration, request, lambda *_: None).split(seed=request.seed)
    model = AutoModelForCausalLM.from_pretrained(str(source.folder), dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        squares = x.detach().double().flatten(0, -2).square().sum(0)
        sums[name] = sums.get(name, 0) + squares

    for module, linear in model.named_modules():
        name = f"{module}.weight"
        if isinstance(linear, torch.nn.Linear) and name in names:
            linear.register_forward_pre_hook(lambda _, inputs, name=name: add(names[name], inputs[0]))
    with torch.no_grad():
        for row in windows.tokens:
            model(row[None])
    count = windows.tokens.numel()
    return {name: (total / count).float().numpy() for name, total in sums.items()}


def rules_of(path: Path, names: dict[str, str]) -> tuple[Rule, ...]:
    """The types of a file as rules of a recipe."""
    tensors = GgufFile.open(path, verify=False).tensors
    return tuple(
        Rule(match=name.removesuffix(".weight"), set={"grid.type": tensors[new].type})
        for name, new in names.items()
        if new.startswith("blk.") and tensors[new].type in BLOCK_TYPES
    )


def run_worker(python: str, *arguments: str) -> str:
    """What `llama_cpp_worker.py` prints."""
    done = subprocess.run([python, str(WORKER), *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def main() -> None:
    """Make the files, compare them, and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--python", required=True, help="python that has llama-cpp-python")
    parser.add_argument("--work", type=Path, required=True, help="folder for the files")
    parser.add_argument("--name", help="of the model in the results")
    parser.add_argument("--files", nargs="+", default=["Q2_K", "Q3_K_M", "Q4_K_M"])
    parser.add_argument("--recipes", nargs="+", default=["loaq-gptq"])
    parser.add_argument("--settings", nargs="*", default=[], help="dotted settings of every recipe, NAME=VALUE")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    settings = {name: json.loads(value) for name, value in (text.split("=", 1) for text in options.settings)}

    source = open_original(options.model)
    config = source.config.to_dict()
    names = gguf_model.tensor_names(gguf_model.architecture_of(config), config, list(source.checkpoint.tensors))
    calibration = CalibrationRequest(source=options.calibration, samples=options.samples, seqlen=options.seqlen)

    def request(recipe: str, rules: tuple[Rule, ...]) -> Request:
        chosen = resolve_recipe(recipe, settings={"grid.kind": "gguf", **settings}).with_rules(rules)
        return Request(model=options.model, recipe=chosen, engine="llama.cpp", calibration=calibration)

    dense, matrix = options.work / "dense.gguf", options.work / "importance.npz"
    if not dense.exists():
        gguf.export(options.model, dense, config, {}, tables=False)
        np.savez(matrix, **importance(source, request("gptq", ()), names))
    made: dict[str, dict[str, Any]] = {}
    for file in options.files:
        theirs = options.work / f"{file}.gguf"
        if not theirs.exists():
            run_worker(options.python, "quantize", str(dense), str(matrix), str(theirs), str(FILE_TYPES[file]))
        made[str(theirs)] = {"file": file, "quantizer": "llama.cpp, importance matrix"}
        for recipe in options.recipes:
            tag = "-".join([file, recipe, *options.settings]).replace("=", "_").replace('"', "")
            out = options.work / tag
            started = time.perf_counter()
            if not out.exists():
                quantize(request(recipe, rules_of(theirs, names)), out)
            made[str(out / gguf.FILE)] = {
                "file": file,
                "quantizer": f"mezzotint {recipe}",
                "settings": settings,
                "seconds": time.perf_counter() - started,
            }
    tokens = consecutive_windows(
        read_text(options.text),
        load_tokenizer(options.model),
        seqlen=options.length,
        windows=options.windows,
        source=options.text,
    ).tokens
    windows = options.work / "windows.npy"
    np.save(windows, tokens.numpy())
    output = run_worker(options.python, "compare", str(dense), str(windows), *made)
    found = json.loads(output.splitlines()[-1].removeprefix("RESULT "))
    protocol = {
        "model": options.name or options.model.name,
        "calibration": Path(options.calibration).name,
        "text": Path(options.text).name,
        "samples": options.samples,
        "seqlen": options.seqlen,
        "windows": options.windows,
        "length": options.length,
        "reference_perplexity": found[str(dense)]["perplexity"],
        "machine": machine(),
        "versions": versions(),
    }
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for path, what in made.items():
        rows.append({**what, **found[path], **protocol})
        print(json.dumps({**what, **found[path]}))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
