"""Each submodule against an explicit problem: every difference as a vector, every derivative dense."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.core.statistics import Accumulator, Statistics
from mezzotint.submodules.qk import QueryKey
from mezzotint.submodules.relax import Search
from mezzotint.submodules.updown import UpDown
from mezzotint.submodules.vo import ValueOutput, least_squares
from mezzotint.targets.loaq import Loaq
from reference import submodules as reference
from submodules import problems
from submodules.problems import Problem

SLIDING = torch.from_numpy(reference.visible(problems.SEQLEN, window=3))[None]
MANY = Search(damping=0.0, iterations=80)

# what each submodule's residual is, and its class
KINDS: dict[str, tuple[Any, Any]] = {
    "q": (QueryKey, problems.score_residual),
    "k": (QueryKey, problems.score_residual),
    "v": (ValueOutput, problems.stream_residual),
    "up": (UpDown, problems.mlp_residual),
}


def problem_of(member: str, seed: int = 0, **options: Any) -> Problem:
    return (
        problems.mlp_problem(seed, **{"count": 2, **options})
        if member == "up"
        else problems.attention_problem(seed, **options)
    )


def residual(problem: Problem, member: str, weight: Tensor) -> Tensor:
    linears = {**problem.linears, member: problem.linears[member]._replace(weight=weight)}
    return torch.cat([KINDS[member][1](batch, linears, problem.originals) for batch in problem.batches])


def submodule(problem: Problem, member: str, **options: Any) -> Any:
    return KINDS[member][0](originals=problem.originals, **options)


def relaxed(problem: Problem, member: str, search: Search, start: Tensor | None = None, **options: Any) -> Tensor:
    return submodule(problem, member, **options).relax(
        member,
        problem.linears,
        problem.all,
        problems.statistics(problem),
        start=problem.originals[member].weight if start is None else start,
        search=search,
    )


def dense(problem: Problem, member: str, ridge: Tensor | float = 0.0) -> Tensor:
    """The minimiser by one dense solve; ``ridge`` per row, towards the original."""
    original = problem.originals[member].weight
    at = torch.zeros_like(original)
    jacobian = torch.func.jacrev(lambda w: residual(problem, member, w))(at).flatten(1)
    rows = torch.as_tensor(ridge, dtype=torch.float64).expand(original.shape[0]).repeat_interleave(original.shape[1])
    normal = jacobian.t() @ jacobian + torch.diag(rows)
    right = -jacobian.t() @ residual(problem, member, at) + rows * original.flatten()
    return torch.linalg.solve(normal, right).view_as(original)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("q", {"count": 2}),
    ("q", {"visible": SLIDING, "mask": True, "count": 2}),
    ("k", {}),
    ("k", {"visible": SLIDING, "mask": True, "count": 2}),
    ("v", {"count": 2}),
    ("v", {"visible": SLIDING, "mask": True, "count": 3}),
    ("v", {"mask": True, "looking": True, "count": 2}),
    ("up", {"count": 2}),
    ("up", {"looking": True, "count": 2}),
]


@pytest.mark.parametrize(("member", "options"), OPTIONS)
def test_loss_is_the_sum_of_squares(member: str, options: dict[str, Any]) -> None:
    problem = problem_of(member, **options)
    found = sum(submodule(problem, member).loss(problem.linears, batch) for batch in problem.batches)
    wanted = float(residual(problem, member, problem.linears[member].weight).square().sum())
    assert found == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize(("member", "options"), OPTIONS)
def test_conjugate_gradients_reach_the_dense_solution(member: str, options: dict[str, Any]) -> None:
    problem = problem_of(member, **options)
    found, wanted = relaxed(problem, member, Search(damping=0.0, iterations=250)), dense(problem, member)
    losses = [float(residual(problem, member, weight).square().sum()) for weight in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    # a relative excess of 1e-9 is a distance of 3e-5 in well-conditioned directions, and more in others
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("member", ["q", "up"])
def test_the_solution_does_not_depend_on_the_start(member: str) -> None:
    problem = problem_of(member)
    other = torch.randn(problem.originals[member].weight.shape, dtype=torch.float64, generator=problem.generator)
    found = relaxed(problem, member, MANY, start=other)
    torch.testing.assert_close(found, dense(problem, member), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("member", ["q", "k", "v", "up"])
def test_few_iterations_reach_most_of_the_gain(member: str) -> None:
    problem = problem_of(member)
    start, least = problem.originals[member].weight, dense(problem, member)
    losses = [float(residual(problem, member, w).square().sum()) for w in (start, least)]
    after = [
        float(residual(problem, member, relaxed(problem, member, Search(damping=0.0, iterations=n))).square().sum())
        for n in (1, 3, 10)
    ]
    shares = [(losses[0] - value) / (losses[0] - losses[1]) for value in after]
    assert shares[0] < shares[1] < shares[2] <= 1 + 1e-9
    assert shares[1] > 0.5
    assert shares[2] > 0.95


def test_the_ridge_pulls_towards_the_original() -> None:
    """With a ridge so strong that nothing else matters the original comes back; in between lies the rest."""
    member = "up"
    problem = problem_of(member)
    original, free = problem.originals[member].weight, dense(problem, member)
    distances = [
        float((relaxed(problem, member, Search(damping=d, iterations=25), start=free) - original).norm())
        for d in (0.01, 0.1, 1.0, 10.0, 1e6)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] < float((free - original).norm())
    assert distances[-1] < 1e-4 * distances[0]


def test_the_printed_key_step_is_wrong_and_ours_is_right() -> None:
    """LPCD prints ``vec(S)`` and the queries' mask in the key step, where it takes their transposes (MATH.md)."""
    problem = problems.attention_problem(3)
    batch = problem.batches[0]
    query = batch.query(problem.linears["q"](batch.inputs))
    target = problems.naive_scores(batch, problem.originals, batch.original)
    bare = problem.linears["k"]._replace(bias=None)
    mask = problems.seen(batch).double().expand_as(target)
    bias = problem.linears["k"].bias
    assert bias is not None

    def transposed(weight: Tensor) -> Tensor:
        """``K Q'`` of every head: keys in rows."""
        key = batch.key(bare._replace(weight=weight)(batch.inputs) + bias)
        return torch.einsum("whkd,whqd->whkq", key.repeat_interleave(problems.OWN, 1), query) * batch.pattern.scaling

    def solved(wanted: Tensor, shown: Tensor) -> Tensor:
        zero = torch.zeros_like(bare.weight)
        function = lambda w: ((transposed(w) - wanted) * shown).flatten()  # noqa: E731
        jacobian = torch.func.jacrev(function)(zero).flatten(1)
        return torch.linalg.lstsq(jacobian, -function(zero)[:, None]).solution.view_as(zero)

    one = Problem(problem.originals, problem.linears, [batch], problem.generator)
    printed = solved(target, mask)
    right = solved(target.transpose(-1, -2), mask.transpose(-1, -2))
    ours = relaxed(one, "k", MANY)
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    losses = [float(residual(one, "k", w).square().sum()) for w in (right, printed)]
    assert losses[0] < 0.5 * losses[1]


BENT: list[tuple[str, dict[str, Any]]] = [
    ("q", {"normed": True}),
    ("k", {"normed": True}),
    ("q", {"softcap": 0.8, "visible": SLIDING}),
    ("k", {"softcap": 0.8, "mask": True}),
    ("up", {"gated": False, "count": 2}),
]


@pytest.mark.parametrize(("member", "options"), [*OPTIONS, *BENT])
def test_slopes_are_those_of_finite_differences(member: str, options: dict[str, Any]) -> None:
    """Gradients of half the loss, and products with the curvature ``J' J``."""
    problem = problem_of(member, **options)
    made, weight = submodule(problem, member), problem.linears[member].weight
    slopes = [made.slope(member, problem.linears, batch) for batch in problem.batches]
    gradient = sum(slope.residual()[1].t() @ slope.inputs for slope in slopes)
    step = 1e-5
    for seed in range(3):
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ends = [residual(problem, member, weight + s * direction) for s in (step, -step)]
        # central differences err by step^2 and by rounding over the step, both some 1e-10 of the numbers compared
        expected = float((ends[0].square().sum() - ends[1].square().sum()) / (4 * step))
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        pushed = (ends[0] - ends[1]) / (2 * step)
        curved = sum(
            float((slope.curvature(slope.inputs @ direction.t()) * (slope.inputs @ direction.t())).sum())
            for slope in slopes
        )
        assert curved == pytest.approx(float(pushed.square().sum()), rel=1e-6)


@pytest.mark.parametrize(("member", "options"), BENT)
def test_steps_of_gauss_newton_lower_what_is_not_linear(member: str, options: dict[str, Any]) -> None:
    problem = problem_of(member, **options)
    values = [float(residual(problem, member, problem.originals[member].weight).square().sum())]
    for steps in (1, 3):
        found = relaxed(problem, member, Search(damping=0.01, iterations=10, steps=steps))
        values.append(float(residual(problem, member, found).square().sum()))
    assert values[1] < 0.9 * values[0]
    assert values[2] <= values[1]


@pytest.mark.parametrize("member", ["q", "k"])
def test_the_attention_metric_is_minimised(member: str) -> None:
    problem = problem_of(member)
    made = submodule(problem, member, metric="attention")

    def loss(weight: Tensor) -> float:
        linears = {**problem.linears, member: problem.linears[member]._replace(weight=weight)}
        return sum(made.loss(linears, batch) for batch in problem.batches)

    found = relaxed(problem, member, MANY, metric="attention")
    least = loss(found)
    for seed in range(5):
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert loss(found + 1e-3 * noise) > least
    assert loss(dense(problem, member)) > least


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_last_linear_is_loaq_at_full_strength(damping: float) -> None:
    """The closed form minimises the submodule's loss, and is the target of LoaQ with alpha and beta of one."""
    problem = problems.mlp_problem(1)
    sums = Accumulator(problems.INNER, frozenset({"drift", "residual"}), rows=problems.OUT, dtype=torch.float64)
    for batch in problem.batches:
        hidden = batch.hidden(problem.linears["up"](batch.inputs))
        sums.add(
            hidden.flatten(0, 1),
            original=batch.outer.original.flatten(0, 1),
            residual=(batch.outer.original_stream - batch.outer.stream).flatten(0, 1),
        )
    fit: Statistics = sums.finish()
    original = problem.originals["down"]
    search = Search(damping=damping, iterations=1)
    made = UpDown(originals=problem.originals)
    found = made.relax("down", problem.linears, problem.all, fit, start=original.weight, search=search)
    aim = Loaq(alpha=1.0, beta=1.0, damping=damping).aim(original.weight, fit, None)
    torch.testing.assert_close(found, aim.matrix, rtol=0, atol=0)
    torch.testing.assert_close(found, least_squares(original.weight, fit, search), rtol=0, atol=0)
    if damping == 0:

        def loss(weight: Tensor) -> float:
            linears = {**problem.linears, "down": original._replace(weight=weight)}
            return sum(made.loss(linears, batch) for batch in problem.batches)

        for seed in range(5):
            noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert loss(found + 1e-4 * noise) > loss(found)
