"""Corrections for what upstream has lost, in whole runs: where they are none, and what is told of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.recipes.recipe import Recipe, Rule, load_recipe
from runs import (
    SMALL,
    TINY_LLAMA,
    assert_same_bits,
    assert_same_tensors,
    least_memory,
    opened,
    quantized,
    request_of,
    stock,
    tensors_of,
    tiny,
    windows_of,
)
from twins import quantized_twin, run

FIRST = "model.layers.0.self_attn"
RANGES = {"grid.range": "weighted"}
# whose inputs are the streams that outputs are added to
NORMS = {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def recipe_of(name: str, settings: dict[str, Any]) -> Recipe:
    return load_recipe(name).with_settings({"grid.bits": 3, **settings})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders without a correction, by the rounding."""
    folder = tmp_path_factory.mktemp("bases")
    for recipe in ("gptq", "rtn"):
        quantized(TINY_LLAMA, folder / recipe, recipe_of(recipe, RANGES))
    return {recipe: folder / recipe for recipe in ("gptq", "rtn")}


@pytest.mark.parametrize("recipe", ["qep-gptq", "loaq-gptq", "gptaq", "qronos", "qep-rtn", "loaq-rtn"])
def test_nothing_to_correct_is_the_base(recipe: str, bases: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantized(TINY_LLAMA, out, recipe_of(recipe, RANGES))
    base, found = tensors_of(bases["rtn" if recipe.endswith("rtn") else "gptq"]), tensors_of(out)
    # before the first matrices nothing is lost yet
    for name in ("q_proj", "k_proj", "v_proj"):
        assert_same_bits(found[f"{FIRST}.{name}.weight_packed"], base[f"{FIRST}.{name}.weight_packed"])
        assert_same_bits(found[f"{FIRST}.{name}.weight_scale"], base[f"{FIRST}.{name}.weight_scale"])
    assert not torch.equal(found[f"{FIRST}.o_proj.weight_packed"], base[f"{FIRST}.o_proj.weight_packed"])


def test_the_objective_is_that_of_the_paper(tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = recipe_of("loaq-gptq", {"refinement.kind": "descent"})
    report = quantized(TINY_LLAMA, out, recipe)
    source, request = opened(TINY_LLAMA), request_of(TINY_LLAMA, recipe)
    original, twin = stock(TINY_LLAMA, torch.float64), quantized_twin(TINY_LLAMA, out)
    for key, windows in zip(("objective", "objective_held_out"), windows_of(source, request), strict=True):
        before, now = (run(model, source, windows.tokens) for model in (original, twin))
        for linear in report["linears"]:
            name = linear["name"]
            w, v = (model.get_parameter(f"{name}.weight").detach() for model in (original, twin))
            lost = (before[name] - now[name]) @ w.t()
            if (norm := NORMS.get(name.rpartition(".")[2])) is not None:
                path = f"{name.rpartition('.')[0].rpartition('.')[0]}.{norm}"
                lost = lost + before[path] - now[path]
            error = now[name] @ (v - w).t()
            expected = ((lost - error).square().sum() - lost.square().sum()) / (now[name] @ w.t()).square().sum()
            assert linear[key] == pytest.approx(float(expected), rel=5e-3, abs=1e-5), name


def test_strength_0_by_pattern(tmp_path: Path) -> None:
    rule = Rule(match="*.mlp.*", set={"target.alpha": 0.0})
    report = quantized(TINY_LLAMA, tmp_path / "out", load_recipe("qep-gptq").with_rules([rule]))
    for linear in report["linears"]:
        corrected = linear["name"].endswith(ATTENTION)
        assert corrected or linear["name"].endswith(MLP)
        assert (linear["objective"] is not None) == corrected  # and where not, no drift was summed


@pytest.mark.parametrize(("recipe", "base"), [("loaq-gptq", "gptq"), ("qep-rtn", "rtn")])
def test_strength_0_is_no_correction(recipe: str, base: str, bases: dict[str, Path], tmp_path: Path) -> None:
    strengths = {"target.alpha": 0.0} | ({"target.beta": 0.0} if recipe == "loaq-gptq" else {})
    report = quantized(TINY_LLAMA, tmp_path / "out", recipe_of(recipe, RANGES | strengths))
    assert_same_tensors(tmp_path / "out", bases[base])
    assert all(linear["objective"] is None for linear in report["linears"])


def test_behind_a_norm_loaq_is_qep_and_says_so(tmp_path: Path) -> None:
    model = tiny("olmo2", tmp_path)
    same = {"target.alpha": 0.5, "target.damping": 1.0}
    said = quantized(model, tmp_path / "loaq", recipe_of("loaq-gptq", same))["decisions"]
    quantized(model, tmp_path / "qep", recipe_of("qep-gptq", same))
    assert_same_tensors(tmp_path / "loaq", tmp_path / "qep")
    assert all("as qep" in why["loaq"] for why in said.values())
    assert len(said) == len(opened(model).map.matrices) - 2  # all but embedding and head


def test_on_the_stream_loaq_is_more(tmp_path: Path) -> None:
    said = quantized(TINY_LLAMA, tmp_path / "out", "loaq-gptq")["decisions"]
    assert {name.rpartition(".")[2] for name, why in said.items() if "loaq" in why} == set(ATTENTION[:3] + MLP[:2])


def test_damping_that_was_needed_is_told(tmp_path: Path) -> None:
    # 128 tokens cannot determine 256 and more inputs
    undamped: dict[str, Any] = {"rounding.damping": 0.0, "target.damping": 0.0}
    report = quantized(TINY_LLAMA, tmp_path / "out", recipe_of("qep-gptq", undamped), samples=5)
    for linear in report["linears"]:
        said = report["decisions"][linear["name"]]
        assert said["rounding.damping"] > 0
        assert said["target.damping"] > 0
    assert all(
        bool(value.isfinite().all()) for value in tensors_of(tmp_path / "out").values() if value.is_floating_point()
    )


@pytest.mark.parametrize("recipe", ["qep-gptq", "gptaq", "qronos"])
def test_memory_grows_by_the_drift_of_one_group(recipe: str) -> None:
    text = {"samples": 64, "seqlen": 128, "calibration": SMALL["calibration"]}
    widest = max(matrix.shape[1] for matrix in opened(TINY_LLAMA).map.matrices.values() if not matrix.lookup)
    grown = least_memory(TINY_LLAMA, recipe, **text) - least_memory(TINY_LLAMA, "gptq", **text)
    # the streams go to a file; in memory are the drift and, while it is solved for, one factor
    assert 0 < grown <= 2 * widest**2 * 4
