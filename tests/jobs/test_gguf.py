"""``--for llama.cpp``: from a folder to one file that is evaluated as it is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mezzotint
from mezzotint.allocation.knapsack import Knapsack
from mezzotint.blockwise.source import open_source
from mezzotint.budgeting.pricing import menus
from mezzotint.errors import ConfigError, FormatError
from mezzotint.formats.gguf.file import GgufFile
from mezzotint.grids.gguf.grid import GgufGrid
from mezzotint.planning.plan import make_plan
from mezzotint.recipes.recipe import Rule, load_recipe
from runs import HELD_OUT, TINY_LLAMA, opened, plan_of, quantized, request_of

GGUF = {"grid.kind": "gguf", "grid.type": "Q3_K"}
BETTER = Rule(match="*.v_proj", set={"grid.type": "Q6_K"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("gguf") / "out"
    recipe = load_recipe("qep-gptq").with_settings(GGUF).with_rules([BETTER])
    return out, quantized(TINY_LLAMA, out, recipe, engine="llama.cpp")


def test_the_folder_holds_one_file_that_says_all(made: tuple[Path, dict]) -> None:
    out, report = made
    assert not list(out.glob("*.safetensors*"))
    assert report["output_bytes"] == (out / "model.gguf").stat().st_size
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    tensors = GgufFile.open(out / "model.gguf").tensors
    for linear in report["plan"]["linears"]:
        kind = "Q6_K" if "v_proj" in linear["name"] else "Q3_K"
        assert linear["grid"]["type"] == kind
        assert linear["bits_per_weight"] == {"Q6_K": 6.5625, "Q3_K": 3.4375}[kind]
    assert tensors["blk.1.attn_v.weight"].type == "Q6_K"
    assert tensors["blk.1.ffn_down.weight"].type == "Q3_K"
    assert tensors["token_embd.weight"].type == "Q3_K"
    assert tensors["output.weight"].type == "Q6_K"


@pytest.mark.parametrize("path", ["", "model.gguf"])
def test_it_is_evaluated_as_it_is(made: tuple[Path, dict], path: str) -> None:
    found = mezzotint.evaluate(made[0] / path, str(HELD_OUT), against=TINY_LLAMA, seqlen=64, windows=4)
    assert 0 < found.kl_nats < 0.2


def test_what_is_read_is_what_was_rounded(made: tuple[Path, dict]) -> None:
    """The error of each matrix in the file is the one in the report."""
    out, report = made
    source, original = open_source(out), opened(TINY_LLAMA)
    for linear in report["linears"]:
        name = f"{linear['name']}.weight"
        weight = original.checkpoint.parameter(name).float()
        error = (source.checkpoint.parameter(name) - weight).square().sum() / weight.square().sum()
        torch.testing.assert_close(float(error), linear["weight_error"], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_submodules_are_optimised_on_block_types(tmp_path: Path) -> None:
    every = {"submodules.parts": ["qk", "vo", "updown"]}
    report = quantized(TINY_LLAMA, tmp_path / "out", "lpcd-gptq", engine="llama.cpp", settings=every)
    tensors = GgufFile.open(tmp_path / "out" / "model.gguf").tensors
    assert {tensors[f"blk.2.{name}.weight"].type for name in ("attn_q", "attn_v", "ffn_up", "ffn_down")} == {"Q4_K"}
    losses = [loss for block in report["blocks"] for loss in block["submodules"].values()]
    assert len(losses) == 9  # three submodules of each block
    assert all(loss["after"] <= loss["before"] for loss in losses)
    assert any(loss["after"] < loss["before"] for loss in losses)


def test_block_types_choose_the_format() -> None:
    assert plan_of(TINY_LLAMA, settings=GGUF).plan.format == "gguf"


def test_widths_take_the_type_that_fits(tiny_folder: Callable[[str], Path]) -> None:
    planned = plan_of(tiny_folder("llama"), settings=GGUF, engine="llama.cpp")
    types = {entry.grid.type for entry in planned.plan.entries if isinstance(entry.grid, GgufGrid)}
    assert types == {"Q4_0"}


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "tiny_llama",
            {"settings": {"grid.kind": "uniform"}},
            FormatError,
            r"uniform.*GGUF's own block types.*grid.kind=gguf --set grid.type=Q4_K.*gguf-only",
        ),
        ("tiny_llama", {"settings": {**GGUF, "transform.kind": "hadamard"}}, FormatError, "no-transform"),
        ("tiny_llama", {"settings": {**GGUF, "grid.type": "Q4_L"}}, ConfigError, "Q4_L"),
        ("gpt2", {"settings": GGUF}, FormatError, r"not for model_type 'gpt2'|nn.Linear only"),
    ],
)
def test_refusals_come_before_work(
    name: str, options: dict, error: type[Exception], message: str, tiny_folder: Callable[[str], Path]
) -> None:
    folder = TINY_LLAMA if name == "tiny_llama" else tiny_folder(name)
    with pytest.raises(error, match=message):
        plan_of(folder, engine="llama.cpp", **options)


def test_presets_of_integers_take_the_types_of_gguf_where_nothing_else_is_said() -> None:
    planned = plan_of(TINY_LLAMA, "default", engine="llama.cpp")
    assert planned.plan.format == "gguf"
    assert {entry.grid for entry in planned.plan.entries} == {GgufGrid(type="Q4_K", range="weighted")}
    assert all(entry.refinement is None for entry in planned.plan.entries)
    plain = plan_of(TINY_LLAMA, "rtn", engine="llama.cpp", settings={"grid.type": "Q5_K"})
    assert {entry.grid for entry in plain.plan.entries} == {GgufGrid(type="Q5_K", range="error")}
    assert all(entry.grid.kind == "uniform" for entry in plan_of(TINY_LLAMA, "default").plan.entries)


def test_bits_and_sizes_are_allocated_over_types(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fast = {"allocation.windows": 2, "allocation.guard": False, "allocation.menu": ["Q2_K", "Q3_K", "Q4_0", "Q6_K"]}
    report = quantized(TINY_LLAMA, out, "rtn", engine="llama.cpp", bits=4.0, settings=fast, samples=4)
    types = {linear["grid"]["type"] for linear in report["plan"]["linears"]}
    assert len(types) > 2
    assert 3.8 < report["bits_per_weight"] <= 4.0
    uniform = [point["type"] for point in report["allocation"]["frontier"] if point["kind"] == "uniform"]
    assert uniform == ["Q2_K", "Q3_K", "Q4_0", "Q6_K"]
    assert sum(path.stat().st_size for path in out.iterdir()) <= report["allocation"]["chosen"]["bytes"]
    assert mezzotint.evaluate(out, HELD_OUT, against=TINY_LLAMA, seqlen=32, windows=4).kl_nats < 0.05


def test_a_menu_of_types(tiny_folder: Callable[[str], Path]) -> None:
    """Of widths that 256 do not divide, a type is its fallback, and others come between."""
    source = opened(tiny_folder("llama"))
    request = request_of(source.folder, "rtn", engine="llama.cpp", bits=5.0)
    planned = make_plan(source, replace(request, recipe=request.recipe.with_settings({"allocation.kind": "none"})))
    (menu, *_) = menus(source, planned, request.recipe.stages().allocation).values()
    assert {label: grid.type for label, grid in menu.items()} == {
        "Q2_K": "Q4_0",
        "Q3_K": "Q4_0",
        "IQ4_NL": "IQ4_NL",
        "Q4_1": "Q4_1",
        "Q4_K": "Q5_0",
        "Q5_K": "Q5_1",
        "Q6_K": "Q8_0",
        "Q8_0": "Q8_0",
    }
    named = Knapsack(bits=5, menu=("Q4_1", "Q8_0"))
    assert {tuple(menu) for menu in menus(source, planned, named).values()} == {("Q4_1", "Q8_0")}
    with pytest.raises(ConfigError, match="chosen by names of types"):
        menus(source, planned, Knapsack(bits=5, menu=(4, 8)))
