"""Which sums stand for the drift of a group."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.core import panels
from mezzotint.core.bits import Bits
from mezzotint.core.plans import Entry
from mezzotint.core.statistics import Statistics
from mezzotint.core.structure import Matrix
from mezzotint.grids.uniform import UniformGrid
from mezzotint.planning import memory
from mezzotint.planning.needs import drifts_by_output
from mezzotint.rounding.gptaq import Gptaq
from mezzotint.rounding.gptq import Gptq
from mezzotint.submodules.lpcd import Lpcd
from mezzotint.sweep import sweep
from mezzotint.sweep.solve import Solved, Solver
from mezzotint.targets.qep import Qep
from mezzotint.transforms.hadamard import HadamardBasis
from runs import TINY_LLAMA, assert_same_bits, quantized

FIRST = "model.layers.0.mlp.down_proj"
ENTRY = Entry(
    matrix="",
    block=0,
    target=Qep(),
    transform=None,
    grid=UniformGrid(bits=3),
    rounding=Gptq(),
    refinement=None,
    bits=Bits(3, 1),
    because="",
)


def decided(*members: tuple[tuple[int, int], int | None], filed: bool = False, **changes: Any) -> bool:
    """Of matrices of these shapes and experts in one group."""
    matrices = {
        str(i): Matrix(name=str(i), parameter=str(i), sources=(str(i),), shape=shape, expert=expert, fusion="")
        for i, (shape, expert) in enumerate(members)
    }
    return drifts_by_output([replace(ENTRY, matrix=name, **changes) for name in matrices], matrices, filed=filed)


def test_products_are_summed_where_they_take_less() -> None:
    assert decided(((4, 8), None))
    assert decided(((4, 8), 0), ((4, 8), 1))  # each expert has sums of its own
    assert not decided(((5, 8), None))
    assert not decided(((4, 8), 0), ((5, 8), 1))
    assert not decided()


def test_matrices_that_share_inputs_share_their_drift() -> None:
    assert not decided(((2, 8), None), ((2, 8), None))
    assert not decided(((2, 8), 3), ((2, 8), 3))


@pytest.mark.parametrize("changes", [{"rounding": Gptaq()}, {"submodules": Lpcd()}])
def test_what_works_on_the_drift_or_changes_weights_gets_that_of_inputs(changes: dict[str, Any]) -> None:
    assert not decided(((2, 8), None), **changes)


def test_squares_in_files_take_less_than_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decided(((2, 8), None), filed=True)  # too small for a file
    monkeypatch.setattr(panels, "PANEL_BYTES", 255)
    assert not decided(((2, 8), None), filed=True)
    assert decided(((2, 8), None))


@pytest.mark.parametrize("recipe", ["qep-gptq", "default"])
def test_either_sum_gives_the_same_aim(recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the first down projection: up to it both runs do the same, and behind it codes that lie between two differ."""
    seen: list[Solved] = []
    deliver = Solver.deliver

    def spy(self: Solver, solved: Solved) -> None:
        if solved.matrix.name == FIRST:
            seen.append(replace(solved, weight=solved.weight.float().clone()))
        deliver(self, solved)

    def objective(folder: str) -> float:
        report = quantized(TINY_LLAMA, tmp_path / folder, recipe, bits=3)
        return next(one["objective"] for one in report["linears"] if one["name"] == FIRST)

    monkeypatch.setattr(Solver, "deliver", spy)
    told = [objective("products")]
    for module in (sweep, memory):
        monkeypatch.setattr(module, "drifts_by_output", lambda *_, **__: False)
    told.append(objective("drifts"))
    weight, (products, drifts) = seen[0].weight, [solved.known.fit for solved in seen]
    assert products is not None
    assert drifts is not None
    assert products.output_drift is not None
    assert drifts.drift is not None
    assert_same_bits(seen[1].weight, weight)
    assert_same_bits(products.gram, drifts.gram)
    # Either way T = 224 tokens and n = 768 columns are summed in float32, with roundings of 2^-24. Terms differ in
    # sign, so that sums and roundings alike walk at random: sqrt(T) + sqrt(n) = 43 steps of 2^-24 of a sum.
    error = 2**-24 * 64
    pull = weight @ drifts.drift
    assert norm(products.output_drift - pull) <= error * norm(pull)
    # What an aim adds to the weight solves a system with the gram plus at least .3 of its mean diagonal: that
    # multiplies relative errors by the condition, 80 to 260 here, and the sum with the weight is rounded.
    ridge = 0.3 * float(drifts.gram.diagonal().mean())
    condition = 1 + float(torch.linalg.matrix_norm(drifts.gram.double(), 2)) / ridge
    aims = [solved.aim.matrix for solved in seen]
    assert norm(aims[0] - aims[1]) <= condition * error * norm(aims[1] - weight) + 2**-24 * norm(weight)
    # of its three traces of n columns the two in the numerator are twice as large as their difference
    for solved, value in zip(seen, told, strict=True):
        assert value == pytest.approx(objective_of(solved, drifts), rel=1e-3)


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix))


def objective_of(solved: Solved, sums: Statistics) -> float:
    """In float64: what a matrix loses with what was lost before it, from the drift of its inputs."""
    assert sums.drift is not None
    weight, error, gram = solved.weight.double(), (solved.value - solved.weight).double(), sums.gram.double()
    pull = weight @ sums.drift.double()
    if sums.residual is not None:
        pull += sums.residual.double()
    own = float(((error @ gram - 2 * pull) * error).sum())
    return own / float((weight @ gram * weight).sum())


@pytest.mark.parametrize(("recipe", "turned"), [("gptaq", True), ("qep-gptq", False)])
def test_drift_is_turned_where_a_rounding_works_on_it(
    recipe: str, turned: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Statistics] = []
    statistics = HadamardBasis.statistics

    def spy(self: HadamardBasis, s: Statistics) -> Statistics:
        seen.append(statistics(self, s))
        return seen[-1]

    monkeypatch.setattr(HadamardBasis, "statistics", spy)
    report = quantized(TINY_LLAMA, tmp_path / "out", recipe, bits=3, settings={"transform.kind": "hadamard"})
    assert len(seen) >= 12  # groups
    assert {s.has_drift for s in seen} == {turned}
    assert all(one["objective"] is not None for one in report["linears"])
