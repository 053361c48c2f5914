"""Architectures as llama.cpp has them: names and rows of tensors, and the metadata that runs them.

Facts: llama.cpp's conversion scripts and model loaders. Rows of q and k of its ``llama`` architecture are permuted,
because it turns neighbouring pairs where transformers turns the two halves of a head; Gemma's norms are stored with the
one that the model adds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from jaxtyping import Int
from torch import Tensor

from mezzotint.errors import FormatError

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One architecture.

    Attributes:
        arch: in the ``gguf`` package.
        permuted: rows of q and k are.
        norm_shift: added to the weights of norms.
        whole_heads: heads together are as wide as the model.
        sliding_every: with a sliding window, every so many blocks have none; None: no windows.
    """

    arch: MODEL_ARCH
    permuted: bool = False
    norm_shift: float = 0.0
    whole_heads: bool = False
    sliding_every: int | None = None

    @property
    def name(self) -> str:
        """In llama.cpp."""
        return MODEL_ARCH_NAMES[self.arch]


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(arch=MODEL_ARCH.LLAMA, permuted=True),
    "mistral": Architecture(arch=MODEL_ARCH.LLAMA, permuted=True),
    "qwen2": Architecture(arch=MODEL_ARCH.QWEN2, whole_heads=True),
    "qwen3": Architecture(arch=MODEL_ARCH.QWEN3),
    "gemma2": Architecture(arch=MODEL_ARCH.GEMMA2, norm_shift=1.0, sliding_every=2),
    "gemma3_text": Architecture(arch=MODEL_ARCH.GEMMA3, norm_shift=1.0, sliding_every=6),
    "phi3": Architecture(arch=MODEL_ARCH.PHI3),
}


def architecture_of(config: Config) -> Architecture:
    """The architecture of a model.

    Args:
        config: of transformers, as a dictionary.

    Raises:
        FormatError: llama.cpp has none, or would run this model otherwise than transformers.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise FormatError(
            f"GGUF files are written for {', '.join(ARCHITECTURES)}, not for model_type {kind!r}. Use --for dense and "
            "llama.cpp's own conversion."
        )
    found = ARCHITECTURES[kind]
    layers, every = config.get("layer_types"), found.sliding_every
    count = config["num_hidden_layers"]
    if every is None:
        wished = ["full_attention"] * count
    else:
        wished = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
    if layers is not None and config.get("sliding_window") and list(layers) != wished and kind != "mistral":
        raise FormatError(f"llama.cpp has a fixed pattern of sliding windows for {kind}; this model has another.")
    width, heads, head_dim = config.get("hidden_size"), config.get("num_attention_heads"), config.get("head_dim")
    if found.whole_heads and head_dim is not None and heads is not None and width != heads * head_dim:
        raise FormatError(
            f"heads of llama.cpp's {kind} are together as wide as the model; this one has heads of {head_dim}, not "
            f"{width} / {heads}."
        )
    scalar = config.get("query_pre_attn_scalar")
    if scalar is not None and scalar != head_dim:
        raise FormatError(
            f"llama.cpp scales attention of {kind} by the head width {head_dim}; this model has "
            f"query_pre_attn_scalar {scalar}."
        )
    rope = _rope(config).get("rope_type", "default")
    if rope not in ("default", "linear", "yarn", "llama3", "longrope"):
        raise FormatError(f"rotary embeddings of kind {rope!r} have no counterpart in GGUF metadata.")
    return found


def tensor_names(architecture: Architecture, config: Config, names: list[str]) -> dict[str, str]:
    """GGUF names by the checkpoint's; a tied head is left out, because llama.cpp takes the embedding.

    Raises:
        FormatError: a tensor has no place in llama.cpp's architecture.
    """
    known = get_tensor_name_map(architecture.arch, config["num_hidden_layers"])
    found = {}
    for name in names:
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        new = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise FormatError(f"tensor {name!r} has no place in llama.cpp's architecture {architecture.name!r}.")
        found[name] = new
    return found


def row_order(architecture: Architecture, config: Config, name: str, rows: int) -> Int[Tensor, " rows"] | None:
    """The rows of the checkpoint's tensor in the order of the file; None where it is the same.

    Each head's rows ``(2, head_dim / 2)`` become ``(head_dim / 2, 2)``.
    """
    kind = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if not architecture.permuted or kind not in ("q_proj", "k_proj"):
        return None
    heads = config["num_attention_heads" if kind == "q_proj" else "num_key_value_heads"]
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def describe_model(writer: GGUFWriter, architecture: Architecture, config: Config) -> None:
    """Add what llama.cpp must know to run the model."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    rope = _rope(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(
        int(head_dim * (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0))
    )
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture.sliding_every is not None:
        writer.add_sliding_window(config["sliding_window"])
        local = (config.get("rope_parameters") or {}).get("sliding_attention")
        if local:
            writer.add_rope_freq_base_swa(local["rope_theta"])
    elif architecture.arch is MODEL_ARCH.PHI3:
        writer.add_sliding_window(config.get("sliding_window") or 0)
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if config.get(key):
            add(config[key])
    _describe_scaling(writer, config, rope)


def _describe_scaling(writer: GGUFWriter, config: Config, rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    longest = config["max_position_embeddings"]
    trained = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or longest
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "longrope":
        scale = longest / trained
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(trained)) if scale > 1 else 1.0)
    if kind in ("yarn", "longrope") or config["model_type"] == "phi3":
        writer.add_rope_scaling_orig_ctx_len(trained)


def extra_tensors(config: Config) -> dict[str, Tensor]:
    """Factors of rotary frequencies that llama.cpp reads as tensors."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    if kind != "llama3":
        return {}
    # Llama 3.1: wavelengths beyond the trained context are stretched, short ones kept, those between interpolated
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelength = 2 * math.pi * rope["rope_theta"] ** exponent
    turns = rope["original_max_position_embeddings"] / wavelength
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).float()}


def _rope(config: Config) -> Mapping[str, Any]:
    """Rotary parameters of full attention."""
    found = config.get("rope_parameters") or {}
    return found.get("full_attention", found)
