"""Which tensors the output holds: packed in place, experts put together again, everything else copied."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mezzotint import Recipe
from mezzotint.errors import OutputError
from mezzotint.jobs.output import Output
from mezzotint.planning.layout import users_of_sources, written_alone
from mezzotint.recipes.recipe import Rule
from mezzotint.storage.shards import ShardWriter
from mezzotint.testing.models import TINY
from runs import TINY_LLAMA, assert_same_bits, opened, plan_of, quantized, stock, tensors_of, tiny

Folder = Callable[[str], Path]


@pytest.mark.parametrize("name", list(TINY))
def test_every_tensor_is_written_exactly_once(name: str, tiny_folder: Folder) -> None:
    source, planned = opened(tiny_folder(name)), plan_of(tiny_folder(name))
    layout = planned.layout
    names = [spec.name for spec in layout.specs]
    assert len(set(names)) == len(names)
    remade = {t for members in layout.assembled for p in members for t in source.checkpoint.sources(p)}
    direct = {
        source.map.matrices[e.matrix].sources[0]
        for e in planned.plan.entries
        if layout.assembly_of(source.map.matrices[e.matrix].parameter) is None
    }
    parts = [set(layout.copied), remade, direct]
    assert sum(len(part) for part in parts) == len(set().union(*parts)) == len(source.checkpoint.tensors)
    for spec in layout.specs:
        if spec.name in layout.copied or spec.name in remade:
            info = source.checkpoint.tensors[spec.name]
            assert (spec.dtype, spec.shape) == (info.dtype, tuple(info.shape))


def test_tied_parameters_count_as_one(tiny_folder: Folder) -> None:
    source = opened(tiny_folder("qwen2"))
    users = users_of_sources(source)
    assert users["model.embed_tokens.weight"] == {"model.embed_tokens.weight"}
    q_proj = source.map.matrices["model.layers.0.self_attn.q_proj"]
    assert written_alone(q_proj, users)
    experts = opened(tiny_folder("mixtral"))
    stacked = experts.map.matrices["model.layers.0.mlp.experts.down_proj[1]"]
    assert not written_alone(stacked, users_of_sources(experts))


def test_kept_experts_stay_as_they_are(tmp_path: Path) -> None:
    model = tiny("mixtral", tmp_path)
    rules = (
        Rule(match="*.0.mlp.experts.*[[]2]", keep=True),
        Rule(match="*.1.mlp.experts.gate_up_proj*", keep=True),
    )
    quantized(model, tmp_path / "out", Recipe(grid={"kind": "uniform", "bits": 3}, rules=rules))
    matrices = opened(model).map.matrices.values()
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    kept = [
        m for m in matrices
        if m.expert is not None and ((m.name.endswith("[2]") and ".0." in m.name) or ".1.mlp.experts.gate_up" in m.name)
    ]  # fmt: skip
    assert len(kept) == 2 + 4
    same = {source for matrix in kept for source in matrix.sources}
    assert len(same) == 3 + 8  # w1, w2, w3 of one expert; w1 and w3 of four
    for matrix in matrices:
        for source in matrix.sources:
            if source in same or matrix.name in ("lm_head", "model.embed_tokens"):
                assert_same_bits(after[source], before[source])
            else:
                assert not torch.equal(after[source], before[source])


def test_values_of_experts_are_on_their_grid(tmp_path: Path) -> None:
    model = tiny("qwen3_moe", tmp_path, dtype=torch.float32)
    report = quantized(model, tmp_path / "out", "rtn", bits=2, settings={"grid.group_size": 32})
    assert report["plan"]["format"] == "dense"
    after = tensors_of(tmp_path / "out")
    experts = [m for m in opened(model).map.matrices.values() if m.expert is not None]
    assert len(experts) == 16
    for matrix in experts:
        for source in matrix.sources:
            groups = after[source].unfold(1, 32, 32).sort(dim=2).values
            assert int((groups.diff(dim=2) > 0).sum(2).max()) + 1 <= 4  # values of two bits


def test_transposed_weights_keep_their_layout(tmp_path: Path) -> None:
    model = tiny("gpt2", tmp_path, dtype=torch.float32)
    quantized(model, tmp_path / "out", "rtn", bits=2, settings={"grid.group_size": 32})
    weight = tensors_of(tmp_path / "out")["transformer.h.0.mlp.c_fc.weight"]
    assert weight.shape == (64, 256)  # [in, out], and groups lie along the inputs
    groups = weight.t().unfold(1, 32, 32).sort(dim=2).values
    assert int((groups.diff(dim=2) > 0).sum(2).max()) + 1 <= 4


def test_a_missing_matrix_is_an_error(tmp_path: Path) -> None:
    source, planned = opened(TINY_LLAMA), plan_of(TINY_LLAMA)
    output = Output(source, planned, tmp_path)
    with pytest.raises(OutputError, match=r"tensors were never written: .*weight_packed"):
        output.complete()
    output.close()


def test_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = ShardWriter.__init__
    quantized(TINY_LLAMA, tmp_path / "one", "rtn")

    def small(self: ShardWriter, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{**kwargs, "shard_bytes": 600_000})

    monkeypatch.setattr(ShardWriter, "__init__", small)
    quantized(TINY_LLAMA, tmp_path / "many", "rtn")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert_same_bits(many[name], value)


def test_shards_of_a_tensor_each_with_buffers_and_ties(tmp_path: Path) -> None:
    """As on the hub: many files, one table for embedding and head, and tensors that are no weights of linears."""
    model = tiny("qwen2", tmp_path)
    tensors = tensors_of(model)
    assert "lm_head.weight" not in tensors  # tied
    tensors |= {
        "model.rotary_emb.inv_freq": torch.randn(16, dtype=torch.float64),
        "model.layers.0.self_attn.step": torch.tensor([3, -1], dtype=torch.int64),
    }
    (model / "model.safetensors").unlink()
    places = {name: f"model-{i:05}-of-{len(tensors):05}.safetensors" for i, name in enumerate(tensors, 1)}
    for name, place in places.items():
        save_file({name: tensors[name]}, model / place, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    report = quantized(model, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    packed = {f"{linear['name']}.weight" for linear in report["linears"]}
    assert len(packed) == 7 * len(opened(model).map.blocks)
    assert packed < tensors.keys()
    for name in tensors.keys() - packed:
        assert_same_bits(after[name], tensors[name])
    torch.testing.assert_close(stock(tmp_path / "out").lm_head.weight, after["model.embed_tokens.weight"].float())


def test_companions_come_along(tmp_path: Path) -> None:
    quantized(TINY_LLAMA, tmp_path / "out", "rtn")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "mezzotint.json", "mezzotint.checksums.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENCE.md", "README.md",
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (TINY_LLAMA / name).read_bytes()
