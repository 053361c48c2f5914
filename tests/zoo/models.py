"""Tiny random models of every causal model type that the installed transformers has."""

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mezzotint.models.skeleton import quiet
from zoo.tables import BESIDE, EXCLUDED, NESTED, POSITIONS, SETTINGS, SIZES, VARIANTS

KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types")


def names() -> list[str]:
    """Every causal type of transformers that is a decoder language model, and the variants."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS} - EXCLUDED.keys())


def type_of(name: str) -> str:
    """The model type of a name, which is itself where the name is no variant."""
    return VARIANTS[name][0] if name in VARIANTS else name


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a tiny model."""
    settings = VARIANTS[name][1] if name in VARIANTS else {}
    return _tiny(CONFIG_MAPPING[type_of(name)], settings)


def make(name: str, folder: Path) -> Path:
    """Write a tiny model: config.json, weights in bfloat16, a tokenizer of bytes. The same bits at every call."""
    config = config_of(name)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomize_(model)
        shutil.rmtree(folder, ignore_errors=True)
        model.to(torch.bfloat16).save_pretrained(folder)
        if type(model.config) is not type(config):  # the text model of a multimodal one, which is named in config.json
            config.dtype = config.get_text_config().dtype = torch.bfloat16
            config.save_pretrained(folder)
        if name in NESTED:
            _nest(folder / "model.safetensors", NESTED[name])
        tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def randomize_(model: PreTrainedModel) -> None:
    """Modifies the model: weights are normal with deviation ``1 / sqrt(columns)``, vectors are moved by .1.

    Stored vectors that are no parameters are moved too (a router's correction is one).
    """
    generator = torch.Generator().manual_seed(0)
    stored = model.state_dict()
    vectors = [buffer for name, buffer in model.named_buffers() if name in stored and buffer.dim() == 1]
    for value in (*model.parameters(), *vectors):
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() > 1:
            value.copy_(noise * value.shape[-1] ** -0.5)
        else:
            value.add_(noise, alpha=0.1)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0  # as it is in trained models; some types are loaded so in any case


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after three special ones."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=POSITIONS
    )


def _tiny(config_class: type[PreTrainedConfig], given: Mapping[str, Any]) -> PreTrainedConfig:
    """An instance with tiny sizes, the settings of its type and what is given; the last wins."""
    settings = {**SETTINGS.get(config_class.model_type, {}), **given}
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: size for name, size in SIZES.items() if name in fields}
    if {"kv_lora_rank", "num_key_value_heads"} <= fields:  # latent attention: one key and value for every query
        values["num_key_value_heads"] = values["num_attention_heads"]
    parts = _parts(config_class)
    values |= {name: _tiny(part, settings.get(name, {})) for name, part in parts.items()}
    values |= {name: value for name, value in settings.items() if name not in parts}
    mixed = {
        name: kinds
        for name in KINDS_OF_LAYERS
        if name in fields - settings.keys() and len(kinds := _distinct(getattr(config_class(), name))) > 1
    }
    if mixed and "num_hidden_layers" not in settings:
        values["num_hidden_layers"] = max(len(kinds) for kinds in mixed.values())
    for name, kinds in mixed.items():
        values[name] = [kinds[layer % len(kinds)] for layer in range(values["num_hidden_layers"])]
    return config_class(**values)


def _nest(path: Path, prefix: str) -> None:
    """Rename the tensors of a text model to those of the multimodal one, and add some of its others."""
    tensors = {re.sub(r"^model\.", prefix, name): tensor for name, tensor in load_file(path).items()}
    others = {name: torch.ones(64, 64, dtype=torch.bfloat16) for name in BESIDE}
    save_file({**tensors, **others}, path, metadata={"format": "pt"})


def _distinct(kinds: Sequence[str] | None) -> list[str]:
    """In the order in which they come first."""
    return list(dict.fromkeys(kinds or ()))


def _parts(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """Classes of nested configurations by their fields."""
    parts = getattr(config_class, "sub_configs_defaults", {})
    return {name: part if isinstance(part, type) else CONFIG_MAPPING[part.model_type] for name, part in parts.items()}
