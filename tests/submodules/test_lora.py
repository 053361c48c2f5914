"""Low-rank compensation against singular values and other changes of the same rank."""

import pytest
import torch
from torch import Tensor

from mezzotint.core.statistics import Accumulator
from mezzotint.errors import ConfigError
from mezzotint.submodules.lora import Lora

OUT, IN, TOKENS = 7, 9, 60


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Original and coarse matrix, inputs of both streams, difference of the residual streams."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=g, dtype=torch.float64)
    x = torch.randn(TOKENS, IN, generator=g, dtype=torch.float64) * torch.linspace(0.2, 3, IN, dtype=torch.float64)
    xh = x + 0.2 * torch.randn(TOKENS, IN, generator=g, dtype=torch.float64)
    return weight, weight.round(), x, xh, 0.3 * torch.randn(TOKENS, OUT, generator=g, dtype=torch.float64)


def loss(value: Tensor, problem: tuple[Tensor, ...]) -> float:
    weight, _, x, xh, residual = problem
    return float((residual + x @ weight.t() - xh @ value.t()).square().sum())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_no_other_change_of_the_rank_is_better(rank: int) -> None:
    made = problem()
    weight, value, x, xh, residual = made
    sums = Accumulator(IN, frozenset({"drift", "residual"}), rows=OUT, dtype=torch.float64)
    sums.add(xh, original=x, residual=residual)
    up, down = Lora(rank=rank, damping=0.0).factors(weight, value, sums.finish())
    assert up.shape == (OUT, rank)
    assert down.shape == (rank, IN)
    found = loss(value + up @ down, made)
    # the best change at all, and the energy of what a rank must leave of it (Eckart and Young), in the inputs' norm
    best = torch.linalg.lstsq(xh, residual + x @ weight.t() - xh @ value.t()).solution.t()
    singular = torch.linalg.svdvals(best @ xh.t())
    assert found == pytest.approx(loss(value + best, made) + float(singular[rank:].square().sum()), rel=1e-9)
    assert found < loss(value, made)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        moved = [part + 1e-3 * torch.randn(part.shape, generator=g, dtype=part.dtype) for part in (up, down)]
        assert loss(value + moved[0] @ moved[1], made) > found


def test_a_full_rank_gives_the_best_change_at_all() -> None:
    weight, value, x, xh, residual = problem(1)
    sums = Accumulator(IN, frozenset({"drift", "residual"}), rows=OUT, dtype=torch.float64)
    sums.add(xh, original=x, residual=residual)
    factors = Lora(rank=100, damping=0.0).factors(weight, value, sums.finish())
    best = torch.linalg.lstsq(xh, residual + x @ weight.t()).solution.t()
    torch.testing.assert_close(value + factors.change, best, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("settings", "message"), [({"rank": 0}, "rank is 0"), ({"damping": -1.0}, "damping is -1")])
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Lora(**settings)
