"""Quantize a small model in four ways, and print the size, the loss and one line of text of each.

Run with ``make demo``. It writes into ``demo/`` and needs the network once, for the model.
"""

import argparse
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from prepare_demo_model import prepare_demo_model
from rich.console import Console
from rich.table import Table

import mezzotint
from mezzotint.cli.page import comparison, write_page
from mezzotint.cli.tables import bar, progress, size
from mezzotint.report.results import keep_results

ROOT = Path(__file__).resolve().parent.parent
# The original model wrote both texts. Sampling a text once, not once per run, saves a minute.
CALIBRATION = ROOT / "tests" / "data" / "tiny_text.txt"
HELD_OUT = ROOT / "tests" / "data" / "tiny_text_heldout.txt"
SAMPLES, WINDOWS, SEQLEN = 16, 12, 512
# Fixed for all rows, and chosen by reading only what the original model writes.
PROMPT, TOKENS, REPETITION_PENALTY = "Bread is made from", 28, 1.1
RUNS: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("rtn", 4, {}),
    ("default", 4, {}),
    # the guard would quantize once more, with the same bits in every matrix, and keep the better result
    ("palette", 3.3, {"allocation.guard": False}),
    ("palette", 2.3, {"allocation.guard": False}),
)


def folder_bytes(folder: Path) -> int:
    """Size of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def quantize(model: Path, out: Path, run: tuple[str, float, dict[str, Any]], console: Console) -> tuple[float, float]:
    """Quantize into ``out``, which is replaced; gives the stored bits per weight and the seconds."""
    recipe, bits, settings = run
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    with progress(console) as listener:
        report = mezzotint.quantize(
            model, recipe, out=out, bits=bits, settings=settings, listener=listener,
            calibration=CALIBRATION, samples=SAMPLES, seqlen=SEQLEN,
        )  # fmt: skip
    return report["bits_per_weight"], time.perf_counter() - started


def evaluate(model: Path, original: Path, states: Path, console: Console) -> Any:
    """Perplexity and KL on held-out text; the result is also kept in the folder, for the HTML report."""
    with bar(console, "evaluating") as listener:
        result = mezzotint.evaluate(
            model, HELD_OUT, against=original, seqlen=SEQLEN, windows=WINDOWS, cache=states, progress=listener
        )
    keep_results(model, text=result, tasks=None, against=original.name)
    return result


def continuation(folder: Path) -> str:
    """One line that the model in a folder writes after the prompt, greedily."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, repetition_penalty=REPETITION_PENALTY, pad_token_id=0
        )
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    return " ".join(text.removeprefix(PROMPT).split())


def main() -> None:
    """The whole demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(os.path.relpath(ROOT / "demo")), help="where models are written"
    )
    folder = parser.parse_args().folder
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
    console = Console(highlight=False)
    original, states = folder / "smollm2", folder / "states"
    folder.mkdir(exist_ok=True)
    shutil.rmtree(states, ignore_errors=True)
    console.print("The model is SmolLM2-135M-Instruct. It is fetched once.")
    with console.status("preparing the model"):
        prepare_demo_model(original, lambda step: console.print(f"  {step}"))

    table = Table(title="perplexity and KL on text that was not used for calibration")
    for column in ("recipe", "stored bits", "folder", "KL, nats/token", "perplexity", "seconds"):
        table.add_column(column, justify="left" if column == "recipe" else "right", no_wrap=True)
    lines, made = [("original", continuation(original))], []
    for number, run in enumerate(RUNS, 1):
        name = f"{run[0]} --bits {run[1]:g}"
        console.print(f"Run {number} of {len(RUNS)}: --recipe {name}")
        made.append(folder / f"smollm2-{run[0]}-{run[1]:g}")
        stored, seconds = quantize(original, made[-1], run, console)
        result = evaluate(made[-1], original, states, console)
        if number == 1:
            before = f"{result.reference_perplexity:.2f}"
            table.add_row("original", "16", size(folder_bytes(original)), "0", before, "")
        figures = f"{result.kl_nats:.3f}", f"{result.perplexity:.2f}", f"{seconds:.0f}"
        table.add_row(name, f"{stored:.2f}", size(folder_bytes(made[-1])), *figures)
        lines.append((name, continuation(made[-1])))
    shutil.rmtree(states, ignore_errors=True)
    console.print(table)
    console.print(f'What each model writes after "{PROMPT}":')
    for name, line in lines:
        console.print(f"  [bold]{name}[/bold]: … {line}")
    page = folder / "report.html"
    write_page(page, comparison(*mezzotint.compare(made)))
    console.print(f"One folder in detail: .venv/bin/mezzotint inspect {made[2]}")
    console.print(f"Report of all four: {page}", soft_wrap=True)


if __name__ == "__main__":
    main()
