"""Parameters made of checkpoint tensors, judged by what transformers itself loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mezzotint.errors import ModelError
from mezzotint.models import Source, open_model
from mezzotint.models.rewriting import Rewriting, Scaled
from mezzotint.models.skeleton import quiet
from mezzotint.testing.models import TINY

Folder = Callable[[str], Path]
Open = Callable[[str], Source]
IDS = torch.arange(3, 23).view(2, 10)


def loaded(folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")


def rewritten(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of a model with other tensors."""
    shutil.copytree(folder, target)
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_those_of_from_pretrained(name: str, tiny_folder: Folder, tiny_source: Open) -> None:
    expected = loaded(tiny_folder(name)).state_dict()
    checkpoint = tiny_source(name).checkpoint
    assert set(expected) == set(tiny_source(name).skeleton.state_dict())
    for parameter, value in expected.items():
        torch.testing.assert_close(checkpoint.parameter(parameter), value, rtol=0, atol=0)
    assert checkpoint.unbound == ()


@pytest.mark.parametrize("name", TINY)
def test_restore_gives_the_tensors_of_the_file(name: str, tiny_folder: Folder, tiny_source: Open) -> None:
    checkpoint = tiny_source(name).checkpoint
    names = [n for n, _ in tiny_source(name).skeleton.named_parameters()]
    restored = checkpoint.restore({n: checkpoint.parameter(n) for n in names})
    written = load_file(tiny_folder(name) / "model.safetensors")
    assert set(restored) == set(written)
    for tensor, value in written.items():
        torch.testing.assert_close(restored[tensor], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", TINY)
def test_one_parameter_is_restored_alone(name: str, tiny_source: Open) -> None:
    checkpoint = tiny_source(name).checkpoint
    for parameter, _ in tiny_source(name).skeleton.named_parameters():
        restored = checkpoint.restore({parameter: checkpoint.parameter(parameter)})
        assert set(restored) == set(checkpoint.sources(parameter))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_names_without_the_prefix_come_back_so(name: str, tiny_folder: Folder, tmp_path: Path) -> None:
    """Files of the bare model have names without the prefix, and those of models around it have it twice."""

    def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix("model."): value for key, value in tensors.items()}

    source = open_model(rewritten(tiny_folder(name), tmp_path / "bare", bare))
    stored = load_file(tmp_path / "bare" / "model.safetensors")
    restored: dict[str, Tensor] = {}
    for parameter, _ in source.skeleton.named_parameters():
        restored |= source.checkpoint.restore({parameter: source.checkpoint.parameter(parameter)})
    assert restored.keys() == stored.keys()
    torch.testing.assert_close(restored, stored, rtol=0, atol=0)


def test_only_what_is_needed_is_read(monkeypatch: pytest.MonkeyPatch, tiny_source: Open) -> None:
    checkpoint = tiny_source("mixtral").checkpoint
    read: list[str] = []
    original = type(checkpoint.checkpoint).read
    monkeypatch.setattr(
        type(checkpoint.checkpoint), "read", lambda self, name: read.append(name) or original(self, name)
    )
    checkpoint.parameter("model.layers.1.mlp.experts.down_proj")
    assert read == [f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(4)]
    assert tuple(read) == checkpoint.sources("model.layers.1.mlp.experts.down_proj")


def test_more_than_ten_experts_keep_their_order(tmp_path: Path) -> None:
    """Sorted as text, expert 10 would come before expert 2."""
    config = TINY["qwen3_moe"]()
    config.num_experts = 12
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    source = open_model(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    torch.testing.assert_close(
        source.checkpoint.parameter(name), loaded(tmp_path, torch.float32).get_parameter(name), rtol=0, atol=0
    )
    assert source.map.matrices[f"{name}[10]"].sources == ("model.layers.0.mlp.experts.10.down_proj.weight",)


def test_tied_head_is_the_embedding(tiny_source: Open) -> None:
    checkpoint = tiny_source("qwen2").checkpoint
    assert checkpoint.sources("lm_head.weight") == ("model.embed_tokens.weight",)
    value = checkpoint.parameter("lm_head.weight")
    torch.testing.assert_close(value, checkpoint.parameter("model.embed_tokens.weight"), rtol=0, atol=0)
    assert set(checkpoint.restore({"lm_head.weight": value})) == {"model.embed_tokens.weight"}
    both = {"lm_head.weight": value, "model.embed_tokens.weight": value}
    assert set(checkpoint.restore(both)) == {"model.embed_tokens.weight"}
    with pytest.raises(ModelError, match="two different values"):
        checkpoint.restore({**both, "lm_head.weight": value + 1})


def test_tied_weights_that_are_in_the_file_twice(tiny_folder: Folder, tmp_path: Path) -> None:
    def twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    source = open_model(rewritten(tiny_folder("qwen2"), tmp_path / "twice", twice))
    assert source.map.matrices["lm_head"].tied_to == "model.embed_tokens.weight"
    value = source.checkpoint.parameter("model.embed_tokens.weight")
    assert set(source.checkpoint.restore({"model.embed_tokens.weight": value})) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


def test_weights_said_to_be_tied_that_differ(tiny_folder: Folder, tmp_path: Path) -> None:
    def differ(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}

    folder = rewritten(tiny_folder("qwen2"), tmp_path / "differ", differ)
    source = open_model(folder)
    assert source.map.matrices["lm_head"].tied_to is None
    expected = loaded(folder).state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        torch.testing.assert_close(source.checkpoint.parameter(name), expected[name], rtol=0, atol=0)


def test_only_the_head_is_in_the_file(tiny_folder: Folder, tmp_path: Path) -> None:
    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n.replace("model.embed_tokens", "lm_head"): t for n, t in tensors.items()}

    source = open_model(rewritten(tiny_folder("qwen2"), tmp_path / "head", renamed))
    assert source.checkpoint.sources("model.embed_tokens.weight") == ("lm_head.weight",)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_checkpoint_of_the_base_model(name: str, tiny_folder: Folder, tmp_path: Path) -> None:
    """Files of the model without head have no prefix."""
    prefix = "transformer." if name == "gpt2" else "model."

    def stripped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items()}

    folder = rewritten(tiny_folder(name), tmp_path / "base", stripped)
    source, expected = open_model(folder), loaded(folder).state_dict()
    parameters = [n for n, _ in source.skeleton.named_parameters()]
    values = {n: source.checkpoint.parameter(n) for n in parameters}
    for parameter in parameters:
        torch.testing.assert_close(values[parameter], expected[parameter], rtol=0, atol=0)
    assert set(source.checkpoint.restore(values)) == set(load_file(folder / "model.safetensors"))


def test_tensors_that_nothing_uses_are_listed(tiny_folder: Folder, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "adapter.weight": torch.ones(2)}
    folder = rewritten(tiny_folder("llama"), tmp_path / "extra", lambda tensors: tensors | extra)
    assert set(open_model(folder).checkpoint.unbound) == set(extra)


def test_missing_parameters_are_named(tiny_folder: Folder, tmp_path: Path) -> None:
    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t for n, t in tensors.items() if "layers.1.mlp" not in n}

    with pytest.raises(ModelError, match=r"3 parameters have no tensor.*layers\.1\.mlp\.gate_proj\.weight"):
        open_model(rewritten(tiny_folder("llama"), tmp_path / "less", without))


def test_missing_expert(tiny_folder: Folder, tmp_path: Path) -> None:
    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t for n, t in tensors.items() if "layers.1.mlp.experts.3.down" not in n and "experts.2.up" not in n}

    with pytest.raises(ModelError, match="experts"):
        open_model(rewritten(tiny_folder("qwen3_moe"), tmp_path / "less", without))


@pytest.mark.parametrize(("name", "has", "wants"), [("llama", "96", "128"), ("mixtral", "192", "256")])
def test_shape_mismatch(name: str, has: str, wants: str, tiny_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder(name), tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(ModelError, match=rf"has shape .*{has}.* and .*{wants}.* by config\.json"):
        open_model(folder)


def test_a_change_meets_the_parameter_of_its_name_only(tiny_folder: Folder) -> None:
    checkpoint, plain = (open_model(tiny_folder("qwen2")).checkpoint for _ in range(2))
    checkpoint.rewriting.add("lm_head.weight", lambda value: value * 2)
    checkpoint.rewriting.add("lm_head.weight", lambda value: value + 1)
    original = plain.parameter("lm_head.weight")
    torch.testing.assert_close(checkpoint.parameter("lm_head.weight"), 2 * original.float() + 1, rtol=0, atol=0)
    torch.testing.assert_close(checkpoint.parameter("model.embed_tokens.weight"), original, rtol=0, atol=0)


def test_scaling_of_a_parameter_and_of_one_expert() -> None:
    rewriting = Rewriting()
    value, kept = (torch.arange(1.0, 13).view(2, 2, 3).bfloat16() for _ in range(2))
    factor = torch.tensor([[3.0], [0.1]])
    rewriting.add("experts", Scaled(factor=factor, expert=1))
    one = rewriting.apply("experts", value)
    torch.testing.assert_close(one, torch.stack([kept[0].float(), kept[1].float() * factor]), rtol=0, atol=0)
    assert torch.equal(value, kept)
    with rewriting.kept():
        rewriting.add("gain", Scaled(factor=torch.tensor(0.3), shift=1.0, dtype=torch.bfloat16))
        gain = rewriting.apply("gain", torch.tensor([0.5, -0.25]).bfloat16())
        torch.testing.assert_close(gain, torch.tensor([-0.55, -0.775]).bfloat16().float(), rtol=0, atol=0)
    assert "gain" not in rewriting
    assert "experts" in rewriting


def test_unknown_parameter(tiny_source: Open) -> None:
    with pytest.raises(ModelError, match="'nothing' is not in the checkpoint"):
        tiny_source("llama").checkpoint.parameter("nothing")
