#!/usr/bin/env python
"""Make a model folder with random bf16 weights in the shape of a large Llama, for timings and memory tests.

    python benchmarks/make_random_llama.py OUT [--layers 32] [--preset llama-2-7b]

Matrices are normal with standard deviation 0.02, norms are ones. Drawing 6.7 billion normal numbers would take
minutes, so one pool of them is drawn and each tensor is a run of the pool, around its end if need be, from a
start of its own. The length of the pool is prime: no two rows of a matrix are then equal, and where rows share
numbers, these stand in different columns. The process needs below 400 MB, whatever the size of the model.

The tokenizer is the one of ``tests/data/tiny_llama``; it knows fewer tokens than the model has rows for.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

PRESETS: dict[str, dict[str, int | float]] = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "quarter": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "eighth": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
}
TOKENIZER = Path(__file__).resolve().parent.parent / "tests" / "data" / "tiny_llama"
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
POOL_LENGTH = 2**24 + 43  # a prime
DEVIATION = 0.02
ITEM_BYTES = 2  # of one bf16
SHARD_BYTES = 5 * 10**9
SEED = 1234


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write: its name and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * ITEM_BYTES


def model_config(preset: str, layers: int | None) -> dict[str, object]:
    """The contents of ``config.json``."""
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **SPECIAL_TOKENS,
        **PRESETS[preset],
    }
    if layers is not None:
        config["num_hidden_layers"] = layers
    return config


def entries(config: dict[str, object]) -> Iterator[Entry]:
    """The tensors of a Llama, in the order of its forward pass."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    values = config["num_key_value_heads"] * config["head_dim"]
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (values, hidden),
        "self_attn.v_proj": (values, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    yield Entry("model.embed_tokens.weight", (vocabulary, hidden))
    for layer in range(config["num_hidden_layers"]):
        for name, shape in block.items():
            yield Entry(f"model.layers.{layer}.{name}.weight", shape)
    yield Entry("model.norm.weight", (hidden,))
    yield Entry("lm_head.weight", (vocabulary, hidden))


def shards(tensors: list[Entry]) -> list[list[Entry]]:
    """Cut the list into runs of at most ``SHARD_BYTES``."""
    runs: list[list[Entry]] = [[]]
    filled = 0
    for tensor in tensors:
        if runs[-1] and filled + tensor.size > SHARD_BYTES:
            runs.append([])
            filled = 0
        runs[-1].append(tensor)
        filled += tensor.size
    return runs


def header(tensors: list[Entry]) -> bytes:
    """The head of a safetensors file: length (8 bytes, little endian), then JSON padded to a multiple of 8."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        fields[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bf16_bytes(values: torch.Tensor) -> memoryview:
    """The bytes of ``values`` in bf16."""
    return memoryview(values.to(torch.bfloat16).view(torch.uint8).numpy())


def write_tensor(file: BinaryIO, tensor: Entry, pool: memoryview, start: int) -> None:
    """Write ones for a norm, else the run of ``pool`` that begins at byte ``start``."""
    if len(tensor.shape) == 1:
        file.write(bf16_bytes(torch.ones(tensor.shape)))
        return
    left = tensor.size
    while left:
        piece = pool[start : start + left]
        file.write(piece)
        left -= len(piece)
        start = 0


def write_weights(folder: Path, tensors: list[Entry], seed: int) -> None:
    """Write the shards and their index into ``folder``."""
    generator = torch.Generator().manual_seed(seed)
    pool = bf16_bytes(torch.randn(POOL_LENGTH, generator=generator) * DEVIATION)
    starts = random.Random(seed)
    runs = shards(tensors)
    places: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        name = f"model-{number:05}-of-{len(runs):05}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(header(run))
            for tensor in run:
                write_tensor(file, tensor, pool, starts.randrange(POOL_LENGTH) * ITEM_BYTES)
                places[tensor.name] = name
    index = {"metadata": {"total_size": sum(tensor.size for tensor in tensors)}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_random_llama(target: Path, *, preset: str, layers: int | None = None, seed: int = SEED) -> int:
    """Write the folder ``target``, which must not exist yet.

    Returns:
        Bytes of all weights.

    Raises:
        FileExistsError: ``target`` exists.
        OSError: the disk has too little room.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists. Remove it or choose another folder.")
    config = model_config(preset, layers)
    tensors = list(entries(config))
    size = sum(tensor.size for tensor in tensors)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < size:
        partial.rmdir()
        raise OSError(
            f"the model takes {size / 1e9:.1f} GB, {target.parent} has {free / 1e9:.1f} GB free; use --layers."
        )
    write_weights(partial, tensors, seed)
    write_json(partial / "config.json", config)
    write_json(partial / "generation_config.json", SPECIAL_TOKENS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, partial)
    partial.replace(target)
    return size


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make a Llama folder with random bf16 weights.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="number of blocks (default: the preset's)")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    if arguments.layers is not None and arguments.layers < 1:
        parser.error(f"--layers must be at least 1, not {arguments.layers}")
    start = time.monotonic()
    try:
        size = make_random_llama(arguments.out, preset=arguments.preset, layers=arguments.layers, seed=arguments.seed)
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{arguments.out}: {size / 1e9:.2f} GB in {time.monotonic() - start:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
