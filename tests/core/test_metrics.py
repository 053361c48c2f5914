import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.core import panels
from mezzotint.core.metrics import energies, h_error, kl_nats, perplexity, sqnr_db, token_nll
from mezzotint.storage.scratch import Scratch
from reference import metrics as twin

SEEDS = st.integers(0, 2**31)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(seed=SEEDS, tokens=st.integers(1, 5), vocab=st.integers(1, 40), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_kl_and_nll_follow_their_definitions(seed, tokens, vocab, scale):
    p, q = scale * normal(seed, tokens, vocab), scale * normal(seed + 1, tokens, vocab)
    targets = torch.arange(tokens) % vocab
    # sums of 40 terms below 30 * 40 nats: 1e-12 is a hundred float64 roundings of the largest
    np.testing.assert_allclose(kl_nats(p, q).numpy(), twin.kl_nats(p, q), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(token_nll(q, targets).numpy(), twin.token_nll(q, targets), rtol=1e-12, atol=1e-12)


@given(seed=SEEDS, distance=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_kl_in_float32_keeps_small_divergences(seed, distance):
    p = 5 * normal(seed, 4, 3000) + 20
    q = p + distance * normal(seed + 1, 4, 3000)
    p, q = p.float(), q.float()
    # two exponentials and three sums near 1, each rounded by at most 1.2e-7; errors of the normalisation (2e-6 in
    # logits near 40) must not show
    np.testing.assert_allclose(kl_nats(p, q).numpy(), twin.kl_nats(p, q), rtol=1e-5, atol=6e-7)


def test_kl_in_float32_does_not_carry_the_error_of_the_normalisation():
    p = normal(0, 64, 49_152) + 20
    q = p + 1e-3 * normal(1, 64, 49_152)
    p, q = p.float(), q.float()
    error = kl_nats(p, q).numpy() - twin.kl_nats(p, q)
    # two exponentials and three sums near 1, rounded by 6e-8 at most and independently: sqrt(5) * 6e-8 = 1.3e-7;
    # the normalisations alone would bring 5e-7, half a unit in the last place of a log probability near -11
    assert np.sqrt(np.mean(error**2)) < 2e-7


@given(seed=SEEDS, shift=st.floats(-50, 50))
def test_kl_ignores_a_shift_of_the_logits_and_is_zero_for_equal_ones(seed, shift):
    p, q = normal(seed, 3, 11), normal(seed + 1, 3, 11)
    # a shift of 50 costs 50 * 2^-53 in each logit
    torch.testing.assert_close(kl_nats(p + shift, q), kl_nats(p, q), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(kl_nats(p, p), torch.zeros(3, dtype=torch.float64), rtol=0, atol=0)


def test_kl_of_excluded_tokens():
    p = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64)
    q = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(kl_nats(p, q), torch.tensor([math.log(1.5)], dtype=torch.float64))
    torch.testing.assert_close(kl_nats(p, p), torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(kl_nats(q, p), torch.tensor([math.inf], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_and_left_alone(dtype):
    p, q = normal(0, 3, 7).to(dtype), normal(1, 3, 7).to(dtype)
    before = p.clone(), q.clone()
    kl = kl_nats(p, q)
    assert kl.dtype == torch.float32
    assert token_nll(q, torch.tensor([0, 1, 2])).dtype == torch.float32
    # float32 roundings of values near 1
    np.testing.assert_allclose(kl.numpy(), twin.kl_nats(p.double(), q.double()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((p, q), before, rtol=0, atol=0)


def test_perplexity():
    assert perplexity(3 * math.log(5.0), 3) == pytest.approx(5.0)
    assert perplexity(1e6, 1) == math.inf
    assert math.isnan(perplexity(math.nan, 2))
    with pytest.raises(ValueError, match="0 tokens"):
        perplexity(0.0, 0)


@given(seed=SEEDS, rows=st.integers(1, 4), columns=st.integers(1, 9), power=st.integers(-20, 20))
def test_errors_follow_their_definitions_and_scale_away(seed, rows, columns, power):
    weight, noise, x = normal(seed, rows, columns), normal(seed + 1, rows, columns), normal(seed + 2, 12, columns)
    value, gram, k = weight + 0.1 * noise, x.T @ x, 2.0**power
    assert sqnr_db(weight, value) == pytest.approx(twin.sqnr_db(weight, value), rel=1e-9)
    assert h_error(weight, value, gram) == pytest.approx(twin.h_error(weight, value, gram), rel=1e-9)
    assert sqnr_db(k * weight, k * value) == sqnr_db(weight, value)
    assert h_error(k * weight, k * value, 4 * gram) == h_error(weight, value, gram)


def test_errors_without_noise_or_signal():
    weight, zero, gram = torch.ones(2, 3), torch.zeros(2, 3), torch.eye(3)
    assert sqnr_db(weight, weight) == math.inf
    assert sqnr_db(zero, weight) == -math.inf
    assert sqnr_db(weight.bfloat16(), 0.5 * weight.bfloat16()) == pytest.approx(10 * math.log10(4))
    assert h_error(weight, weight, gram) == 0.0
    assert h_error(weight, zero, gram) == 1.0
    assert h_error(zero, weight, gram) == math.inf
    assert h_error(zero, zero, gram) == 0.0


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_energies_are_those_of_the_whole_square(columns, dtype):
    values, x = normal(3, 6, columns, dtype=dtype), normal(4, 50, columns, dtype=dtype)
    gram, close = x.T @ x, {"rtol": 2000 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(energies(values, gram), ((values @ gram) * values).sum(1), **close)
    # rows that a symmetric matrix mixes: what they add up to
    mixing = torch.eye(6, dtype=dtype) + 0.1 * torch.ones(6, 6, dtype=dtype)
    found = energies(values, gram, mixing @ values).sum()
    torch.testing.assert_close(found, (mixing * (values @ gram @ values.T)).sum(), **close)


def test_energies_read_what_is_stored_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(panels, "PANEL_BYTES", 4 * 70 * 33)  # panels of 33 rows, the last one smaller
    x, values = normal(5, 90, 70, dtype=torch.float32), normal(6, 4, 70, dtype=torch.float32)
    stored = panels.StoredSquare(70, torch.float32, Scratch(tmp_path, "sums", 4 * 70 * 70))
    for start, rows in stored.panels_():
        rows.copy_((x.T @ x)[start : start + len(rows)])
    torch.testing.assert_close(energies(values, stored), energies(values, x.T @ x), rtol=1e-5, atol=0)
