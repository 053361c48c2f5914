import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mezzotint.evaluation import difference, standard_error

SCORES = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.integers(1, 9)), min_size=2, max_size=30)


@given(SCORES)
def test_without_counts_it_is_the_paired_t_interval(rows):
    first, second, _ = (np.array(column) for column in zip(*rows, strict=True))
    found = difference(first.tolist(), second.tolist())
    assert found.mean == pytest.approx(np.mean(first - second), abs=1e-12)
    assert found.stderr == pytest.approx(np.std(first - second, ddof=1) / math.sqrt(len(rows)), abs=1e-12)
    if found.stderr > 1e-9:
        expected = stats.ttest_rel(first, second).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)
        assert found.clear == (stats.ttest_rel(first, second).pvalue < 0.05)
    assert found.count == len(rows)


@given(SCORES)
def test_windows_count_by_their_tokens(rows):
    first, second, counts = (list(column) for column in zip(*rows, strict=True))
    found = difference(first, second, counts)
    assert found.mean == pytest.approx((sum(first) - sum(second)) / sum(counts), abs=1e-12)
    own = standard_error([a - b for a, b in zip(first, second, strict=True)], counts)
    assert found.stderr == pytest.approx(own)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """4000 draws of 12 windows: the share that covers has a standard error of sqrt(.95 x .05 / 4000) = .0034."""
    generator = np.random.default_rng(0)
    hard = generator.normal(size=(4000, 12)) * 5  # what both find hard cancels
    first = hard + generator.normal(size=hard.shape) + 0.3
    second = hard + generator.normal(size=hard.shape)
    covered = [
        (lambda d: d.low <= 0.3 <= d.high)(difference(a.tolist(), b.tolist()))
        for a, b in zip(first, second, strict=True)
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=4 * 0.0034)


def test_one_window_has_no_interval():
    with pytest.raises(ValueError, match="over 1 windows or items has no standard error"):
        difference([1.0], [2.0])
