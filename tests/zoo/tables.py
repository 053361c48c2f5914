"""Sizes, per-type settings and variants of the tiny models; no code.

`SIZES` is set wherever a configuration class has a field of that name. `SETTINGS` is for types that need more than
that to be built or to show what is special about them. `VARIANTS` are further models of a type.
"""

from typing import Any

VOCABULARY = 320
POSITIONS = 128
WINDOW = 8  # shorter than any calibration sample, so that it matters

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dff", "dim_ff", "d_inner", "ffn_hidden_size"), 128),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "attention_hidden_size"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    "swa_num_attention_heads": 4,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length"), POSITIONS),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "d_head", "kv_channels"), 16),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # windows and positions
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "local_attention"), WINDOW),
    "attention_chunk_size": 32,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 16,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 64),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    "decoder_sparse_step": 1,
    # latent attention and its indexer
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_topk"), 16),
    "index_head_dim": 32,
    "index_n_heads": 2,
    # linear attention
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    # state spaces
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 16),
    "use_mamba_kernels": False,
    # embeddings per layer
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
}

WINDOWS = ["sliding_attention", "full_attention"]
LINEAR = ["linear_attention", "full_attention"]
CONVOLUTIONS = ["conv", "full_attention"]
EXPERTS = ["dense", "sparse"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 8}
NO_LAYER_EMBEDDINGS = {
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "num_hidden_layers": 2,
    "layer_types": WINDOWS,
}
TINY_EXPERTS = {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}

SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "beam": {"n_group": 2, "topk_group": 1},
    "blt": {
        "vocab_size": VOCABULARY,
        "encoder_hash_byte_group_vocab": 64,
        "local_attention_window_len": 16,
        "encoder_config": {"hidden_size_global": 128},
        "decoder_config": {"hidden_size_global": 128},
        "global_config": {"hidden_size": 128},
    },
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0, "mlp_layer_types": EXPERTS},
    "cohere_compass_text": {"layer_types": WINDOWS, "rope_parameters": dict.fromkeys(WINDOWS, ROPE)},
    "cpmant": {"prompt_length": 4, "prompt_types": 4, "segment_types": 3},
    "dbrx": {"ffn_config": TINY_EXPERTS, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "deepseek_v3": {"n_group": 2},
    "deepseek_v32": {"n_group": 2},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 32,
        "hc_mult": 2,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_head_dim": 16,
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {
        "head_dim": 32,
        "index_head_dim": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dots1": {"layer_types": WINDOWS},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4": {"vision_config": {"position_embedding_size": 64}, "audio_config": {"output_proj_dims": 64}},
    "gemma4_unified": {
        "vision_config": {"patch_size": 2, "mm_embed_dim": 64, "mm_posemb_size": 64, "output_proj_dims": 64},
        "audio_config": {},
    },
    "got_ocr2": {
        "vision_config": {"output_channels": 16, "mlp_dim": 128, "image_size": 64, "global_attn_indexes": [1]}
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": WINDOWS * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": WINDOWS * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
    },
    "gemma4_unified_text": {"global_head_dim": 32},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "hrm_text": {"L_cycles": 2},
    "hy_v4": {"indexer_types": ["full", "shared"]},
    "inkling_text": {"logits_mup_width_multiplier": 2.0, "mlp_layer_types": EXPERTS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "intermediate_size": None},
    "gpt_oss": {"head_dim": 32, "rope_parameters": ROPE},
    "granite": {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, **MAMBA},
    "jetmoe": {"num_key_value_heads": 4, "intermediate_size": 64},
    "kimi_linear": {"q_lora_rank": None},
    "llama4_text": {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
    "longcat_flash": {"zero_expert_num": 1, "num_key_value_heads": None},
    "laguna": {"layer_types": WINDOWS},
    "lfm2": {"layer_types": CONVOLUTIONS},
    "lfm2_moe": {"layer_types": CONVOLUTIONS},
    "lfm3": {"layer_types": CONVOLUTIONS},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mellum": {"layer_types": WINDOWS, "mlp_layer_types": EXPERTS},
    "mimo_v2_flash": {"head_dim": 24, "sliding_window": 9},
    "minicpm3": {"dim_model_base": 32},
    "minimax": {"layer_types": LINEAR},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": EXPERTS,
        "index_block_size": 8,
        "index_topk_blocks": 2,
    },
    "ministral": {"layer_types": WINDOWS},
    "mpt": {"expansion_ratio": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "num_hidden_layers": 4},
    "olmo": {"clip_qkv": 2.0},
    "olmo_hybrid": {"linear_num_key_heads": 4},
    "opt": {"word_embed_proj_dim": 64},
    "phi4_multimodal": {
        "vision_config": {"image_size": 56, "crop_size": 56},
        "audio_config": {
            "num_blocks": 1,
            "ext_pw_out_channel": 64,
            "depthwise_separable_out_channel": 64,
            "nemo_conv_channels": 16,
        },
    },
    "phi3": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 32},
    "qwen3_next": {"num_hidden_layers": 4, "layer_types": LINEAR * 2},
    "qwen3_5_text": {"num_hidden_layers": 4, "layer_types": LINEAR * 2},
    "qwen4_exp_text": {
        "hc_count": 2,
        "hc_lowrank": 16,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 2,
        "split_ngram_parts": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_key_value_heads": 1, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (16, 48),
        "attn_layers": ("local", "lsh"),
        "attention_head_size": 16,
        "feed_forward_size": 128,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
        "hash_seed": 0,
        "num_hidden_layers": 2,
    },
    "xlm": {"causal": True, "n_langs": 1},
    "zamba": {
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "n_mamba_heads": 2,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        **MAMBA,
    },
    "zamba2": {
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "attention_head_dim": 32,
        "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "num_experts_per_tok": 1, "router_hidden_size": 32},
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2_noq": ("deepseek_v2", {"q_lora_rank": None, "n_shared_experts": 2}),
    "doge_moe": ("doge", {"is_moe": True}),
    "falcon_alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma4_nopl": ("gemma4_text", NO_LAYER_EMBEDDINGS),
    "gemma4_moe": ("gemma4_text", {**NO_LAYER_EMBEDDINGS, "enable_moe_block": True}),
    "gpt_neox_serial": ("gpt_neox", {"use_parallel_residual": False}),
    "granitemoehybrid_dense": ("granitemoehybrid", {"num_local_experts": 0}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "opt_proj": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "phi_norms": ("phi", {"qk_layernorm": True}),
    "qwen2_windows": ("qwen2", {"use_sliding_window": True, "layer_types": WINDOWS}),
    "stablelm_parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}

# Published files of these types hold the text model under this name, beside what the text model has no place for.
NESTED = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen4_exp"), "model.language_model."),
}
BESIDE = ("model.visual.patch_embed.proj.weight", "mtp.fc.weight")

_SPEECH = "decoder of a speech recognizer, attends to an audio encoder"
_SEQUENCES = "decoder of an encoder-decoder model, attends to its encoder"
_MASKED = "encoder, trained on masked tokens in both directions"
_DRAFTER = "drafts tokens from the hidden states of another model"

EXCLUDED: dict[str, str] = {
    **dict.fromkeys(
        ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"), _SEQUENCES
    ),
    **dict.fromkeys(("bert-generation", "pegasus", "plbart", "prophetnet"), _SEQUENCES),
    **dict.fromkeys(("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"), _MASKED),
    **dict.fromkeys(("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"), _MASKED),
    **dict.fromkeys(("xlm-roberta-xl", "xmod"), _MASKED),
    "whisper": _SPEECH,
    "trocr": "decoder of a text recognizer, attends to an image encoder",
    "xlnet": "trained on permutations of the text, in both directions",
    **dict.fromkeys(("musicgen", "musicgen_melody"), "writes audio codes, attends to a text encoder"),
    "gemma3n": "its image tower needs the package timm; the text model is gemma3n_text",
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTER),
}
