"""What engines load: the tables, and the rules that follow from them."""

from dataclasses import replace

import pytest

from formats.llama import UNIFORM, entry_of, grids_of, make_llama, map_of, plan_of
from mezzotint.core.structure import Matrix
from mezzotint.formats.compressed_tensors import CompressedTensors
from mezzotint.formats.gptq import Gptq, GptqV2
from mezzotint.formats.loading import ANY, engines
from mezzotint.grids.uniform import UniformGrid
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
    model = replace(MODEL, matrices=MODEL.matrices | {expert.name: expert})
    plan = plan_of(grids_of(MODEL, {}), model, CompressedTensors(), engine)
    assert [refusal.rule for refusal in engines()[engine].refuses_plan(plan, model)] == rules


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
        ("vllm", "gptq", {"bits": 8}, None, None),
        ("vllm", "gptq-v2", {"symmetric": False}, "engine-zero-points", {"symmetric": True}),
        ("vllm-cpu", "gptq", {"bits": 8}, "engine-bits", {"bits": 4}),
        ("gptqmodel", "gptq-v2", {"bits": 3, "symmetric": False}, None, None),
        ("gptqmodel", "gptq", {"group_size": 48}, "engine-group-size", {"group_size": 32}),
        ("sglang", "compressed-tensors", {"bits": 5}, "engine-bits", {"bits": 4}),
        ("sglang", "compressed-tensors", {"bits": 6}, "engine-bits", {"bits": 8}),
        ("llama.cpp", "gguf", {"bits": 3}, None, None),  # what GGUF cannot hold, the format refuses
    ],
)
def test_rules_of_entries_name_the_nearest_that_loads(
    engine: str, form: str, changes: dict[str, object], rule: str | None, nearest: dict[str, object] | None
):
    matrix = replace(MODEL.matrices["model.layers.0.mlp.down_proj"], shape=(64, 192))
    grid = replace(UNIFORM, **changes)
    refusal = engines()[engine].refuses(form, entry_of(grid, matrix), matrix, head=False)
    assert (None if refusal is None else refusal.rule) == rule
    if refusal is not None and nearest is not None:
        assert refusal.nearest == replace(grid, **nearest)
        (name, value), *_ = nearest.items()
        assert f"--set grid.{name}={str(value).lower()}" in str(refusal)
        assert engines()[engine].refuses(form, entry_of(refusal.nearest, matrix), matrix, head=False) is None


def test_heads_and_odd_widths():
    cpu = engines()["vllm-cpu"]
    head = MODEL.matrices["lm_head"]
    refusal = cpu.refuses("compressed-tensors", entry_of(UNIFORM, head), head, head=True)
    assert refusal is not None
    assert refusal.rule == "engine-head"
    odd = replace(MODEL.matrices["model.layers.0.mlp.down_proj"], shape=(40, 192))
    refusal = cpu.refuses("compressed-tensors", entry_of(UNIFORM, odd), odd, head=False)
    assert refusal is not None
    assert refusal.rule == "engine-width"
    assert "40 x 192" in str(refusal)
