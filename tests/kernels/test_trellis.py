"""The trellis code: every level and torch bit for bit, all against a numpy search, and what any such code satisfies."""

import tomllib
from importlib import resources
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint import kernels
from mezzotint.errors import ConfigError
from mezzotint.grids.trellis import TrellisGrid, measured
from mezzotint.kernels import reference_trellis
from reference import trellis as twin

LEVELS = kernels.available_levels()
RATES = st.integers(8, 48)
STATES = [12, 16]
KINDS = ["normal", "huge", "alternating", "constant", "zeros", "few values", "one outlier"]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def tiles(count, seed, kind="normal"):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 256, generator=generator)
    if kind == "huge":  # all beyond what the costs know: the widest range of sums
        values = torch.where(values > 0.5, 3e38, -3e38)
    elif kind == "alternating":  # runs of one sign drive costs apart, the change back punishes the lowest
        values = values.sign().repeat_interleave(8, dim=1)[:, :256] * 20
    elif kind == "constant":
        values = values[:, :1].expand(count, 256) * 2
    elif kind == "zeros":
        values = torch.zeros_like(values)
    elif kind == "few values":  # many equal costs
        values = values.round()
    elif kind == "one outlier":
        values[:, 0] = 1e6
    return values


def words(count, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count, rate), generator=generator, dtype=torch.int64).to(torch.int32)


def whole_costs(packed, values, states):
    """What the search minimises, from decoded weights."""
    v = torch.round(kernels.trellis_decode(packed, states=states).double() * 147.7).long()
    t = torch.from_numpy(twin.target(values.numpy()))
    return (v * v - v * t).sum(dim=1)


@settings(max_examples=25)
@given(
    rate=RATES,
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    window=st.integers(1, 128),
    count=st.integers(1, 6),
)
def test_levels_and_torch_agree(rate, seed, kind, window, count):
    values = tiles(count, seed, kind)
    expected = reference_trellis.encode(values, rate, 12, window)
    for level in LEVELS:
        same(kernels.trellis_encode(values, rate, states=12, window=window, level=level), expected)


@pytest.mark.parametrize(("rate", "kind"), [(8, "normal"), (27, "few values"), (41, "alternating")])
def test_levels_and_torch_agree_on_sixteen_bits(rate, kind):
    values = tiles(1, rate, kind)
    expected = reference_trellis.encode(values, rate, 16, 4)
    for level in LEVELS:
        same(kernels.trellis_encode(values, rate, states=16, window=4, level=level), expected)


@settings(max_examples=20)
@given(rate=RATES, seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), window=st.integers(1, 128))
def test_numpy_search_finds_the_same(rate, seed, kind, window):
    values = tiles(1, seed, kind)
    packed = kernels.trellis_encode(values, rate, states=12, window=window)
    np.testing.assert_array_equal(packed[0].numpy(), twin.encode(values[0].numpy(), rate, 12, window))


@pytest.mark.parametrize("kind", ["huge", "alternating"])
@pytest.mark.parametrize("rate", [8, 15, 41, 47, 48])
def test_costs_of_extreme_values_do_not_overflow(rate, kind):
    """Where sums come closest to 2**31, against 64-bit costs from which nothing is subtracted."""
    values = tiles(1, rate, kind)
    packed = kernels.trellis_encode(values, rate, states=16, window=2)
    np.testing.assert_array_equal(packed[0].numpy(), twin.encode(values[0].numpy(), rate, 16, 2))


@pytest.mark.parametrize("states", STATES)
@given(rate=RATES, seed=st.integers(0, 2**32), count=st.integers(0, 5), threads=st.integers(1, 3))
def test_decoding(states, rate, seed, count, threads):
    packed = words(count, rate, seed)
    expected = reference_trellis.decode(packed, states, torch.float32)
    for tile in range(min(count, 2)):
        np.testing.assert_array_equal(expected[tile].numpy(), twin.decode(packed[tile].numpy(), states))
    for level in LEVELS:
        options = {"states": states, "threads": threads, "level": level}
        same(kernels.trellis_decode(packed, **options), expected)
        same(kernels.trellis_decode(packed, **options, dtype=torch.bfloat16), expected.to(torch.bfloat16))
    same(reference_trellis.decode(packed, states, torch.bfloat16), expected.to(torch.bfloat16))


@given(rate=RATES, seed=st.integers(0, 2**32))
def test_states_overlap_round_the_end_and_pack_to_the_same_words(rate, seed):
    packed = words(1, rate, seed)[0].numpy()
    for states in STATES:
        chosen = twin.states_of(packed, states)
        for i in range(256):
            k = twin.shift(i, rate)
            assert chosen[i] >> k == chosen[i - 1] % 2 ** (states - k)
        np.testing.assert_array_equal(twin.pack(chosen, rate), packed)


@given(rate=RATES, seed=st.integers(0, 2**32))
def test_what_the_code_holds_is_found_without_error(rate, seed):
    values = kernels.trellis_decode(words(5, rate, seed), states=12)
    packed = kernels.trellis_encode(values, rate, states=12)
    same(kernels.trellis_decode(packed, states=12), values)


@settings(max_examples=10)
@given(rate=RATES, seed=st.integers(0, 2**32))
def test_no_change_of_a_few_bits_is_better(rate, seed):
    """Of the bits before the seam's, which are pinned: every single one, and short random patterns."""
    values = tiles(1, seed)
    packed = kernels.trellis_encode(values, rate, states=12)
    free = 32 * rate - (12 - twin.shift(0, rate))
    pattern = torch.randint(1, 2**11, (512,), generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
    pattern = torch.cat([torch.ones(free - 10, dtype=torch.int64), pattern])
    start = torch.arange(len(pattern)) % (free - 10)  # first bit of eleven
    bits = (packed.long()[:, torch.arange(32 * rate) // 32] >> (31 - torch.arange(32 * rate) % 32)) & 1
    bits = bits.repeat(len(pattern), 1)
    for b in range(11):
        bits[torch.arange(len(pattern)), start + b] ^= (pattern >> b) & 1
    changed = (bits.reshape(-1, rate, 32) << torch.arange(31, -1, -1)).sum(dim=2).to(torch.int32)
    assert (whole_costs(changed, values, 12) >= whole_costs(packed, values, 12)).all()


def test_cost_is_that_of_the_numpy_search():
    values = tiles(3, 5)
    packed = kernels.trellis_encode(values, 20, states=12, window=128)
    costs = whole_costs(packed, values, 12)
    for i in range(3):
        t = twin.target(values[i].numpy())
        seam = twin.states_of(packed[i].numpy(), 12)[0] >> twin.shift(0, 20)
        assert costs[i] == twin.cost(twin.search(t, 20, 12, 0, 256, seam), t)


# Errors that the same code had in a search in floating point. Of 4096 and more values of variance exactly 1 the mean
# square error varies by 2 %, so three times that.
@pytest.mark.parametrize(
    ("states", "rate", "expected"), [(12, 8, 0.2814), (12, 16, 0.0727), (12, 32, 0.0051), (16, 24, 0.0174)]
)
def test_distortion_on_normal_values(states, rate, expected):
    values = tiles(16 if states == 16 else 64, 1)
    values = values / values.square().mean().sqrt()
    decoded = kernels.trellis_decode(kernels.trellis_encode(values * 0.95, rate, states=states), states=states)
    assert abs(float((decoded / 0.95 - values).square().mean()) / expected - 1) < 0.06


def test_table_of_distortions():
    """Every rate is there, the error falls with it, and it is what is found on other values, up to 6 % as above."""
    table = tomllib.loads((resources.files("mezzotint.grids") / "trellis_table.toml").read_text(encoding="utf-8"))
    values = tiles(64, 9)
    values = values / values.square().mean().sqrt()
    for states in STATES:
        rows = table[f"states_{states}"]["rates"]
        assert [row["rate"] for row in rows] == list(range(8, 49))
        assert all(b["distortion"] < a["distortion"] for a, b in pairwise(rows))
        assert all(1 < row["distortion"] * 4 ** (row["rate"] / 8) < 1.75 for row in rows)  # of the Gaussian bound
    for row in table["states_12"]["rates"][::5]:
        packed = kernels.trellis_encode(values * row["factor"], row["rate"], states=12)
        error = kernels.trellis_decode(packed, states=12) / row["factor"] - values
        assert abs(float(error.square().mean()) / row["distortion"] - 1) < 0.06


def test_a_wider_window_is_better_on_average():
    values = tiles(200, 2)
    narrow, wide = (kernels.trellis_encode(values, 16, states=12, window=w) for w in (4, 64))
    assert whole_costs(wide, values, 12).sum() < whole_costs(narrow, values, 12).sum()


def test_tiles_do_not_depend_on_threads_and_neighbours():
    values = tiles(23, 3)
    packed = kernels.trellis_encode(values, 22, states=12, threads=3)
    same(kernels.trellis_encode(values, 22, states=12, threads=1), packed)
    same(torch.cat([kernels.trellis_encode(v[None], 22, states=12) for v in values]), packed)
    decoded = kernels.trellis_decode(packed.repeat(300, 1), states=12, threads=3)
    same(decoded, kernels.trellis_decode(packed, states=12).repeat(300, 1))


def test_torch_in_pieces_is_torch_at_once(monkeypatch):
    values = tiles(5, 4)
    whole = reference_trellis.encode(values, 13, 12, 16)
    monkeypatch.setattr(reference_trellis, "_SURVIVOR_BYTES", 2 * 256 * 2**11)
    same(reference_trellis.encode(values, 13, 12, 16), whole)


def test_values_of_other_dtypes():
    values = tiles(2, 6)
    same(
        kernels.trellis_encode(values.bfloat16(), 24, states=12),
        kernels.trellis_encode(values.bfloat16().float(), 24, states=12),
    )
    # Doubles go to torch, where they are rounded to whole numbers without becoming float32 first.
    exact = kernels.trellis_decode(words(2, 24, 0), states=12)
    same(kernels.trellis_encode(exact.double(), 24, states=12), kernels.trellis_encode(exact, 24, states=12))


def test_arguments_are_left_alone_and_may_be_views_that_need_gradients():
    values = tiles(256, 7)[:, :2].t().requires_grad_()
    before = values.detach().clone()
    same(kernels.trellis_encode(values, 17, states=12), kernels.trellis_encode(before, 17, states=12))
    same(values.detach(), before)
    packed = words(16, 2 * 20, 1)
    same(kernels.trellis_decode(packed[:, ::2], states=12), kernels.trellis_decode(packed[:, ::2].clone(), states=12))


def test_no_tiles():
    for level in (None, *LEVELS):
        packed = kernels.trellis_encode(torch.zeros(0, 256), 30, states=16, level=level)
        assert packed.shape == (0, 30)
        assert kernels.trellis_decode(packed, states=16, level=level).shape == (0, 256)
    assert kernels.trellis_encode(torch.zeros(0, 256, dtype=torch.float64), 30, states=12).shape == (0, 30)


def test_values_of_states():
    for states in STATES:
        expected = [np.float32(twin.value(x)) * np.float32(1 / 147.7) for x in range(2**states)]
        np.testing.assert_array_equal(kernels.trellis_values(states).numpy(), np.array(expected))


def test_order_is_that_of_tensor_core_fragments():
    order = kernels.tile_order().tolist()
    assert sorted(order) == list(range(256))
    for e, place in enumerate(order):
        t, m = divmod(e, 8)
        assert divmod(place, 16) == (t % 4 * 2 + (0, 1, 8, 9)[m % 4], t // 4 + 8 * (m // 4))


def test_tiles_of_a_matrix():
    matrix = torch.arange(48.0 * 32).reshape(48, 32)  # [out, in]
    cut = kernels.to_tiles(matrix)
    assert cut.shape == (2, 3, 256)
    for e, place in enumerate(kernels.tile_order().tolist()):
        row, column = divmod(place, 16)
        assert cut[1, 2, e] == matrix[2 * 16 + column, 16 + row]
    same(kernels.from_tiles(cut), matrix)
    with pytest.raises(ConfigError, match="matrix is 40 x 32; both sides have to be multiples of 16"):
        kernels.to_tiles(torch.zeros(40, 32))


def test_wrong_requests_are_refused():
    values = torch.zeros(1, 256)
    for states in (11, 14, 17):
        with pytest.raises(ConfigError, match=f"states is {states}; use 12 or 16"):
            kernels.trellis_encode(values, 16, states=states)
        with pytest.raises(ConfigError, match=f"states is {states}"):
            kernels.trellis_values(states)
    for rate in (7, 49):
        with pytest.raises(ConfigError, match=f"rate is {rate}; use 8 to 48"):
            kernels.trellis_encode(values, rate, states=12)
        with pytest.raises(ConfigError, match=f"rate is {rate}; use 8 to 48"):
            kernels.trellis_decode(torch.zeros(1, rate, dtype=torch.int32), states=12)
    for window in (0, 129):
        with pytest.raises(ConfigError, match=f"window is {window}; use 1 to 128"):
            kernels.trellis_encode(values, 16, states=12, window=window)
    with pytest.raises(ConfigError, match="a tile has 255 values"):
        kernels.trellis_encode(values[:, 1:], 16, states=12)
    with pytest.raises(ConfigError, match=r"dtype is torch\.float16"):
        kernels.trellis_decode(torch.zeros(1, 8, dtype=torch.int32), states=12, dtype=torch.float16)
    with pytest.raises(ConfigError, match="not float64"):
        kernels.trellis_encode(values.double(), 16, states=12, level="portable")


@pytest.mark.gpu
@pytest.mark.parametrize("states", STATES)
def test_cuda_gives_the_same_bits(states):
    values = torch.cat([tiles(2, 8, kind) for kind in KINDS])
    packed = kernels.trellis_encode(values, 27, states=states)
    same(kernels.trellis_encode(values.cuda(), 27, states=states).cpu(), packed)
    same(kernels.trellis_decode(packed.cuda(), states=states).cpu(), kernels.trellis_decode(packed, states=states))


@pytest.mark.slow
@pytest.mark.parametrize(("states", "weights"), [(12, 2**20), (16, 2**18)])
@pytest.mark.parametrize("rate", range(8, 41, 4))
def test_committed_distortions(states, weights, rate):
    """On weights that the table has not seen; their number makes the error of the sample about .3 %."""
    row = measured(states)[rate]
    values = torch.randn(weights // 256, 256, generator=torch.Generator().manual_seed(1000 + rate))
    values /= values.square().mean().sqrt()
    packed = kernels.trellis_encode(values * row.factor, rate, states=states, window=32)
    error = kernels.trellis_decode(packed, states=states) / row.factor - values
    assert abs(float(error.square().mean()) / row.distortion - 1) < 0.03


@pytest.mark.parametrize("scale_per", ["matrix", "row"])
def test_scales_are_the_float16_nearest_to_what_is_best(scale_per):
    """What EXL3 stores; numbers of that size have all their bits there."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = TrellisGrid(bits=3, scale_per=scale_per)
    for size in np.linspace(0.5, 1.0, 7):
        square = np.square(size * weight.numpy()).mean(axis=1 if scale_per == "row" else None)
        best = np.atleast_1d(np.sqrt(square) / measured(grid.states)[grid.rate].factor)
        np.testing.assert_array_equal(grid.fit(size * weight, None).scale.numpy(), best.astype(np.float16))
