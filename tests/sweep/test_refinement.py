"""A refinement stays only where the held-out tokens say that it is better: by itself, in the solver, in a whole run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mezzotint.core.contracts import Aim, Matrix, QuantizedWeight, Rounded, Target
from mezzotint.core.curvature import Curvature, Fisher
from mezzotint.core.plans import Entry
from mezzotint.core.records import MatrixRecord
from mezzotint.core.statistics import Statistics
from mezzotint.grids.uniform import UniformGrid
from mezzotint.rounding.gptq import Gptq
from mezzotint.rounding.refine import Descent
from mezzotint.sweep.solve import Solver, refined
from mezzotint.targets.loaq import Loaq
from mezzotint.targets.qep import quadratic_of
from mezzotint.targets.weight import WeightTarget
from mezzotint.testing.problems import LinearProblem, ProblemSettings, Tokens, make_problem, make_tokens
from runs import assert_same_bits, quantized, tensors_of

Folder = Callable[[str], Path]
ROWS, COLUMNS = 6, 24
GRID = UniformGrid(bits=3, group_size=8, scale_dtype="float32")
MATRIX = Matrix(name="up", parameter="up", sources=("up.weight",), shape=(ROWS, COLUMNS), fusion="0.up")
ENTRY = Entry(
    matrix="up",
    block=0,
    target=WeightTarget(),
    transform=None,
    grid=GRID,
    rounding=Gptq(),
    refinement=Descent(),
    bits=GRID.stored_bits(MATRIX.shape),
    because="test",
)
SEEDS = range(10)


def problem_of(seed: int) -> tuple[LinearProblem, Tokens]:
    """A matrix with hardly more tokens to fit on than columns, and as many that are held out."""
    settings = ProblemSettings(grid=GRID, rows=ROWS, columns=COLUMNS, tokens=54, seed=seed, dtype=torch.float32)
    fit, held_out = (
        Tokens(quantized=part[0], original=part[1], difference=part[2])
        for tokens in [make_tokens(settings)]
        for part in zip(*(t.chunk(2) for t in (tokens.quantized, tokens.original, tokens.difference)), strict=True)
    )
    return replace(make_problem(settings), statistics=fit.statistics()), held_out


def square_of(seed: int) -> Curvature:
    """One block of rows that have much to do with each other."""
    g = torch.randn(16, 20, generator=torch.Generator().manual_seed(seed))
    g[:ROWS] += 3 * g[0]
    g[ROWS:] = 0
    return Curvature(blocks=(g @ g.T)[None], rows=ROWS)


def loss(value: Tensor, weight: Tensor, tokens: Tokens, square: Any) -> float:
    """``tr(A E E')`` of the errors that the stream has behind the matrix, token by token."""
    error = tokens.original @ weight.T + tokens.difference - tokens.quantized @ value.T
    return float(np.trace(square @ error.T.double().numpy() @ error.double().numpy()))


def solved(entry: Entry, problem: LinearProblem, held_out: Statistics | None, curvature: Any = None) -> tuple[Any, str]:
    """What the solver makes of a matrix, and what it says of the refinement."""
    kept: list[QuantizedWeight] = []
    records: list[MatrixRecord] = []
    solver = Solver(
        {"up": entry}, sink=lambda _, weight: kept.append(weight), notify=records.append, seed=0,
        curvature=lambda _: curvature,
    )  # fmt: skip
    (found,) = solver.solve([(MATRIX, problem.weight)], problem.statistics, held_out, place=0)
    solver.deliver(found)
    assert_same_bits(kept[0].dense(), found.value)
    return kept[0], str(records[0].decisions.get("refinement"))


def rounded_of(problem: LinearProblem, aim: Aim) -> Rounded:
    return Gptq().round(aim, GRID.fit(aim.matrix, problem.statistics.importance), problem.statistics)


def assert_same(found: Rounded | QuantizedWeight, expected: Rounded | QuantizedWeight) -> None:
    assert_same_bits(found.code, expected.code)
    for name, value in expected.grid.parameters.items():
        assert_same_bits(found.grid.parameters[name], value)


@pytest.mark.parametrize(
    ("after", "told"),
    [(0.9, "accepted"), (1.0, "refused: worse"), (1.1, "refused: worse"), (float("nan"), "refused: worse")],
)
def test_it_is_kept_only_where_its_judge_falls(after: float, told: str) -> None:
    problem, _ = problem_of(0)
    rounded = rounded_of(problem, problem.aim)
    distance = quadratic_of(problem.weight, replace(problem.statistics, drift=None, residual=None))
    wanted = Descent().refine(rounded, problem.weight, distance, lambda _: rounded)
    with pytest.raises(AssertionError):
        assert_same(wanted, rounded)
    asked: list[Rounded] = []

    def judge(found: Rounded) -> float:
        asked.append(found)
        return 1.0 if found is rounded else after

    found, said = refined(ENTRY, rounded, problem.aim, problem.statistics, judge)
    assert said.startswith(told)
    assert_same(found, wanted if told == "accepted" else rounded)
    assert len(asked) == 2


@pytest.mark.parametrize("held_out", [None, "no tokens"])
def test_nothing_is_kept_that_nothing_can_judge(held_out: str | None) -> None:
    problem, _ = problem_of(0)
    rounded = rounded_of(problem, problem.aim)
    found, said = refined(ENTRY, rounded, problem.aim, problem.statistics, None)
    assert found is rounded
    assert said.startswith("refused: there are no held-out windows")
    nothing = Statistics(tokens=0.0, gram=torch.zeros(COLUMNS, COLUMNS))
    weight, told = solved(ENTRY, problem, nothing if held_out else None)
    assert told == said
    assert_same(weight, rounded)


@pytest.mark.parametrize("target", [WeightTarget(), Loaq()])
@pytest.mark.parametrize("curved", [False, True])
def test_the_solver_asks_the_loss_of_held_out_tokens(target: Target, curved: bool) -> None:
    """Drift and residual stream included, in the norm of the curvature: by the tokens themselves."""
    entry = replace(ENTRY, target=target, curvature=Fisher(block_size=16) if curved else None)
    said: list[str] = []
    for seed in SEEDS:
        problem, tokens = problem_of(seed)
        curvature = square_of(seed) if curved else None
        square = np.eye(ROWS) if curvature is None else curvature.damped(0.1).blocks[0, :ROWS, :ROWS].numpy()
        plain, told = solved(replace(entry, refinement=None), problem, tokens.statistics(), curvature)
        assert told == "None"
        aim = entry.target.aim(problem.weight, problem.statistics, None)
        aim = replace(aim, curvature=None if curvature is None else curvature.damped(0.1))
        rounded = rounded_of(problem, aim)
        assert_same(plain, rounded)
        better, _ = refined(entry, rounded, aim, problem.statistics, lambda one, same=rounded: float(one is same))
        weight, told = solved(entry, problem, tokens.statistics(), curvature)
        after, before = (loss(one.value, problem.weight, tokens, square) for one in (better, rounded))
        falls = after < before
        assert told == ("accepted" if falls else "refused: worse on the held-out windows")
        assert_same(weight, better if falls else rounded)
        said.append(told)
    assert len(set(said)) == 2


def test_a_run_is_the_plain_one_where_it_was_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 4, "samples": 4, "engine": "dense"}
    plain = quantized(tiny_folder("llama"), tmp_path / "plain", "qep-gptq", **options)
    settings = {"refinement.kind": "descent"}
    better = quantized(tiny_folder("llama"), tmp_path / "better", "qep-gptq", settings=settings, **options)
    first, second = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "better")
    told = [linear["decisions"]["refinement"] for linear in better["linears"]]
    # the first group has the same inputs in both runs, and no drift yet
    for before, after, said in zip(plain["linears"][:3], better["linears"][:3], told, strict=False):
        name = f"{after['name']}.weight"
        if said == "accepted":
            assert not torch.equal(second[name], first[name])
            assert after["h_error_held_out"] < before["h_error_held_out"]
        else:
            assert said.startswith("refused: worse")
            assert_same_bits(second[name], first[name])
            assert after["h_error_held_out"] == before["h_error_held_out"]
    assert len(set(told[:3])) == 2
