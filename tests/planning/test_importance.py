"""``--imatrix``: rounding to nearest on ranges that an importance matrix weighs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, get_tensor_name_map

import mezzotint
from formats.imatrix_files import write_binary_imatrix, write_gguf_imatrix
from mezzotint.blockwise.source import open_source
from mezzotint.errors import ConfigError, FormatError
from mezzotint.grids.gguf.grid import GgufGrid
from mezzotint.grids.uniform import UniformGrid
from mezzotint.planning.plan import make_plan
from mezzotint.planning.planned import Planned
from mezzotint.recipes.recipe import Rule, load_recipe
from mezzotint.recipes.request import make_request
from mezzotint.report.command import command_of
from runs import TINY_LLAMA, assert_same_tensors, opened

TOKENS = 1024.0


@pytest.fixture(scope="module")
def means() -> dict[str, np.ndarray]:
    """Mean squares of another size for every input of every linear of the blocks, by GGUF name."""
    source, random = opened(TINY_LLAMA), np.random.default_rng(0)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, len(source.map.blocks))
    linears = [name for block in source.map.blocks for group in block.groups for name in group.matrices]
    return {
        f"{names.get_name(name)}.weight": random.lognormal(0, 2, source.map.matrices[name].shape[1]).astype(np.float32)
        for name in linears
    }


@pytest.fixture(scope="module")
def imatrix(means: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "i.gguf"
    sums = {name: mean * np.float32(TOKENS) for name, mean in means.items()}
    write_gguf_imatrix(path, sums, {name: [TOKENS] for name in means})
    return path


def plan_with(imatrix: Path, recipe: Any = "rtn", **options: Any) -> Planned:
    request = make_request(TINY_LLAMA, recipe, imatrix=imatrix, device="cpu", **options)
    return make_plan(opened(TINY_LLAMA), request)


def made_with(imatrix: Path, out: Path, **options: Any) -> dict[str, Any]:
    return mezzotint.quantize(TINY_LLAMA, "rtn", out=out, imatrix=imatrix, device="cpu", **options)


def test_ranges_are_weighted_by_the_file(imatrix: Path, means: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Also of q and k, whose rows lie in another order in GGUF files; their inputs do not."""
    settings = {"grid.type": "Q3_K"}
    report = made_with(imatrix, tmp_path / "out", engine="llama.cpp", settings=settings, keep=["*.[12].*"])
    assert "--imatrix i.gguf" in report["command"]
    assert report["plan"]["imatrix"] == "i.gguf"
    assert report["plan"]["calibration"] is None
    original, source = opened(TINY_LLAMA), open_source(tmp_path / "out")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, len(original.map.blocks))
    for linear in report["linears"]:
        weight = original.checkpoint.parameter(linear["name"] + ".weight").float()
        mean = torch.from_numpy(means[f"{names.get_name(linear['name'])}.weight"])
        grid = GgufGrid(type="Q3_K").fit(weight, mean)
        twin = grid.decode(grid.encode(weight))
        torch.testing.assert_close(source.checkpoint.parameter(linear["name"] + ".weight"), twin, rtol=0, atol=0)
        error = ((twin - weight).square() * mean).sum() / (weight.square() * mean).sum()
        # two sums of 65,536 numbers in float32
        torch.testing.assert_close(linear["h_error"], float(error), rtol=1e-4, atol=0)
        assert linear["tokens"] == TOKENS


def test_both_layouts_give_the_same_bits(imatrix: Path, means: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_binary_imatrix(tmp_path / "i.dat", means, chunks=2)  # products with powers of two are exact
    made_with(imatrix, tmp_path / "a", bits=3.0)
    made_with(tmp_path / "i.dat", tmp_path / "b", bits=3.0)
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


def test_presets_weigh_their_ranges_where_nothing_else_is_said(imatrix: Path) -> None:
    planned = plan_with(imatrix)
    assert planned.calibration is None
    assert all(isinstance(e.grid, UniformGrid) and e.grid.range == "weighted" for e in planned.plan.entries)
    assert "--imatrix i.gguf" in command_of(planned.request, None, "out")


def test_another_file_is_another_plan(imatrix: Path, means: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_binary_imatrix(tmp_path / "i.dat", means, chunks=2)
    assert plan_with(imatrix).plan.fingerprint != plan_with(tmp_path / "i.dat").plan.fingerprint
    assert plan_with(imatrix).plan.fingerprint == plan_with(imatrix).plan.fingerprint


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("gptq", {}, "rounding 'gptq' needs the products of all inputs.*--recipe rtn"),
        ("qep-rtn", {}, "target 'qep' needs the products"),
        ("default", {}, "target 'loaq' needs the products"),
        ("awq", {}, "transform 'awq' needs the products"),
        ("rtn", {"settings": {"transform.kind": "hadamard"}}, "range 'weighted' in the basis of transform 'hadamard'"),
        ("rtn", {"settings": {"refinement.kind": "descent"}}, "refinement 'descent' needs the products"),
        ("rtn", {"settings": {"grid.range": "error"}}, "nothing here is weighted by it"),
        ("rtn", {"calibration": "text.txt"}, "replaces calibration text"),
        ("rtn", {"samples": 8}, "replaces calibration text"),
        ("rtn", {"seqlen": 64}, "replaces calibration text"),
    ],
)
def test_what_it_is_not_enough_for(imatrix: Path, recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_with(imatrix, recipe, **options)


def test_bits_are_not_allocated_by_it(imatrix: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs calibration text"):
        made_with(imatrix, tmp_path / "out", engine="llama.cpp", bits=4.0)


def test_a_matrix_that_is_not_in_it(imatrix: Path) -> None:
    head = load_recipe("rtn").with_settings({"grid.range": "weighted"}).with_rules([Rule(match="lm_head", keep=False)])
    with pytest.raises(FormatError, match=r"nothing for lm_head \(output.weight\).*--process-output"):
        plan_with(imatrix, head)
    error = Rule(match="lm_head", keep=False, set={"grid.range": "error"})
    assert plan_with(imatrix, head.with_rules([error])).plan.entries[-1].matrix == "lm_head"


def test_a_file_of_another_model(tmp_path: Path, means: dict[str, np.ndarray]) -> None:
    write_binary_imatrix(tmp_path / "i.dat", means | {"blk.1.attn_v.weight": np.ones(8)}, chunks=2)
    with pytest.raises(FormatError, match=r"has 8 inputs for model.layers.1.self_attn.v_proj.*which has 256"):
        plan_with(tmp_path / "i.dat")


def test_models_that_llama_cpp_does_not_know(imatrix: Path, tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("gpt2")
    request = make_request(folder, "rtn", imatrix=imatrix, device="cpu")
    with pytest.raises(FormatError, match="not for model_type 'gpt2'"):
        make_plan(opened(folder), request)


def test_inputs_that_were_never_seen_count_alike(means: dict[str, np.ndarray], tmp_path: Path) -> None:
    """As in llama.cpp, which takes ones for them."""
    sums = {name: np.zeros_like(mean) for name, mean in means.items()}
    write_gguf_imatrix(tmp_path / "i.gguf", sums, {name: [0.0] for name in means})
    report = made_with(tmp_path / "i.gguf", tmp_path / "out", bits=3.0)
    assert all("isotropic: only 0 tokens" in one["statistics"] for one in report["decisions"].values())
    write_binary_imatrix(tmp_path / "ones.dat", {name: np.ones_like(mean) for name, mean in means.items()}, chunks=2)
    made_with(tmp_path / "ones.dat", tmp_path / "ones", bits=3.0)
    assert_same_tensors(tmp_path / "out", tmp_path / "ones")
