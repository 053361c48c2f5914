"""Scores in pieces against loops over heads, queries and keys."""

from typing import Any

import numpy as np
import pytest
import torch

from mezzotint.submodules import scores as module
from mezzotint.submodules.scores import Mixer, Pair, Pattern, Scores
from reference import submodules as reference

WINDOWS, GROUPS, OWN, SEQLEN, DIM = 3, 2, 3, 9, 4
CLOSE = {"rtol": 1e-11, "atol": 1e-11}  # float64, sums of some hundred products

PATTERNS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sliding": {"visible": "sliding"},
    "per window": {"visible": "per window"},
    "later keys too": {"visible": "later"},  # two of them
    "capped": {"softcap": 1.5},
    "padded": {"weights": "padded"},
    "capped sliding padded": {"softcap": 1.5, "visible": "sliding", "weights": "padded"},
}


@pytest.fixture(params=[2**21, 40], ids=["one piece", "many pieces"])
def piece_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "PIECE", request.param)
    return request.param


def pair(seed: int) -> Pair:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(WINDOWS, GROUPS * OWN, SEQLEN, DIM, generator=g, dtype=torch.float64)
    return Pair(query, torch.randn(WINDOWS, GROUPS, SEQLEN, DIM, generator=g, dtype=torch.float64))


def pattern(settings: dict[str, Any]) -> Pattern:
    made = {"scaling": 0.6, **settings}
    if made.get("visible") == "sliding":
        made["visible"] = torch.from_numpy(reference.visible(SEQLEN, window=3))[None]
    if made.get("visible") == "later":
        made["visible"] = torch.ones(1, SEQLEN, SEQLEN, dtype=torch.bool).tril(2)
    if made.get("visible") == "per window":
        made["visible"] = torch.stack([torch.from_numpy(reference.visible(SEQLEN, window=w)) for w in (2, 4, 9)])
    if "weights" in made:
        made["weights"] = torch.ones(WINDOWS, SEQLEN, dtype=torch.float64)
        made["weights"][1, 6:] = 0
    return Pattern(**made)


def measured(at: Pair, made: Pattern, target: Pair, metric: str) -> Scores:
    return Scores(at, made, target, Mixer(target, made) if metric == "attention" else None)


def visible_of(made: Pattern, window: int) -> np.ndarray:
    if made.visible is None:
        return reference.visible(SEQLEN)
    return made.visible[window if made.visible.shape[0] > 1 else 0].numpy()


def naive_loss(at: Pair, target: Pair, made: Pattern, metric: str) -> float:
    total = 0.0
    for w in range(WINDOWS):
        seen = visible_of(made, w)
        weights = np.ones(SEQLEN) if made.weights is None else made.weights[w].numpy()
        mine, other = (
            reference.scores(p.query[w].numpy(), p.key[w].numpy(), made.scaling, made.softcap) for p in (at, target)
        )
        attended = reference.attention(other, seen) if metric == "attention" else None
        total += reference.score_loss(mine, other, seen, weights, attended)
    return total


@pytest.mark.parametrize("metric", ["plain", "attention"])
@pytest.mark.parametrize("name", PATTERNS)
def test_loss_is_that_of_a_loop(name: str, metric: Any, piece_size: int) -> None:
    made, at, target = pattern(PATTERNS[name]), pair(1), pair(2)
    wanted = naive_loss(at, target, made, metric)
    np.testing.assert_allclose(measured(at, made, target, metric).loss(), wanted, **CLOSE)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("metric", ["plain", "attention"])
@pytest.mark.parametrize("name", PATTERNS)
def test_gradient_and_curvature_are_derivatives_of_the_loss(name: str, metric: Any, side: Any, piece_size: int) -> None:
    """By central differences: of half the loss, and where no residual is left to bend of the gradient."""
    made, at, target = pattern(PATTERNS[name]), pair(1), pair(2)
    loss, gradient = measured(at, made, target, metric).gradient(side)
    assert loss == pytest.approx(measured(at, made, target, metric).loss(), rel=1e-12)
    direction = torch.randn_like(gradient)
    step = 1e-5

    def moved(by: float, base: Pair = at) -> Pair:
        return base._replace(
            **{"query" if side == "q" else "key": (base.query if side == "q" else base.key) + by * direction}
        )

    losses = [measured(moved(by), made, target, metric).loss() for by in (step, -step)]
    # error of a central difference: step^2 times a third derivative of order |gradient|, and rounding over the step
    assert float((gradient * direction).sum()) == pytest.approx((losses[0] - losses[1]) / (4 * step), rel=1e-6)
    curved = measured(at, made, target, metric).curvature(side, direction)
    # at the target itself there is no residual to bend: the curvature is all of the second derivative
    there = measured(target, made, target, metric).curvature(side, direction)
    second = [measured(moved(by, target), made, target, metric).loss() for by in (1e-3, -1e-3)]
    assert float((there * direction).sum()) == pytest.approx((second[0] + second[1]) / (2 * 1e-6), rel=1e-5)
    other = torch.randn_like(direction)
    symmetric = measured(at, made, target, metric).curvature(side, other)
    assert float((curved * other).sum()) == pytest.approx(float((symmetric * direction).sum()), rel=1e-9)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", ["causal", "sliding", "capped"])
def test_mixing_is_that_of_a_loop(name: str, sinks: bool, piece_size: int) -> None:
    g = torch.Generator().manual_seed(5)
    heads = torch.randn(GROUPS * OWN, generator=g, dtype=torch.float64) if sinks else None
    made, at = pattern({**PATTERNS[name], "sinks": heads}), pair(1)
    value = torch.randn(WINDOWS, GROUPS, SEQLEN, 5, generator=g, dtype=torch.float64)
    back = torch.randn(WINDOWS, SEQLEN, GROUPS * OWN * 5, generator=g, dtype=torch.float64)
    mixer = Mixer(at, made)
    found, pulled = torch.full_like(back, torch.nan), torch.zeros_like(value)
    for piece, taken in mixer.probabilities():
        found[piece.windows, piece.rows] = mixer.mixed(piece, taken, value)
        mixer.pull_(pulled, piece, taken, back[piece.windows, piece.rows])
    for w in range(WINDOWS):
        mine = reference.scores(at.query[w].numpy(), at.key[w].numpy(), made.scaling, made.softcap)
        attended = reference.attention(mine, visible_of(made, w), None if heads is None else heads.numpy())
        np.testing.assert_allclose(found[w].numpy(), reference.mixed(attended, value[w].numpy()), **CLOSE)
    # the transpose of the mixing
    assert float((found * back).sum()) == pytest.approx(float((pulled * value).sum()), rel=1e-10)


def test_what_is_kept_and_what_is_made_again_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made, at = pattern({}), pair(1)
    first = [taken.clone() for _, taken in Mixer(at, made).probabilities()]
    monkeypatch.setattr(module, "PIECE", 40)
    for room in (0, 2 * 40, module.KEPT):
        monkeypatch.setattr(module, "KEPT", room)
        mixer = Mixer(at, made)
        found = [torch.zeros_like(first[0]) for _ in range(2)]
        for whole in found:
            for piece, taken in mixer.probabilities():
                whole[piece.windows, :, :, piece.rows, piece.keys] = taken
            torch.testing.assert_close(whole, first[0], **CLOSE)


def test_no_more_than_a_piece_lives_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 2 * GROUPS * OWN * SEQLEN)
    like = pair(0).query
    covered = torch.zeros(WINDOWS, SEQLEN, SEQLEN, dtype=torch.int)
    for piece in module.pieces(Pattern(scaling=1.0), like):
        size = (piece.windows.stop - piece.windows.start) * (piece.rows.stop - piece.rows.start) * piece.keys.stop
        assert size * GROUPS * OWN <= module.PIECE
        covered[piece.windows, piece.rows, piece.keys] += 1
    lower = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril()
    assert (covered[:, lower] == 1).all()  # every score that counts, once
    assert (covered <= 1).all()


def test_padding_is_no_token() -> None:
    inputs, weights = torch.zeros(2, 3, 4), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert Pattern(scaling=1.0).tokens(inputs) == 6
    assert Pattern(scaling=1.0, weights=weights).tokens(inputs) == 3
