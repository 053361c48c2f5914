"""Ranges: levels against torch bit for bit; the choice against every candidate in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.problems import problems
from mezzotint import kernels
from mezzotint.errors import ConfigError
from mezzotint.kernels import reference
from reference import kernels as twin

LEVELS = kernels.available_levels()
SCALES = [torch.float32, torch.float16, torch.bfloat16]
VALUES = [torch.float32, torch.bfloat16, torch.float16]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("symmetric", [False, True])
@given(problem=problems(dtype=VALUES, least_bits=2), scale_dtype=st.sampled_from(SCALES), threads=st.integers(1, 3))
def test_full_range_agrees_with_torch(level, symmetric, problem, scale_dtype, threads):
    options = {"scale_dtype": scale_dtype, "threads": threads, "level": level}
    actual = kernels.min_max_range(problem.values, problem.group_size, problem.bits, symmetric, **options)
    low, high = reference.min_max(problem.values, problem.group_size)
    same(actual, reference.full_range(low.clamp(max=0), high.clamp(min=0), problem.bits, symmetric, scale_dtype))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("symmetric", [False, True])
@settings(max_examples=40)
@given(
    problem=problems(dtype=VALUES, least_bits=2),
    scale_dtype=st.sampled_from(SCALES),
    steps=st.integers(1, 9),
    span=st.integers(0, 3),
    weighted=st.booleans(),
    power=st.sampled_from(kernels.POWERS),
    threads=st.integers(1, 3),
)
def test_search_agrees_with_torch(level, symmetric, problem, scale_dtype, steps, span, weighted, power, threads):
    importance = problem.importance if weighted else None
    options = {"power": power, "scale_dtype": scale_dtype, "steps": steps, "zero_point_span": span}
    arguments = problem.values, problem.group_size, problem.bits, symmetric, importance
    actual = kernels.search_range(*arguments, **options, threads=threads, level=level)
    search = reference.RangeSearch(
        bits=problem.bits, symmetric=symmetric, scale_dtype=scale_dtype, span=span, power=power
    )
    at = torch.arange(steps, dtype=torch.float64)
    fractions = 1 - torch.stack([at, at + 0.5]) * (0.8 / steps)
    same(actual, search.run(problem.values, problem.group_size, importance, fractions))


@pytest.mark.parametrize("symmetric", [False, True])
@settings(max_examples=30)
@given(
    problem=problems(dtype=torch.float64, least_bits=2),
    steps=st.integers(1, 9),
    span=st.integers(0, 2),
    power=st.sampled_from(kernels.POWERS),
)
def test_no_candidate_is_better_in_float64(symmetric, problem, steps, span, power):
    values, size, bits = problem.values, problem.group_size, problem.bits
    options = {"power": power, "steps": steps, "zero_point_span": span}
    scale, zero_point = kernels.search_range(values, size, bits, symmetric, problem.importance, **options)
    assert scale.dtype == torch.float64
    importance = problem.importance.double().numpy()
    for r in range(values.shape[0]):
        for g, columns in enumerate(twin.groups(values.shape[1], size)):
            w, weight = values[r, columns].numpy(), importance[columns]
            s, z = float(scale[r, g]), float(zero_point[r, g])
            if not w.any():
                assert (s, z) == (1.0, 2 ** (bits - 1) if symmetric else 0.0)
                continue
            error = twin.error(w, weight, s, z, bits, power)
            choices = twin.candidates(w, bits, symmetric, steps=steps, shrink=0.8, span=span)
            best = min(twin.error(w, weight, a, b, bits, power) for a, b in choices)
            # Scales are rounded to float32: by 2^-24 of a value, at most 2^bits steps, against errors of any size.
            slack = 2 * float((weight * abs(w) ** power).sum() ** (1 / power)) * 2.0**-23
            assert error ** (1 / power) <= best ** (1 / power) + slack
            assert float(np.float32(s)) == s


@given(problem=problems(dtype=torch.float64, least_bits=2), symmetric=st.booleans())
def test_full_range_matches_the_twin_and_clips_nothing(problem, symmetric):
    values, size, bits = problem.values, problem.group_size, problem.bits
    scale, zero_point = kernels.min_max_range(values, size, bits, symmetric)
    value = kernels.affine_decode(kernels.affine_encode(values, scale, zero_point, size, bits), scale, zero_point, size)
    for g, columns in enumerate(twin.groups(values.shape[1], size)):
        for r in range(values.shape[0]):
            s, _ = twin.full_range(values[r, columns].numpy(), bits, symmetric)
            assert float(scale[r, g]) == pytest.approx(s, rel=2.0**-23)
            # Half a step; where the zero point was rounded, the far end may be off by that half step as well.
            reach = (0.5 if symmetric else 1.0) * s * 1.001
            assert (value[r, columns] - values[r, columns]).abs().max() <= reach


@pytest.mark.parametrize("symmetric", [False, True])
@given(problem=problems(dtype=torch.float64, least_bits=2), k=st.integers(-6, 6), power=st.sampled_from(kernels.POWERS))
def test_power_of_two_scale_is_exact(symmetric, problem, k, power):
    arguments = problem.group_size, problem.bits, symmetric, problem.importance
    scale, zero_point = kernels.search_range(problem.values, *arguments, steps=7, power=power)
    scaled, same_zero_point = kernels.search_range(problem.values * 2.0**k, *arguments, steps=7, power=power)
    same(same_zero_point, zero_point)
    nonzero = reference.min_max(problem.values.abs(), problem.group_size)[1] > 0
    same(scaled[nonzero], scale[nonzero] * 2.0**k)


def test_many_rows_on_several_threads():
    values = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    arguments = values, 64, 3, False, torch.linspace(0, 1, 300)
    same(kernels.search_range(*arguments, threads=3), kernels.search_range(*arguments, threads=1))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_beats_the_full_range(bits):
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    errors = []
    for ranges in (kernels.search_range(values, 64, bits), kernels.min_max_range(values, 64, bits)):
        code = kernels.affine_encode(values, *ranges, 64, bits)
        errors.append((kernels.affine_decode(code, *ranges, 64) - values).square().mean().item())
    assert errors[0] < 0.95 * errors[1]


def test_first_candidate_wins_ties():
    """No importance at all: every error is zero, so the full range with the nearest zero point stays."""
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    chosen = kernels.search_range(values, 32, 4, False, torch.zeros(32))
    same(chosen, kernels.min_max_range(values, 32, 4))


@pytest.mark.parametrize("scale_dtype", SCALES)
def test_scales_never_become_zero_or_infinite(scale_dtype):
    values = torch.tensor([[1e-30, -1e-30, 0.0, 0.0], [1e30, -1e30, 0.0, 0.0]])
    for symmetric in (False, True):
        for function in (kernels.search_range, kernels.min_max_range):
            scale, _ = function(values, 4, 4, symmetric, scale_dtype=scale_dtype)
            stored = scale.to(scale_dtype)
            same(stored.float(), scale)
            assert (stored > 0).all()
            assert stored.isfinite().all()


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"bits": 9}, "use 1 to 8"),
        ({"bits": 1, "symmetric": True}, "use 2 to 8"),
        ({"scale_dtype": torch.int8}, "scale_dtype is torch.int8"),
        ({"steps": 0}, "steps is 0"),
        ({"shrink": 1.0}, "shrink 1.0"),
        ({"power": 2.2}, "power is 2.2; use 2, 2.5 or 3"),
    ],
)
def test_wrong_settings_are_refused(settings_, message):
    with pytest.raises(ConfigError, match=message):
        kernels.search_range(torch.zeros(1, 4), 4, **{"bits": 4, **settings_})
