import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.core.metrics import chunks
from mezzotint.errors import CalibrationError, NonFiniteError
from mezzotint.evaluation import Divergence
from reference import metrics as twin


def problem(seed, windows=4, seqlen=9, vocab=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(windows, seqlen - 1, vocab, generator=generator, dtype=dtype)
    logits = reference + 0.5 * torch.randn(windows, seqlen - 1, vocab, generator=generator, dtype=dtype)
    targets = torch.randint(vocab, (windows, seqlen - 1), generator=generator)
    mask = torch.rand(windows, seqlen - 1, generator=generator) < 0.8
    return reference, logits, targets, mask


def accumulate(reference, logits, targets, mask, positions):
    divergence = Divergence(reference=reference is not None)
    for window in range(len(targets)):
        for t in positions:
            divergence.add(
                logits[window, t],
                targets[window, t],
                None if reference is None else reference[window, t],
                mask=None if mask is None else mask[window, t],
            )
        divergence.end_window()
    return divergence.result(seqlen=targets.shape[1] + 1)


@given(seed=st.integers(0, 2**31), masked=st.booleans(), budget=st.integers(1, 5000))
def test_figures_follow_their_definitions(seed, masked, budget):
    reference, logits, targets, mask = problem(seed)
    used = mask if masked else torch.ones_like(mask)
    result = accumulate(reference, logits, targets, mask if masked else None, chunks(9, 11, budget))
    expected = twin.divergence(*(tensor.numpy() for tensor in (reference, logits, targets, used)))
    # float64 throughout; the divergences of tokens are kept in float32, 6e-8 of values below 2
    names = ("perplexity", "perplexity_stderr", "reference_perplexity", "kl_nats", "kl_stderr", "top1_agreement")
    for name in (*names, "top1_stderr"):
        assert getattr(result, name) == pytest.approx(expected[name], rel=1e-9), name
    # the logarithm of a ratio of exponentials loses what the difference of the means keeps
    assert result.log_perplexity_ratio == pytest.approx(expected["log_perplexity_ratio"], rel=1e-9, abs=1e-12)
    assert result.log_perplexity_ratio_stderr == pytest.approx(expected["log_perplexity_ratio_stderr"], rel=1e-9)
    assert result.flips == {name: pytest.approx(expected[name]) for name in ("lost", "gained")}
    assert list(result.kl_percentiles) == ["p50", "p90", "p95", "p99", "p99.9", "max"]
    np.testing.assert_allclose(list(result.kl_percentiles.values()), expected["percentiles"], rtol=1e-6, atol=1e-7)
    assert result.tokens == expected["tokens"]
    assert (result.windows, result.seqlen) == (int(used.any(dim=1).sum()), 9)


@given(seed=st.integers(0, 2**31), size=st.integers(1, 8))
def test_chunks_change_nothing(seed, size):
    reference, logits, targets, mask = problem(seed)
    whole = accumulate(reference, logits, targets, mask, (torch.arange(8),))
    parts = accumulate(reference, logits, targets, mask, torch.arange(8).split(size))
    for name, value in whole.figures().items():
        if isinstance(value, str):
            continue
        # sums of 32 float64 terms in another order; the ratio of perplexities is a difference of such sums
        assert getattr(parts, name) == pytest.approx(value, rel=1e-12, abs=1e-14), name


def test_equal_windows_give_the_plain_standard_error():
    reference, logits, targets, _ = problem(0, windows=6)
    result = accumulate(reference, logits, targets, None, (torch.arange(8),))
    means = [twin.kl_nats(p, q).mean() for p, q in zip(reference.numpy(), logits.numpy(), strict=True)]
    assert result.kl_stderr == pytest.approx(np.std(means, ddof=1) / math.sqrt(6), rel=1e-9)
    single = accumulate(reference[:1], logits[:1], targets[:1], None, (torch.arange(8),))
    assert single.kl_stderr is None


def test_without_a_reference_there_is_perplexity_only():
    reference, logits, targets, mask = problem(1)
    full = accumulate(reference, logits, targets, mask, (torch.arange(8),))
    result = accumulate(None, logits, targets, mask, (torch.arange(8),))
    assert result.perplexity == full.perplexity
    assert result.perplexity_stderr == full.perplexity_stderr
    assert result.seqlen == 9
    own = {"perplexity", "perplexity_stderr", "tokens", "windows", "seqlen", "text", "digest"}
    assert {value for name, value in result.figures().items() if name not in own} == {None}
    assert json.loads(json.dumps(full.figures()))["kl_percentiles"]["max"] > 0


def test_a_model_against_itself():
    reference, _, targets, _ = problem(2, dtype=torch.float32)
    result = accumulate(reference.bfloat16(), reference.bfloat16(), targets, None, (torch.arange(8),))
    assert result.kl_nats == 0.0
    assert set(result.kl_percentiles.values()) == {0.0}
    assert result.flips == {"lost": 0.0, "gained": 0.0}
    assert result.top1_agreement == 1.0
    assert result.perplexity == result.reference_perplexity


def test_a_window_of_padding_does_not_count():
    reference, logits, targets, mask = problem(3)
    mask[2] = False
    result = accumulate(reference, logits, targets, mask, (torch.arange(8),))
    assert (result.windows, result.tokens) == (3, int(mask.sum()))
    with pytest.raises(CalibrationError, match="no token was scored in 4 windows of 9"):
        accumulate(reference, logits, targets, torch.zeros_like(mask), (torch.arange(8),))


@pytest.mark.parametrize("whose", ["model", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(whose, value):
    reference, logits, targets, _ = problem(4)
    (logits if whose == "model" else reference)[2, 3, 5] = value
    with pytest.raises(NonFiniteError, match=f"of the {whose} in window 2"):
        accumulate(reference, logits, targets, None, (torch.arange(8),))


@given(seqlen=st.integers(2, 50), vocab=st.integers(1, 300), budget=st.integers(0, 10**5))
def test_chunks_cover_the_positions_within_the_budget(seqlen, vocab, budget):
    pieces = chunks(seqlen, vocab, budget)
    torch.testing.assert_close(torch.cat(pieces), torch.arange(seqlen - 1))
    longest = max(len(piece) for piece in pieces)
    assert longest == 1 or 5 * 4 * vocab * longest <= budget
