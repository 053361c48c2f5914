"""Make the demo model smaller, look at what it lost, and let it write a few words.

Run with ``make demo``. Works offline once the demo model's package has been fetched; writes into ``demo/``.
"""

import argparse
import logging
import os
import shutil
import time
from pathlib import Path

import torch
import transformers
from prepare_demo_model import prepare_demo_model
from rich.console import Console
from rich.table import Table

import mezzotint
from mezzotint.cli.tables import progress, size

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tests" / "data" / "tiny_text_heldout.txt"  # never used for calibration
PROMPT = "The three most important inventions in history are"
SEQLEN, WINDOWS = 512, 16


def weights_bytes(folder: Path) -> int:
    """Size of the weight files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def quantize(model: Path, out: Path, recipe: str, console: Console) -> float:
    """Quantize at 3 bits and give the seconds it took; an old result is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    with progress(console) as listener:
        mezzotint.quantize(model, recipe, out=out, bits=3, listener=listener)
    return time.perf_counter() - started


def write_words(folder: Path) -> str:
    """A few words of the model in a folder, through stock transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output[0], skip_special_tokens=True).replace("\n", " ")


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
    console = Console()
    original = folder / "smollm2"
    folder.mkdir(exist_ok=True)
    console.print("the demo model is SmolLM2-135M-Instruct; it is fetched once …")
    prepare_demo_model(original)

    table = Table(title="3 bits a weight; perplexity and KL on text that no calibration saw")
    for column in ("model", "bits/weight", "size", "perplexity", "KL, nats/token", "seconds to make"):
        table.add_column(column, justify="left" if column == "model" else "right")
    rows = []
    for recipe in ("rtn", "default"):
        out = folder / f"smollm2-3bit-{recipe}"
        console.print(f"quantizing with recipe {recipe!r} …")
        seconds = quantize(original, out, recipe, console)
        console.print("evaluating …")
        result = mezzotint.evaluate(out, TEXT, against=original, seqlen=SEQLEN, windows=WINDOWS)
        bits = mezzotint.plan(original, recipe, bits=3).bits_per_weight
        rows.append((recipe, bits, out, result, seconds))
    first = rows[0][3]
    table.add_row("original", "16", size(weights_bytes(original)), f"{first.reference_perplexity:.2f}", "0", "")
    for recipe, bits, out, result, seconds in rows:
        table.add_row(
            recipe,
            f"{bits:.2f}",
            size(weights_bytes(out)),
            f"{result.perplexity:.2f}",
            f"{result.kl_nats:.3f}",
            f"{seconds:.0f}",
        )
    console.print(table)
    for path in (original, rows[-1][2]):
        console.print(f"[bold]{path.name}[/bold] writes: {write_words(path)}", highlight=False)
    console.print(f"The result is in {rows[-1][2]}; look into it with: .venv/bin/mezzotint inspect {rows[-1][2]}")


if __name__ == "__main__":
    main()
