"""Tiny random models of every architecture family, complete with weights and tokenizer.

>>> sorted(TINY)[:3]
['falcon_multi_query', 'falcon_new_decoder', 'gemma2']
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from mezzotint.models.skeleton import quiet

VOCABULARY = 320
CONTEXT = 128
PAD, BOS, EOS = 0, 1, 2
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}  # in the order of their ids

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
UNGROUPED = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
SLIDING = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

TINY: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "mistral": lambda: MistralConfig(**{**COMMON, "sliding_window": 8, "head_dim": 32}),
    "qwen2": lambda: Qwen2Config(**{**COMMON, "tie_word_embeddings": True}),
    "qwen3": lambda: Qwen3Config(**{**COMMON, "head_dim": 32}),
    "gemma2": lambda: Gemma2Config(**{**COMMON, **SLIDING, "query_pre_attn_scalar": 16}),
    "gemma3": lambda: Gemma3TextConfig(**{**COMMON, **SLIDING, "query_pre_attn_scalar": 16}),
    "phi3": lambda: Phi3Config(**COMMON),
    "opt": lambda: OPTConfig(**{**UNGROUPED, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt_neox": lambda: GPTNeoXConfig(**{**UNGROUPED, "intermediate_size": 128}),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    ),
    "falcon_multi_query": lambda: FalconConfig(**UNGROUPED, multi_query=True, parallel_attn=True, bias=False),
    "falcon_new_decoder": lambda: FalconConfig(**UNGROUPED, new_decoder_architecture=True, num_kv_heads=2, bias=False),
    "olmo2": lambda: Olmo2Config(**COMMON),
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **{**COMMON, "head_dim": 32},
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **{**COMMON, "head_dim": 32, "sliding_window": 8},
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}

SENTENCES = (
    "The printer pulls the first proof in the morning, when the light comes from the north.",
    "A plate that has been rocked in every direction prints a black as deep as velvet.",
    "Where the burr is scraped away the ink does not hold, and the paper stays grey or white.",
    "She counts the steps: ink, wipe, lay the paper, turn the wheel, lift the blanket.",
    "In 1642 a soldier wrote a letter about a new way of engraving; few people believed him.",
    "Nothing is drawn with lines here. Everything is a tone between dark and light.",
    "How many prints can one plate give? Fifty good ones, perhaps, and fifty that are paler.",
    "The wheel turns slowly, and the blanket takes the shape of the plate beneath it.",
    "They hung the sheets on strings across the room and waited two days for them to dry.",
    "If the paper is too dry it takes no ink; if it is too wet the ink runs into the white.",
)


def make_tiny_model(
    name: str, folder: Path | str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Save a tiny random model of ``TINY`` with its tokenizer; the same arguments give the same bytes.

    Weights are drawn with variance ``1 / in`` and gains and biases are spread around their usual values, so that
    activations keep their size through the blocks and nothing is trivially one or zero. ``changes`` are settings of the
    configuration that differ from ``TINY``.
    """
    target = Path(folder)
    config = TINY[name]()
    config.update(changes)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() >= 2:
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(noise, alpha=0.1)
        model.to(dtype).save_pretrained(target)
        make_tokenizer().save_pretrained(target)
    return target


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``VOCABULARY`` tokens, learned from a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,  # transformers adds a special token of its own to some
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        **SPECIAL,
    )
