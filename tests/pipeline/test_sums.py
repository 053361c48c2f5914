"""Which sums stand for the drift of a group."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mezzotint.core import panels
from mezzotint.core.bits import Bits
from mezzotint.core.files import Entry
from mezzotint.core.statistics import Statistics
from mezzotint.core.structure import Matrix
from mezzotint.grids.uniform import UniformGrid
from mezzotint.pipeline import memory, sweep
from mezzotint.pipeline.tokens import drifts_by_output
from mezzotint.rounding.gptaq import Gptaq
from mezzotint.rounding.gptq import Gptq
from mezzotint.submodules.lpcd import Lpcd
from mezzotint.targets.qep import Qep
from mezzotint.transforms.hadamard import HadamardBasis
from pipeline.runs import TINY_LLAMA, quantized

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
def test_either_sum_gives_the_same_model(recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def record(folder: str) -> Sequence[Any]:
        report = quantized(TINY_LLAMA, tmp_path / folder, recipe, bits=3)
        return [one for one in report["linears"] if one["name"].endswith("down_proj")]

    found = record("products")
    for module in (sweep, memory):
        monkeypatch.setattr(module, "drifts_by_output", lambda *_, **__: False)
    for one, other in zip(found, record("drifts"), strict=True):
        # products of bfloat16 round differently, and some codes lie between
        assert one["h_error"] == pytest.approx(other["h_error"], rel=0.02)
        assert one["objective"] == pytest.approx(other["objective"], rel=0.02)


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
