"""From a folder to a folder that stock transformers loads, for every architecture there is a tiny model of."""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mezzotint
from mezzotint.core.structure import Matrix
from mezzotint.models import Source
from mezzotint.testing.models import TINY
from runs import HELD_OUT, TINY_LLAMA, assert_same_bits, opened, quantized, stock, tensors_of, tiny

DENSE = {"gpt2", "mixtral", "qwen3_moe", "gpt_oss"}  # Conv1D and stacked experts
DRAWS = 4


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model folder, output folder and report of an architecture, quantized to 8 bits once."""

    @cache
    def made(name: str) -> tuple[Path, Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(name)
        model = tiny(name, folder)
        return model, folder / "out", quantized(model, folder / "out", "gptq", bits=8, samples=16)

    return made


@torch.no_grad()
def logits_of(model: nn.Module, count: int = 4, length: int = 48) -> Tensor:
    tokens = torch.randint(3, 300, (count, length), generator=torch.Generator().manual_seed(1))
    return model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)


@torch.no_grad()
def perturbed_(model: nn.Module, matrices: list[tuple[Matrix, int]], seed: int) -> None:
    """Modifies the model: every weight moves by at most half a step of a min-max grid of 8 bits, uniformly."""
    generator = torch.Generator().manual_seed(seed)
    for matrix, size in matrices:
        weight = matrix.view(model.get_parameter(matrix.parameter))
        groups = weight.unfold(1, size, size)
        step = ((groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)) / 255).repeat_interleave(size, dim=1)
        moved = weight + (torch.rand(weight.shape, generator=generator) - 0.5) * step
        weight.copy_(moved.to(torch.bfloat16))  # what is stored, or what packed weights are decoded to


def typical(difference: Tensor) -> float:
    """Median over tokens of the root mean square: a token that a router sends elsewhere counts once."""
    return float(difference.square().mean(-1).sqrt().median())


@pytest.mark.parametrize("name", list(TINY))
def test_logits_are_those_of_the_original(name: str, eight_bits: Any) -> None:
    """Rounding to 8 bits moves each weight by at most half a step; what uniform moves of that size do is the measure.

    GPTQ errs less than that on text like its calibration, and about a tenth more (measured) on the random tokens here;
    half as much again is allowed, and one bit less would double it. What moves do is averaged over draws.
    """
    model, out, report = eight_bits(name)
    source = opened(model)
    sizes = {e["name"]: e["grid"]["group_size"] for e in report["plan"]["linears"]}
    matrices = [(source.map.matrices[n], sizes[n] or source.map.matrices[n].shape[1]) for n in sizes]
    original = logits_of(stock(model))
    allowed = []
    for seed in range(DRAWS):
        moved = stock(model)
        perturbed_(moved, matrices, seed)
        allowed.append(typical(logits_of(moved) - original))
    found = logits_of(stock(out))
    assert typical(found - original) <= 1.5 * sum(allowed) / DRAWS
    assert typical(found - original) > 0


def weights_of_blocks(source: Source) -> set[str]:
    """Every stored matrix of every block, counted without the map: parameters of two axes, experts one by one."""
    found = set()
    for block in source.map.blocks:
        for name, parameter in source.skeleton.get_submodule(block.path).named_parameters(block.path):
            if parameter.dim() == 2:
                found.add(name)
            elif parameter.dim() == 3:
                found |= {f"{name}[{expert}]" for expert in range(len(parameter))}
    return found


@pytest.mark.parametrize("name", list(TINY))
def test_every_matrix_of_every_block_is_accounted_for(name: str, eight_bits: Any) -> None:
    model, out, report = eight_bits(name)
    assert json.loads((out / "mezzotint.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps({key: value for key, value in report.items() if key != "out"})
    )
    done = {linear["name"] for linear in report["linears"]}
    kept = report["plan"]["kept"]
    for parameter in weights_of_blocks(opened(model)):
        known = {parameter, parameter.removesuffix(".weight")}
        assert (known & done) or any(kept.get(one) for one in known), f"{parameter} is neither quantized nor kept"
    assert report["plan"]["format"] == ("dense" if name in DENSE else "compressed-tensors")
    assert all(linear["weight_error"] > 0 for linear in report["linears"])


@pytest.mark.parametrize("name", list(TINY))
def test_what_is_not_quantized_is_copied_bit_for_bit(name: str, eight_bits: Any) -> None:
    model, out, report = eight_bits(name)
    before, after = tensors_of(model), tensors_of(out)
    matrices = opened(model).map.matrices
    changed = {source for linear in report["linears"] for source in matrices[linear["name"]].sources}
    assert changed <= before.keys()
    assert before.keys() - changed <= after.keys()
    for tensor in before.keys() - changed:
        assert_same_bits(after[tensor], before[tensor])
    packed = {t.rsplit(".weight_", 1)[0] + ".weight" for t in after.keys() - before.keys()}
    assert packed == (set() if name in DENSE else changed)
    if name in DENSE:
        assert all(not torch.equal(after[tensor], before[tensor]) for tensor in changed)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_without_tokens_are_rounded_to_nearest(name: str, tmp_path: Path) -> None:
    """Nothing is known of their inputs: with H = 1 GPTQ is rounding and the weighted range is the plain one."""
    model = tiny(name, tmp_path, dtype=torch.float32)
    report = quantized(model, tmp_path / "gptq", "gptq", bits=3, samples=4, seqlen=16)
    quantized(model, tmp_path / "rtn", "rtn", bits=3)
    matrices = opened(model).map.matrices
    few = {linear["name"] for linear in report["linears"] if linear["decisions"]}
    assert set(report["decisions"]) == few
    experts = [linear["name"] for linear in report["linears"] if matrices[linear["name"]].expert is not None]
    assert few
    assert few < set(experts)
    gptq, rtn = stock(tmp_path / "gptq"), stock(tmp_path / "rtn")
    for expert in experts:
        matrix = matrices[expert]
        found, nearest = (matrix.view(m.get_parameter(matrix.parameter)) for m in (gptq, rtn))
        assert torch.equal(found, nearest) == (expert in few), expert


@pytest.fixture(scope="module")
def three_bits(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The trained model at 3 bits: by recipe packed, and dense."""
    folder = tmp_path_factory.mktemp("three")
    for name, recipe, engine in (("rtn", "rtn", None), ("gptq", "gptq", None), ("dense", "gptq", "dense")):
        quantized(TINY_LLAMA, folder / name, recipe, bits=3, samples=32, seqlen=64, engine=engine)
    return {name: folder / name for name in ("rtn", "gptq", "dense")}


def test_gptq_loses_less_than_rounding(three_bits: Mapping[str, Path]) -> None:
    found = {
        name: mezzotint.evaluate(three_bits[name], HELD_OUT, against=TINY_LLAMA, seqlen=128, windows=24)
        for name in ("rtn", "gptq")
    }
    assert found["gptq"].kl_nats is not None
    assert found["rtn"].kl_nats is not None
    assert found["gptq"].kl_nats + 3 * (found["gptq"].kl_stderr or math.inf) < found["rtn"].kl_nats
    assert found["gptq"].reference_perplexity == found["rtn"].reference_perplexity


def test_packed_and_dense_agree(three_bits: Mapping[str, Path]) -> None:
    packed, dense = mezzotint.load(three_bits["gptq"]), mezzotint.load(three_bits["dense"])
    values = dict(dense.named_parameters())
    for name, parameter in packed.named_parameters():
        # scale * (code - zero point) is rounded to bf16 once by the dense folder, and after one product in bf16 (of a
        # bf16 scale and an exact integer) by the reader of the packed one: at most half a unit in the last place apart
        torch.testing.assert_close(parameter.float(), values[name].float(), rtol=2**-8, atol=0)
    # logits in float32, of weights that agree
    first, second = (logits_of(stock(three_bits[name])) for name in ("gptq", "dense"))
    torch.testing.assert_close(first, second, rtol=0, atol=2**-7 * float(second.abs().max()))


def test_the_head_can_be_quantized(tmp_path: Path) -> None:
    recipe = mezzotint.Recipe(
        grid={"kind": "uniform", "bits": 8},
        rules=({"match": "lm_head", "keep": False},),  # type: ignore[arg-type]
    )
    report = quantized(TINY_LLAMA, tmp_path / "out", recipe)
    assert report["linears"][-1]["name"] == "lm_head"
    assert "lm_head.weight_packed" in tensors_of(tmp_path / "out")
    original, found = logits_of(stock(TINY_LLAMA)), logits_of(stock(tmp_path / "out"))
    assert float((original.softmax(-1) * (original.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()) < 0.01


def test_python_interface(tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": HELD_OUT, "samples": 4, "seqlen": 32, "bits": 4.0}
    planned = mezzotint.plan(TINY_LLAMA, "gptq", **options)
    stages: list[tuple[str, int, int]] = []
    report = mezzotint.quantize(
        str(TINY_LLAMA), out=str(tmp_path / "out"), recipe=mezzotint.Recipe(grid={"kind": "uniform"}),
        listener=lambda p: stages.append((p.stage, p.done, p.total)), **options,
    )  # fmt: skip
    assert report["out"] == str(tmp_path / "out")
    assert report["plan"]["fingerprint"] == planned.plan.fingerprint
    assert stages[-1] == ("quantizing", 21, 21)
    model = mezzotint.load(tmp_path / "out", dtype=torch.float32)
    text = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=5, do_sample=False)
    assert text.shape == (1, 8)
    evaluated = mezzotint.evaluate(tmp_path / "out", HELD_OUT, seqlen=64, windows=2)
    assert evaluated.kl_nats is None
    assert 1 < evaluated.perplexity < 1000
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mezzotint.nothing  # noqa: B018


def test_self_calibration(tmp_path: Path) -> None:
    report = quantized(TINY_LLAMA, tmp_path / "out", "default", calibration="self", samples=4, seqlen=16)
    assert report["plan"]["calibration"] == {"source": "self", "samples": 4, "seqlen": 16}
    again = quantized(TINY_LLAMA, tmp_path / "again", "default", calibration="self", samples=4, seqlen=16)
    assert [x["weight_error"] for x in again["linears"]] == [x["weight_error"] for x in report["linears"]]
