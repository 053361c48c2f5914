"""Filled skeletons compute what transformers computes, and take no memory before and after."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mezzotint.models import Source, open_model
from mezzotint.models.skeleton import build_skeleton, dematerialize, materialize, quiet
from mezzotint.testing.models import TINY, VOCABULARY, make_tiny_model
from sums import lay_alike

Folder = Callable[[str], Path]
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def devices(source: Source) -> set[str]:
    return {p.device.type for p in source.skeleton.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_from_pretrained(name: str, dtype: torch.dtype, tiny_folder: Folder) -> None:
    source = open_model(tiny_folder(name))
    materialize(source.skeleton, "", source.checkpoint, dtype=dtype, device="cpu")
    with quiet(), torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(tiny_folder(name), dtype=dtype, experts_implementation="eager")
        lay_alike(reference, source.skeleton)
        expected = reference(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(source.skeleton(input_ids=IDS).logits, expected, rtol=0, atol=0)
    for buffer, value in reference.named_buffers():
        torch.testing.assert_close(source.skeleton.get_buffer(buffer).to(value.dtype), value, rtol=0, atol=0)


def test_blocks_are_filled_and_emptied_one_by_one(tiny_folder: Folder) -> None:
    source = open_model(tiny_folder("llama"))
    for block in source.map.blocks:
        module = source.skeleton.get_submodule(block.path)
        materialize(module, block.path, source.checkpoint, dtype=None, device="cpu")
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert {p.device.type for p in module.parameters()} == {"cpu"}
        assert devices(source) == {"cpu", "meta"}
        dematerialize(module)
        assert devices(source) == {"meta"}


def test_tied_parameters_stay_one(tiny_folder: Folder) -> None:
    source = open_model(tiny_folder("qwen2"))
    embedding, head = source.skeleton.get_input_embeddings(), source.skeleton.get_output_embeddings()
    materialize(source.skeleton, "", source.checkpoint, dtype=torch.float32, device="cpu")
    assert embedding.weight is head.weight
    dematerialize(source.skeleton)
    assert embedding.weight is head.weight
    assert devices(source) == {"meta"}


def test_parameters_that_stay_wide(tiny_folder: Folder) -> None:
    """What an architecture keeps in float32 is kept so in bfloat16, as from_pretrained does."""
    source = open_model(tiny_folder("llama"))
    source.skeleton._keep_in_fp32_modules_strict = {"input_layernorm"}
    block = source.map.blocks[0]
    module = source.skeleton.get_submodule(block.path)
    materialize(module, block.path, source.checkpoint, dtype=torch.bfloat16, device="cpu")
    assert module.input_layernorm.weight.dtype == torch.float32
    assert module.post_attention_layernorm.weight.dtype == torch.bfloat16


def test_skeleton_leaves_the_configuration_alone() -> None:
    config = TINY["mixtral"]()
    before = config.to_dict()
    skeleton = build_skeleton(config)
    assert config.to_dict() == before
    assert skeleton.config.use_cache is False
    assert not skeleton.training
    assert not any(p.requires_grad for p in skeleton.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_tiny_models_are_deterministic(name: str, tiny_folder: Folder, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    again = make_tiny_model(name, tmp_path / "again")
    other = make_tiny_model(name, tmp_path / "other", seed=1)
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / file).read_bytes() == (tiny_folder(name) / file).read_bytes()
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_tiny_tokenizer_fits(tiny_folder: Folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("llama"))
    text = "Nothing is drawn with lines here. Ünïcode & 12 numbers\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert 0 <= min(ids) <= max(ids) < VOCABULARY
    assert len(tokenizer) <= VOCABULARY
    config = TINY["llama"]()
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (config.pad_token_id, config.bos_token_id, config.eos_token_id)
