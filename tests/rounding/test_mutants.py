"""Do the tests against the textbook notice a GPTQ that is wrong? Each mutant is a real function with one change.

A mutant is caught if the twin of `test_gptq` refuses it, or our own check of the Hessian does, on one of a few fixed
problems; a crash does not count. If a change to the sources makes a mutant's snippet disappear, write the same mistake
into the new source.
"""

import inspect
import textwrap
from dataclasses import dataclass, replace
from typing import Any

import pytest

from grids import toy_vector
from grids.toy_vector import ToyVectorGrid
from mezzotint.core import linalg, statistics
from mezzotint.core.statistics import Statistics
from mezzotint.errors import NotPositiveDefiniteError
from mezzotint.grids.uniform import FittedUniform, UniformGrid
from mezzotint.kernels import reference as kernels
from mezzotint.rounding.gptq import Gptq
from mezzotint.testing.problems import ProblemSettings, make_problem
from rounding.test_gptq import assert_matches_twin


@dataclass(frozen=True)
class Mutant:
    """``owner.name`` is where the function is looked up when it is called."""

    owner: Any
    name: str
    old: str
    new: str


def inverse(old, new):
    return Mutant(statistics, "inverse_cholesky_upper", old, new)


def damped(old, new):
    return Mutant(linalg, "damped", old, new)


def kernel(old, new):
    return Mutant(kernels, "gptq_block_", old, new)


def rounding(old, new):
    return Mutant(Gptq, "round", old, new)


def order(old, new):
    return Mutant(Statistics, "order", old, new)


def groups(old, new):
    return Mutant(FittedUniform, "_of_columns", old, new)


def tiles(old, new):
    return Mutant(toy_vector, "feed_tiles_", old, new)


UNIFORM = {
    "wrong triangle": inverse("upper=matrix.mT", "upper=matrix"),
    "upper factor of H, not of its inverse": inverse("    _invert_upper_(matrix)\n", ""),
    "not flipped": inverse("order.flip(0)", "order"),
    "damping forgotten": damped("diagonal.add_(damping * diagonal.mean())", "diagonal.add_(0)"),
    "damping by the sum": damped("damping * diagonal.mean()", "damping * diagonal.sum()"),
    "damping not relative": damped("damping * diagonal.mean()", "damping"),
    "factor not permuted": inverse("order.flip(0)", "torch.arange(width).flip(0)"),
    "only rows permuted": damped("_permuted(gram, permutation)", "gram[permutation]"),
    "increasing order": order("descending=True", "descending=False"),
    "missing division by U_jj": kernel(") / factor[j, j]", ")"),
    "division by U_jj squared": kernel(") / factor[j, j]", ") / factor[j, j] ** 2"),
    "error of the value already rounded": kernel(
        "error[:, j] = (work[:, j] - ", "error[:, j] = (torch.round(work[:, j] / scale[:, j]) * scale[:, j] - "
    ),
    "errors have the wrong sign": kernel("work[:, j + 1 :] -=", "work[:, j + 1 :] +="),
    "column of U for its row": kernel("factor[j, j + 1 :]", "factor[j + 1 :, j]"),
    "update inside a block off by one": kernel(
        "work[:, j + 1 :] -= error[:, j, None] * factor[j, j + 1 :]",
        "work[:, j + 2 :] -= error[:, j, None] * factor[j, j + 2 :]",
    ),
    "lazy update forgotten": rounding("upper[start:end, end:], alpha=-1)", "upper[start:end, end:], alpha=0)"),
    "lazy update off by one": rounding(
        "work[:, end:].addmm_(error, upper[start:end, end:]",
        "work[:, end + 1 :].addmm_(error, upper[start:end, end + 1 :]",
    ),
    "lazy update without the last column": rounding(
        "addmm_(error, upper[start:end, end:]", "addmm_(error[:, :-1], upper[start : end - 1, end:]"
    ),
    "first block of U for all": rounding("upper[start:end, start:end]", "upper[: end - start, : end - start]"),
    "weights not permuted": rounding("aim.matrix.index_select(1, columns)", "aim.matrix.clone()"),
    "codes not permuted back": rounding("contiguous(), columns[start:end]", "contiguous(), torch.arange(start, end)"),
    "values before rounding not permuted back": rounding("before.index_copy_(1, columns, work)", "before.copy_(work)"),
    "values before rounding from before the block": rounding("work[:, start:end] = piece", "pass"),
    "groups in visiting order": groups(
        "groups = columns // self.group_size", "groups = columns.sort().values // self.group_size"
    ),
    "groups of the first columns": groups(
        "groups = columns // self.group_size", "groups = (columns - columns.min()) // self.group_size"
    ),
}  # fmt: skip
TOY = {
    "tile solved from the wrong side": tiles(
        "torch.linalg.solve_triangular(tile, now - value, upper=True, left=False)",
        "torch.linalg.solve_triangular(tile, (now - value).t(), upper=True).t()",
    ),
    "tile by its diagonal only": tiles(
        "torch.linalg.solve_triangular(tile, now - value, upper=True, left=False)",
        "(now - value) / tile.diagonal()",
    ),
    "tile updates off by one": tiles(
        "work[:, end:] -= error[:, start:end] @ upper[start:end, end:]",
        "work[:, end + 1 :] -= error[:, start:end] @ upper[start:end, end + 1 :]",
    ),
    "order of columns, not of tiles": order(".view(-1, tile).sum(1)", ".view(-1, tile)[:, 0]"),
    "places of the first tile": tiles("columns[start:end])", "columns[:width])"),
}  # fmt: skip


def problems(grids):
    """Wide, narrow and ragged; blocks smaller than the matrix; three dampings; both orders."""
    shapes = [(8, 24, 80), (4, 40, 20), (2, 8, 30)]
    for i, (rows, columns, tokens) in enumerate(shapes):
        for grid in grids:
            problem = make_problem(ProblemSettings(grid=grid, rows=rows, columns=columns, tokens=tokens, seed=i))
            for order in ("natural", "diagonal"):
                yield Gptq(damping=(0.01, 0.1, 1.0)[i], order=order, block_size=(8, 128, 4)[i]), problem


def uniform_problems():
    return problems(
        [UniformGrid(bits=3, group_size=5, range="minmax"), UniformGrid(bits=2, symmetric=True, range="error")]
    )


def toy_problems():
    return problems([ToyVectorGrid(tile=(1, 2)), ToyVectorGrid(tile=(2, 4))])


def apply(mutant, monkeypatch):
    """Put the changed function in the place of the real one; it sees the real module around it."""
    function = inspect.unwrap(getattr(mutant.owner, mutant.name))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutant.old) == 1, f"no longer in {function.__qualname__} once: {mutant.old}"
    made = {}
    exec(compile(source.replace(mutant.old, mutant.new), "mutant", "exec"), function.__globals__, made)
    monkeypatch.setattr(mutant.owner, mutant.name, made[mutant.name])


def survives(cases):
    try:
        for stage, problem in cases:
            assert_matches_twin(stage, problem)
    except (AssertionError, NotPositiveDefiniteError):
        return False
    return True


@pytest.mark.parametrize("mutant", [*UNIFORM.values(), *TOY.values()], ids=[*UNIFORM, *TOY])
def test_mutant_without_its_change_survives(mutant, monkeypatch):
    apply(replace(mutant, new=mutant.old), monkeypatch)
    assert survives(toy_problems() if mutant in TOY.values() else uniform_problems())


@pytest.mark.parametrize("name", UNIFORM)
def test_mutant_on_the_uniform_grid_is_caught(name, monkeypatch):
    apply(UNIFORM[name], monkeypatch)
    assert not survives(uniform_problems())


@pytest.mark.parametrize("name", TOY)
def test_mutant_on_vector_grids_is_caught(name, monkeypatch):
    apply(TOY[name], monkeypatch)
    assert not survives(toy_problems())
