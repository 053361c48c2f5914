"""AWQ from recipe to folder: what is searched, folded and refused, and that the output is a plain model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mezzotint
import twins
from mezzotint.models import open_model
from reference import awq as twin
from runs import HELD_OUT, TINY_LLAMA, quantized, request_of, stock, tensors_of, tiny, windows_of

NORMS = ("input_layernorm", "post_attention_layernorm")
QUARTER = {"transform.strength": 0.25}


def kl(out: Path, model: Path = TINY_LLAMA) -> float:
    found = mezzotint.evaluate(out, HELD_OUT, against=model, seqlen=32, windows=8).kl_nats
    assert found is not None
    return found


@pytest.mark.parametrize("recipe", ["awq", "awq-gptq", "qep-awq", "qep-awq-gptq"])
def test_the_output_is_a_plain_model(recipe: str, tmp_path: Path) -> None:
    report = quantized(TINY_LLAMA, tmp_path / "out", recipe, bits=8, settings=QUARTER)
    assert report["plan"]["format"] == "compressed-tensors"
    assert {d["awq"] for d in report["decisions"].values()} == {0.25}
    original, found = tensors_of(TINY_LLAMA), tensors_of(tmp_path / "out")
    for name in (f"model.layers.1.{norm}.weight" for norm in NORMS):
        assert found[name].dtype == original[name].dtype
        assert float((found[name] / original[name] - 1).abs().max()) > 0.1
    assert torch.equal(found["model.norm.weight"], original["model.norm.weight"])
    # eight bits change next to nothing; a scale that is missing somewhere costs more than a nat
    assert kl(tmp_path / "out") < 0.01
    # and transformers itself sees what we see
    dense = twins.quantized_twin(TINY_LLAMA, tmp_path / "out")
    tokens = torch.arange(3, 19).view(1, 16)
    with torch.no_grad():
        theirs, ours = stock(tmp_path / "out")(tokens).logits.double(), dense(tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02 * float(ours.abs().max()))  # weights in bfloat16


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "opt", "phi3", "mixtral", "gpt2", "falcon_multi_query"])
def test_every_architecture_keeps_its_function(name: str, tmp_path: Path) -> None:
    model = tiny(name, tmp_path, dtype=torch.float32)
    report = quantized(model, tmp_path / "out", "awq", bits=8, samples=16, settings=QUARTER, engine="dense")
    folded = {name.split("layers.")[-1].split("h.")[-1] for name, d in report["decisions"].items() if d["awq"] == 0.25}
    gelu = name in ("gpt2", "falcon_multi_query")
    downs = {d["awq"] for n, d in report["decisions"].items() if n.endswith(("mlp.c_proj", "4h_to_h"))}
    assert folded
    assert downs == (
        {"not scaled: a nonlinearity lies between the two matrices, so scales cannot be folded"} if gelu else set()
    )
    assert kl(tmp_path / "out", model) < 0.01


def test_kept_matrices_that_read_a_norm_follow_it_and_kept_producers_are_left_alone(tmp_path: Path) -> None:
    report = quantized(
        TINY_LLAMA,
        tmp_path / "out",
        "awq",
        bits=8,
        settings=QUARTER,
        keep=("*.1.*.q_proj", "*.1.*.v_proj"),
        engine="dense",
    )
    assert report["decisions"]["model.layers.1.self_attn.o_proj"]["awq"] == "not scaled: what makes its inputs is kept"
    original, found = tensors_of(TINY_LLAMA), tensors_of(tmp_path / "out")
    norm = "model.layers.1.input_layernorm.weight"
    for kept in ("q_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{kept}.weight"
        expected = original[name].float() * (original[norm].float() / found[norm].float())
        torch.testing.assert_close(found[name], expected.to(found[name].dtype), rtol=0, atol=0)
    assert kl(tmp_path / "out") < 0.01


def test_a_basis_that_runs_beside_the_kernel_is_not_folded(tmp_path: Path) -> None:
    rules = {"transform.kind": "none"}
    recipe = mezzotint.Recipe(
        transform={"kind": "awq", "strength": 0.25},
        grid={"kind": "uniform", "bits": 8, "range": "minmax"},
        rounding={"kind": "nearest"},
        rules=[{"match": "*.mlp.*", "set": rules}],
    )
    report = quantized(TINY_LLAMA, tmp_path / "out", recipe)
    assert {name.split(".")[3] for name in report["decisions"]} == {"self_attn"}
    original, found = tensors_of(TINY_LLAMA), tensors_of(tmp_path / "out")
    name = "model.layers.0.post_attention_layernorm.weight"
    assert torch.equal(found[name], original[name])


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], twin.Block]:
    """Strengths chosen in block 0, and what a float64 twin needs to choose them: weights, inputs, submodules."""
    settings = {"grid.range": "minmax", "grid.group_size": 16, "grid.scale_dtype": "float32"}
    out = tmp_path_factory.mktemp("awq") / "out"
    report = quantized(TINY_LLAMA, out, "awq", bits=3, settings=settings, engine="dense")
    source = open_model(TINY_LLAMA)
    fit, _ = windows_of(source, request_of(TINY_LLAMA, "awq", bits=3, settings=settings, engine="dense"))
    model = stock(TINY_LLAMA, torch.float64)
    seen = twins.run(model, source, fit.tokens)
    block = model.get_submodule("model.layers.0")
    inputs = {n.removeprefix("model.layers.0."): x for n, x in seen.items() if n.startswith("model.layers.0.")}
    return report["decisions"], twin.Block(block, inputs, fit.tokens.shape, model)


def linear_loss(block: twin.Block, name: str) -> Callable[[np.ndarray], float]:
    weight, x = block.module.get_submodule(name).weight.detach().numpy(), block.inputs[name].numpy()
    return lambda scale: float(np.square((twin.rounded(weight, scale, bits=3, size=16) - weight) @ x.T).sum())


def module_loss(block: twin.Block, names: list[str], path: str) -> Callable[[np.ndarray], float]:
    linears = [block.module.get_submodule(name) for name in names]
    weights = [linear.weight.detach().clone() for linear in linears]
    reference = block.output(path)

    def loss(scale: np.ndarray) -> float:
        with torch.no_grad():
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.copy_(torch.from_numpy(twin.rounded(weight.numpy(), scale, bits=3, size=16)))
            error = block.output(path) - reference
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.copy_(weight)
        return float(error.square().sum())

    return loss


@pytest.mark.parametrize(
    ("names", "path"),
    [
        (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn"),
        (["self_attn.o_proj"], None),
        (["mlp.gate_proj", "mlp.up_proj"], "mlp"),
        (["mlp.down_proj"], None),
    ],
)
def test_the_strength_is_the_best_of_twenty(
    names: list[str], path: str | None, searched: tuple[dict[str, Any], twin.Block]
) -> None:
    decisions, block = searched
    mean_abs = block.inputs[names[0]].abs().mean(0)
    if names == ["self_attn.o_proj"]:
        mean_abs = grouped_mean(mean_abs, block.module)
    loss = linear_loss(block, names[0]) if path is None else module_loss(block, names, path)
    losses = [loss(twin.scales(mean_abs.numpy(), step / 20)) for step in range(20)]
    chosen = decisions[f"model.layers.0.{names[0]}"]["awq"]
    assert len({round(value, 9) for value in losses}) > 15  # they do differ
    # codes on a boundary may fall on the other side in float32; twenty losses lie some per cent apart
    assert losses[round(chosen * 20)] <= min(losses) * 1.002


def grouped_mean(values: Tensor, block: torch.nn.Module) -> Tensor:
    """One scale for the query heads that share a value head."""
    width = block.self_attn.head_dim
    heads = block.self_attn.v_proj.out_features // width
    apart = values.view(heads, -1, width)
    return apart.mean(1, keepdim=True).expand_as(apart).reshape(-1)
