"""The inferred map of every tiny architecture, against expectations written down by hand."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig

from mezzotint.core.contracts import Block, ModelMap, NormEdge
from mezzotint.errors import ModelError
from mezzotint.models import Source, infer_map
from mezzotint.models.skeleton import build_skeleton
from mezzotint.testing.models import TINY

Open = Callable[[str], Source]


class Group(NamedTuple):
    """Names inside the block; of experts the parameter. ``added``: reaches the residual stream unchanged."""

    names: str
    norm: str | None = None
    added: bool = False


def sequential(first: str, second: str, *, added: bool = True, gate: str = "mlp.gate_proj mlp.up_proj") -> list[Group]:
    return [
        Group("self_attn.q_proj self_attn.k_proj self_attn.v_proj", first),
        Group("self_attn.o_proj", added=added),
        Group(gate, second),
        Group("mlp.down_proj", added=added),
    ]


def with_experts() -> list[Group]:
    return [
        *sequential("input_layernorm", "")[:2],
        Group("mlp.experts.gate_up_proj", "post_attention_layernorm"),
        Group("mlp.experts.down_proj"),
    ]


LLAMA = sequential("input_layernorm", "post_attention_layernorm")
GEMMA = sequential("input_layernorm", "pre_feedforward_layernorm", added=False)
OLMO2 = [g._replace(norm=None) for g in sequential("", "", added=False)]
PHI3 = [
    Group("self_attn.qkv_proj", "input_layernorm"),
    Group("self_attn.o_proj", added=True),
    Group("mlp.gate_up_proj", "post_attention_layernorm"),
    Group("mlp.down_proj", added=True),
]
OPT = [
    Group("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn_layer_norm"),
    Group("self_attn.out_proj", added=True),
    Group("fc1", "final_layer_norm"),
    Group("fc2", added=True),
]
NEOX = [
    Group("attention.query_key_value", "input_layernorm"),
    Group("attention.dense", added=True),
    Group("mlp.dense_h_to_4h", "post_attention_layernorm"),
    Group("mlp.dense_4h_to_h", added=True),
]
GPT2 = [
    Group("attn.c_attn", "ln_1"),
    Group("attn.c_proj", added=True),
    Group("mlp.c_fc", "ln_2"),
    Group("mlp.c_proj", added=True),
]
FALCON_OLD = [
    Group("self_attention.query_key_value mlp.dense_h_to_4h", "input_layernorm"),
    Group("self_attention.dense", added=True),
    Group("mlp.dense_4h_to_h", added=True),
]
FALCON_NEW = [
    Group("self_attention.query_key_value", "ln_attn"),
    Group("self_attention.dense", added=True),
    Group("mlp.dense_h_to_4h", "ln_mlp"),
    Group("mlp.dense_4h_to_h", added=True),
]
# by name: what block 0 holds
GROUPS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi3": PHI3,
    "opt": OPT,
    "gpt_neox": NEOX,
    "gpt2": GPT2,
    "falcon_multi_query": FALCON_OLD,
    "falcon_new_decoder": FALCON_NEW,
    "olmo2": OLMO2,
    "mixtral": with_experts(),
    "qwen3_moe": with_experts(),
    "gpt_oss": with_experts(),
}
LAYER_NORM = {"opt", "gpt_neox", "gpt2", "falcon_multi_query", "falcon_new_decoder"}
ONE_PLUS = {"gemma2", "gemma3"}
PARALLEL = {"gpt_neox", "falcon_multi_query", "falcon_new_decoder"}
TIED = {"qwen2", "gemma2", "gemma3", "opt", "gpt2", "falcon_multi_query", "falcon_new_decoder"}
EMBEDDINGS = {
    "opt": "model.decoder.embed_tokens.weight",
    "gpt_neox": "gpt_neox.embed_in.weight",
    "gpt2": "transformer.wte.weight",
    "falcon_multi_query": "transformer.word_embeddings.weight",
    "falcon_new_decoder": "transformer.word_embeddings.weight",
}
UNMAPPED = {
    "mixtral": {"mlp.gate.weight"},
    "qwen3_moe": {"mlp.gate.weight"},
    "gpt_oss": {"mlp.router.weight", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"},
}
FUSIONS = {
    "llama": ["0.qkv"] * 3 + ["0.self_attn.o_proj"] + ["0.gate_up"] * 2 + ["0.mlp.down_proj"],
    "phi3": ["0.qkv", "0.self_attn.o_proj", "0.gate_up", "0.mlp.down_proj"],
    "opt": ["0.qkv"] * 3 + ["0.self_attn.out_proj", "0.fc1", "0.fc2"],
    "falcon_multi_query": ["0.qkv", "0.mlp.dense_h_to_4h", "0.self_attention.dense", "0.mlp.dense_4h_to_h"],
    "mixtral": ["0.qkv"] * 3 + ["0.self_attn.o_proj"] + ["0.experts"] * 8,
}


def short(block: Block, name: str) -> str:
    return name.removeprefix(f"{block.path}.").partition("[")[0]


def test_every_tiny_model_has_expectations() -> None:
    assert set(GROUPS) == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_groups_norms_and_residual(name: str, tiny_source: Open) -> None:
    block = tiny_source(name).map.blocks[0]
    found = [
        Group(
            " ".join(dict.fromkeys(short(block, matrix) for matrix in group.matrices)),
            None if group.norm is None else short(block, group.norm.parameter).removesuffix(".weight"),
            group.added_to_residual,
        )
        for group in block.groups
    ]
    assert found == GROUPS[name]


@pytest.mark.parametrize("name", TINY)
def test_form_of_norms(name: str, tiny_source: Open) -> None:
    found = tiny_source(name).map
    edges = [g.norm for block in found.blocks for g in block.groups if g.norm is not None] + [found.final_norm]
    for edge in edges:
        assert edge is not None
        expected = ("1+w" if name in ONE_PLUS else "w", name in LAYER_NORM, name in LAYER_NORM)
        assert (edge.gain, edge.has_mean, edge.has_bias) == expected


@pytest.mark.parametrize("name", TINY)
def test_surroundings(name: str, tiny_source: Open) -> None:
    found = tiny_source(name).map
    embedding = EMBEDDINGS.get(name, "model.embed_tokens.weight")
    looked_up = found.matrices[found.embedding]
    assert (looked_up.parameter, looked_up.lookup, looked_up.linear) == (embedding, True, False)
    assert next(iter(found.matrices)) == found.embedding == embedding.removesuffix(".weight")
    assert (found.head, found.parallel_residual) == ("lm_head", name in PARALLEL)
    assert found.matrices["lm_head"].tied_to == (embedding if name in TIED else None)
    assert isinstance(found.final_norm, NormEdge)


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_of_a_block_is_mapped_or_kept_with_a_reason(name: str, tiny_source: Open) -> None:
    source = tiny_source(name)
    mapped = {matrix.parameter for matrix in source.map.matrices.values()}
    for block in source.map.blocks:
        wide = {n for n, p in source.skeleton.get_submodule(block.path).named_parameters() if p.dim() >= 2}
        kept = {short(block, n) for n in source.map.unmapped if n.startswith(f"{block.path}.")}
        assert {f"{block.path}.{n}" for n in wide - kept} <= mapped
        dense_block = name == "qwen3_moe" and block.index == 1
        assert kept == (set() if dense_block else UNMAPPED.get(name, set()))
    assert all(source.map.unmapped.values())
    assert mapped.isdisjoint(source.map.unmapped)


@pytest.mark.parametrize("name", TINY)
def test_matrices_agree_with_their_parameters(name: str, tiny_source: Open) -> None:
    source = tiny_source(name)
    for matrix in source.map.matrices.values():
        parameter = source.skeleton.get_parameter(matrix.parameter)
        assert tuple(matrix.view(parameter).shape) == matrix.shape
        assert set(matrix.sources) <= set(source.checkpoint.checkpoint.tensors)
        assert set(matrix.sources) <= set(source.checkpoint.sources(matrix.parameter))
        owner = source.skeleton.get_submodule(matrix.parameter.rpartition(".")[0])
        assert matrix.linear == isinstance(owner, torch.nn.Linear)
        assert matrix.lookup == isinstance(owner, torch.nn.Embedding)
        if matrix.bias is not None:
            assert source.skeleton.get_parameter(matrix.bias).shape[-1] == matrix.shape[0]
    transposed = {m.transposed for m in source.map.matrices.values() if not (m.linear or m.lookup)}
    assert transposed == {"gpt2": {True}, "gpt_oss": {True}, "mixtral": {False}, "qwen3_moe": {False}}.get(name, set())


@pytest.mark.parametrize("name", FUSIONS)
def test_fusion_classes(name: str, tiny_source: Open) -> None:
    found = tiny_source(name).map
    assert [found.matrices[m].fusion for g in found.blocks[0].groups for m in g.matrices] == FUSIONS[name]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_have_their_own_sources(name: str, tiny_source: Open) -> None:
    found = tiny_source(name).map
    experts = [m for m in found.matrices.values() if m.expert is not None]
    if name == "gpt_oss":  # stacked on disk as well
        assert {len(m.sources) for m in experts} == {1}
    else:
        for matrix in experts:
            assert all(f".experts.{matrix.expert}." in source for source in matrix.sources)
            assert len(matrix.sources) == (2 if "gate_up" in matrix.name else 1)
    groups = [g for g in found.blocks[0].groups if g.experts]
    assert [len(g.parameters) for g in groups] == [1, 1]


def test_kinds_of_blocks(tiny_source: Open) -> None:
    assert [b.kind for b in tiny_source("gemma2").map.blocks] == ["sliding_attention", "full_attention"] * 2
    assert [b.index for b in tiny_source("gemma2").map.blocks] == [0, 1, 2, 3]


def test_the_skeleton_is_empty_afterwards(tiny_source: Open) -> None:
    skeleton = tiny_source("llama").skeleton
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert {b.device.type for b in skeleton.buffers()} == {"cpu"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in skeleton.modules())


def test_model_that_needs_values_is_mapped_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tiny_source: Open) -> None:
    """Without data a forward pass may fail; then zeros take its place, and the map is the same."""
    original, devices = infer_map.watch, []

    def watch(skeleton: torch.nn.Module, blocks: list[torch.nn.Module], device: str) -> object:
        devices.append(device)
        if device == "meta":
            raise RuntimeError("needs values")
        return original(skeleton, blocks, device)

    monkeypatch.setattr(infer_map, "watch", watch)
    for name in ("llama", "mixtral", "gpt_neox"):
        source = tiny_source(name)
        assert comparable(infer_map.infer(source.skeleton, source.checkpoint)) == comparable(source.map)
        assert {p.device.type for p in source.skeleton.parameters()} == {"meta"}
    assert devices == ["meta", "cpu"] * 3


def comparable(found: ModelMap) -> tuple[object, ...]:
    blocks = [(b.groups, [(r.kind, r.matrix, r.head_dim) for r in b.roles]) for b in found.blocks]
    rest = (found.matrices, found.embedding, found.head, found.final_norm, found.parallel_residual, found.unmapped)
    return (blocks, *rest)


def test_model_without_blocks_is_refused() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=0, num_attention_heads=2, vocab_size=64
    )
    with pytest.raises(ModelError, match="no list of modules"):
        infer_map.infer(build_skeleton(config), None)
