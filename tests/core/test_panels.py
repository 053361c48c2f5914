"""Squares that are stored elsewhere against the same ones in memory."""

import pytest
import torch
from torch import Tensor

from mezzotint.core import panels
from mezzotint.core.contracts import Aim
from mezzotint.core.metrics import h_error
from mezzotint.core.panels import StoredSquare, in_memory
from mezzotint.core.statistics import Accumulator, Statistics
from mezzotint.grids.uniform import UniformGrid
from mezzotint.registry import ROUNDINGS

WIDTH, ROWS = 37, 5


class Held:
    """A storage in memory."""

    def __init__(self, size: int) -> None:
        self._bytes = torch.zeros(size, dtype=torch.uint8)

    def write(self, value: Tensor, offset: int) -> None:
        part = value.contiguous().flatten().view(torch.uint8)
        self._bytes[offset : offset + len(part)] = part

    def read_(self, value: Tensor, offset: int) -> Tensor:
        part = self._bytes[offset : offset + value.nbytes].clone()
        return value.copy_(part.view(value.dtype).view(value.shape))


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of seven rows: neither a divisor of the width nor the size of anything else."""
    monkeypatch.setattr(panels, "PANEL_BYTES", 7 * WIDTH * 8)


def collected(storage: type[Held] | None, *, weights: bool = False) -> Statistics:
    generator = torch.Generator().manual_seed(3)
    sums = Accumulator(
        WIDTH, frozenset({"drift", "residual", "mean_abs"}), rows=ROWS, dtype=torch.float64, storage=storage
    )
    for tokens in (50, 11, 64):
        x, xh = (torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
        residual = torch.randn(tokens, ROWS, generator=generator, dtype=torch.float64)
        token_weights = torch.randint(0, 3, (tokens,), generator=generator).double() if weights else None
        sums.add(xh, original=x, residual=residual, weights=token_weights)
    return sums.finish()


@pytest.mark.parametrize("weights", [False, True])
def test_stored_sums_are_those_in_memory(weights: bool) -> None:
    filed, held = collected(Held, weights=weights), collected(None, weights=weights)
    for name in ("gram", "drift"):
        square = getattr(filed, name)
        assert isinstance(square, StoredSquare)
        torch.testing.assert_close(in_memory(square), getattr(held, name), rtol=1e-13, atol=1e-12)
    assert filed.tokens == held.tokens
    assert torch.equal(filed.residual, held.residual)  # type: ignore[arg-type]
    gram = in_memory(filed.gram)
    assert torch.equal(gram.tril(-7 * 2), gram.triu(7 * 2).t())  # copied, not summed again


def test_small_squares_stay_in_memory() -> None:
    sums = Accumulator(16, frozenset({"drift"}), dtype=torch.float64, storage=Held)
    assert not isinstance(sums.finish().gram, StoredSquare)


def test_what_is_done_with_them_is_the_same() -> None:
    filed, held = collected(Held), collected(None)
    weight = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    assert filed.drift is not None
    assert held.drift is not None
    pairs: list[tuple[Tensor, Tensor]] = [
        (weight @ filed.gram, weight @ held.gram),
        (weight.clone().addmm_(weight, filed.drift), weight.clone().addmm_(weight, held.drift)),
        (filed.importance, held.importance),
        (filed.gram.diagonal().mean(), held.gram.diagonal().mean()),
        (filed.gram[torch.tensor([4, 0, 4])], held.gram[torch.tensor([4, 0, 4])]),
        (filed.drift.clone(), held.drift),
        (filed.gram + filed.drift, held.gram + held.drift),
        (filed.gram[3], held.gram[3]),
        (filed.gram[torch.tensor(3)], held.gram[torch.tensor(3)]),
        (filed.gram @ weight.t(), held.gram @ weight.t()),
        (filed.gram @ filed.drift, held.gram @ held.drift),
        (filed.factor(0.01, "diagonal").upper, held.factor(0.01, "diagonal").upper),
        (filed.solve(weight, 0.1), held.solve(weight, 0.1)),
        (torch.zeros_like(filed.gram), torch.zeros_like(held.gram)),
    ]
    for found, expected in pairs:
        assert not isinstance(found, StoredSquare)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    value = weight + 0.1
    assert h_error(weight, value, filed.gram) == pytest.approx(h_error(weight, value, held.gram), rel=1e-12)


@pytest.mark.parametrize("kind", ["gptq", "gptaq", "qronos"])
def test_roundings_choose_the_same_codes(kind: str) -> None:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = UniformGrid(bits=3, group_size=None, range="error").resolve((ROWS, WIDTH), torch.float32).fit(weight, None)
    codes = [ROUNDINGS[kind]().round(Aim(matrix=weight), grid, collected(storage)).code for storage in (Held, None)]
    assert torch.equal(*codes)


def test_a_panel_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    square = collected(Held).gram
    monkeypatch.setattr(StoredSquare, "whole", lambda _: pytest.fail("read as a whole"))
    weight = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    _ = weight @ square
    weight.addmm_(weight, square)
    _ = square.diagonal(), square[torch.arange(WIDTH)], torch.empty_like(square)


def test_what_would_be_lost_is_refused() -> None:
    square = collected(Held).gram
    with pytest.raises(TypeError, match="stored elsewhere"):
        square.add_(1.0)


def test_sums_of_others_are_added() -> None:
    sums = Accumulator(WIDTH, frozenset({"drift"}), dtype=torch.float64, storage=Held)
    sums.add(torch.ones(2, WIDTH).double(), original=torch.zeros(2, WIDTH).double())
    for part in sums.tensors_():
        part.mul_(2)
    found = sums.finish()
    assert torch.equal(in_memory(found.gram), torch.full((WIDTH, WIDTH), 4.0).double())
    assert found.drift is not None
    assert torch.equal(in_memory(found.drift), torch.full((WIDTH, WIDTH), -4.0).double())
