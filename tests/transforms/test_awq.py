"""What is particular to AWQ's scales: their form, and which of them is taken."""

import pytest
import torch

from mezzotint.core.contracts import Aim
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError
from mezzotint.transforms.awq import Awq, scales_of

MEAN = torch.tensor([1.0, 4.0, 0.0, 0.25])
SEEN = Statistics(tokens=3.0, gram=torch.eye(4), mean_abs=MEAN)
AIMS = [Aim(matrix=torch.ones(2, 4)), Aim(matrix=torch.ones(3, 4))]


def fit(stage, probe=None, statistics=SEEN):
    return stage.fit(AIMS, statistics, probe, torch.Generator())


def test_scales_are_powers_balanced_around_one():
    for strength in (0.0, 0.35, 1.0):
        scale = scales_of(MEAN, strength)
        torch.testing.assert_close(scale.max() * scale.min(), torch.tensor(1.0))
        torch.testing.assert_close(scale[1] / scale[0], torch.tensor(4.0**strength))
        assert scale[2] == 1  # an input that is never there
        torch.testing.assert_close(scales_of(1000 * MEAN, strength), scale)
    assert torch.equal(scales_of(torch.zeros(3), 0.5), torch.ones(3))


def test_the_least_loss_is_taken_and_the_first_of_equals():
    tried = []

    def probe(scale):
        tried.append(float(scale[1] / scale[0]))
        return abs(tried[-1] - 2.0)  # least where 4^r = 2

    first, second = fit(Awq(), probe)
    assert first.strength == 0.5
    assert second is first
    assert len(tried) == 20
    assert tried == pytest.approx([4 ** (i / 20) for i in range(20)])
    assert fit(Awq(), lambda _: 1.0)[0].strength == 0.0
    assert fit(Awq(steps=4), probe)[0].strength == 0.5


def test_a_strength_that_is_given_is_not_searched():
    def never(_):
        raise AssertionError

    for probe in (None, never):
        (basis, _) = fit(Awq(strength=0.3), probe)
        torch.testing.assert_close(basis.scale, scales_of(MEAN, 0.3))


def test_without_inputs_nothing_is_scaled_and_without_a_loss_nothing_is_searched():
    for strength in ("auto", 0.5):
        assert torch.equal(fit(Awq(strength=strength), statistics=None)[0].scale, torch.ones(4))
    with pytest.raises(ConfigError, match="needs calibration text to search with"):
        fit(Awq())
