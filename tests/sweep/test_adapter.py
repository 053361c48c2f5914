"""Compensations of a run: what is written, and what it is worth."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mezzotint.errors import ConfigError
from runs import HELD_OUT, TINY_LLAMA, quantized, stock, tiny

OPTIONS: dict[str, Any] = {"bits": 2, "samples": 32, "seqlen": 64, "engine": "dense"}


def merged(folder: Path) -> torch.nn.Module:
    """The quantized model with its adapter added, as PEFT merges it: scaled by alpha over rank."""
    model = stock(folder)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert set(config["target_modules"]) == {name[len("base_model.model.") :].rsplit(".", 2)[0] for name in tensors}
    with torch.no_grad():
        for module in config["target_modules"]:
            rank = config["rank_pattern"].get(module, config["r"])
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            down, up = (tensors[f"base_model.model.{module}.lora_{part}.weight"].float() for part in "AB")
            assert down.shape[0] == up.shape[1] == rank
            model.get_submodule(module).weight += alpha / rank * up @ down
    return model


@torch.no_grad()
def kl(model: torch.nn.Module, original: torch.nn.Module) -> float:
    ids = AutoTokenizer.from_pretrained(TINY_LLAMA)(HELD_OUT.read_text())["input_ids"][: 32 * 64]
    tokens = torch.tensor(ids).view(32, 64)
    p, q = (m(input_ids=tokens).logits.double().log_softmax(-1) for m in (original, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_an_adapter_gets_back_much_of_what_two_bits_lose(tmp_path: Path) -> None:
    quantized(TINY_LLAMA, tmp_path / "plain", "loaq-gptq", **OPTIONS)
    quantized(
        TINY_LLAMA,
        tmp_path / "with",
        "loaq-gptq",
        **OPTIONS,
        settings={"compensation.kind": "lora", "compensation.rank": 32},
    )
    original = stock(TINY_LLAMA)
    assert not (tmp_path / "plain" / "adapter").exists()
    assert kl(merged(tmp_path / "with"), original) < 0.8 * kl(stock(tmp_path / "plain"), original)


@pytest.mark.slow
def test_the_first_matrices_are_those_without_compensation(tmp_path: Path) -> None:
    """Codes of the first group are given; what follows is calibrated on inputs that are compensated."""
    quantized(TINY_LLAMA, tmp_path / "plain", "qep-gptq", **OPTIONS)
    quantized(TINY_LLAMA, tmp_path / "with", "qep-gptq", **OPTIONS, settings={"compensation.kind": "lora"})
    plain, changed = (stock(tmp_path / name).state_dict() for name in ("plain", "with"))
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(plain[first], changed[first])
    assert any(not torch.equal(value, changed[name]) for name, value in plain.items())


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [("gpt2", "qep-gptq", "not the weight of an nn.Linear"), ("llama", "lpcd-gptq", "compensation needs final codes")],
)
def test_refusals(name: str, recipe: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        quantized(tiny(name, tmp_path), tmp_path / "out", recipe, bits=3, settings={"compensation.kind": "lora"})
    assert not (tmp_path / "out").exists()


def test_narrow_matrices_have_a_rank_of_their_own_and_as_much_alpha(tmp_path: Path) -> None:
    settings = {"compensation.kind": "lora", "compensation.rank": 48}
    quantized(tiny("llama", tmp_path), tmp_path / "out", "gptq", bits=3, engine="dense", settings=settings)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    narrow = {f"model.layers.{block}.self_attn.{kind}_proj": 32 for block in range(2) for kind in "kv"}
    assert (config["r"], config["lora_alpha"]) == (48, 48)
    assert config["rank_pattern"] == config["alpha_pattern"] == narrow
