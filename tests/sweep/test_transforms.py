"""Quantizing in a transformed basis, and on grids that pad: the whole way from a recipe to dense weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.core.contracts import QuantizedWeight
from mezzotint.errors import ConfigError
from mezzotint.jobs.output import Output
from runs import TINY_LLAMA, assert_same_tensors, plan_of, quantized, tiny

Kept = dict[str, QuantizedWeight]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Every quantized weight as it goes to the output."""
    found: Kept = {}
    put = Output.put

    def spy(self: Output, matrix: Any, weight: QuantizedWeight) -> None:
        found[matrix.name] = weight
        put(self, matrix, weight)

    monkeypatch.setattr(Output, "put", spy)
    return found


@pytest.mark.parametrize("recipe", ["trellis", "qep-trellis", "loaq-trellis"])
def test_a_trellis_of_four_bits_keeps_the_model(recipe: str, kept: Kept, tmp_path: Path) -> None:
    report = quantized(TINY_LLAMA, tmp_path / "out", recipe, bits=4.125, samples=16, engine="dense")
    planned = plan_of(TINY_LLAMA, recipe, bits=4.125, samples=16, engine="dense")
    assert report["bits_per_weight"] == pytest.approx(planned.bits_per_weight, abs=1e-12)
    assert report["bits_per_weight_without_side_data"] == pytest.approx(4.125)
    for linear in report["linears"]:
        # the code's own error is .0043 of the weights' energy; feeding errors back raises it and lowers h_error
        assert linear["weight_error"] < 0.02
        assert linear["h_error"] < 0.01
        weight = kept[linear["name"]]
        total = weight.bits().total + 64  # the checksum
        assert linear["bits_per_weight"] == pytest.approx(total / torch.Size(weight.shape).numel())
        (entry,) = (e for e in planned.plan.entries if e.matrix == linear["name"])
        assert (entry.bits.code, entry.bits.total) == (weight.bits().code, total)


def test_matrices_with_one_input_share_its_basis_and_others_do_not(kept: Kept, tmp_path: Path) -> None:
    quantized(TINY_LLAMA, tmp_path / "out", "gptq", bits=4, settings={"transform.kind": "hadamard"}, engine="dense")
    signs = {name: weight.basis.stored["input_sign"].numpy().tobytes() for name, weight in kept.items()}
    block = "model.layers.1.self_attn."
    assert len({signs[block + kind] for kind in ("q_proj", "k_proj", "v_proj")}) == 1
    others = [signs[block + "q_proj"], signs["model.layers.1.mlp.up_proj"], signs["model.layers.2.self_attn.q_proj"]]
    assert len(set(others)) == 3
    outputs = [kept[f"{block}{kind}"].basis.stored["output_scale"].signbit() for kind in ("k_proj", "v_proj")]
    assert not torch.equal(*outputs)


def test_the_seed_decides_the_basis(tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 3, "settings": {"transform.kind": "hadamard"}, "engine": "dense"}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantized(TINY_LLAMA, tmp_path / name, "rtn", seed=seed, **options)
    assert_same_tensors(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_tensors(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("recipe", ["trellis", "loaq-trellis"])
def test_shapes_that_are_no_whole_tiles_are_padded(recipe: str, kept: Kept, tmp_path: Path) -> None:
    model = tiny("llama", tmp_path, hidden_size=40, intermediate_size=56, head_dim=10)
    report = quantized(model, tmp_path / "out", recipe, bits=4, samples=16, engine="dense")
    down = kept["model.layers.0.mlp.down_proj"]
    assert down.shape == (40, 56)
    assert down.grid.shape == (48, 64)
    assert down.bits().total == 12 * 256 * 4 + 32 + 40 * 16 + 56
    assert all(linear["weight_error"] < 0.05 for linear in report["linears"])


def test_experts_in_a_transformed_basis(kept: Kept, tmp_path: Path) -> None:
    model = tiny("mixtral", tmp_path, dtype=torch.float32)
    report = quantized(model, tmp_path / "out", "qep-trellis", bits=4, samples=16, engine="dense")
    experts = [linear for linear in report["linears"] if "experts" in linear["name"]]
    assert experts
    assert all(linear["weight_error"] < 0.05 for linear in experts)


def test_refinement_works_in_the_basis_too(tmp_path: Path) -> None:
    settings = {"transform.kind": "hadamard", "refinement.kind": "descent"}
    plain = quantized(
        TINY_LLAMA,
        tmp_path / "a",
        "loaq-gptq",
        bits=3,
        samples=16,
        engine="dense",
        settings={"transform.kind": "hadamard"},
    )
    better = quantized(TINY_LLAMA, tmp_path / "b", "loaq-gptq", bits=3, samples=16, engine="dense", settings=settings)
    accepted = [linear for linear in better["linears"] if linear["decisions"]["refinement"] == "accepted"]
    assert len(accepted) > len(better["linears"]) / 2
    # the first group has no drift yet: the same aim on the same statistics
    for before, after in zip(plain["linears"][:3], better["linears"][:3], strict=True):
        assert after["h_error"] < before["h_error"]


def test_a_refinement_is_refused_where_it_does_not_serve() -> None:
    with pytest.raises(ConfigError, match="serves grids of kind uniform, not 'trellis'"):
        plan_of(TINY_LLAMA, "trellis", settings={"refinement.kind": "descent"}, engine="dense")
    with pytest.raises(ConfigError, match="gives every row a scale of its own"):
        plan_of(TINY_LLAMA, "default", settings={"grid.scale_per": "matrix"})


def test_one_scale_for_a_matrix_goes_into_the_own_format() -> None:
    settings = {"grid.scale_per": "matrix", "grid.range": "error"}
    plan = plan_of(TINY_LLAMA, "rtn", settings=settings)
    assert plan.plan.format == "mezzotint"
    # a scale in the dtype of the model, a zero point in a byte, the checksum; rows fill whole words
    assert {entry.bits.side for entry in plan.plan.entries} == {16 + 8 + 64}
