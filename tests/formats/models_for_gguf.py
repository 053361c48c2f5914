"""Tiny random models of every architecture that GGUF files are written for, and their files."""

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from formats.llama import map_of, plan_of, write_folder
from mezzotint.core.contracts import QuantizedWeight
from mezzotint.formats.gguf.format import FILE, Gguf, stored_tensors
from mezzotint.grids.gguf.grid import GgufGrid

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny_llama"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 16, "tie_word_embeddings": True}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama tied": lambda: LlamaConfig(**SIZES | {"tie_word_embeddings": True}),
    "llama biases": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "llama 3 rope": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES | {"head_dim": 16}),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES | GEMMA),
    "gemma3": lambda: Gemma3TextConfig(**SIZES | GEMMA),
    "phi3": lambda: Phi3Config(**SIZES | {"num_attention_heads": 2}),
}


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases are constants otherwise
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" in name:
                parameter.mul_(10)
    return model


def write_file(model: PreTrainedModel, type_name: str, folder: Path) -> dict[str, QuantizedWeight]:
    """Every linear of the blocks rounded to nearest; gives the weights by matrix name."""
    form, grid = Gguf(), GgufGrid(type=type_name, range="error")
    weights = write_folder(model, lambda m: None if m.name == "lm_head" else grid, form, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    structure = map_of(model)
    plan = plan_of({name: weight.grid.grid for name, weight in weights.items()}, structure, form)
    size = form.finish(folder, model.config.to_dict(), plan, structure)
    assert size == (folder / FILE).stat().st_size
    assert not list(folder.glob("*.safetensors"))
    return weights


def refill(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with every value of the file."""
    found = stored_tensors(folder / FILE, model.config.to_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name].dense())
    return model
