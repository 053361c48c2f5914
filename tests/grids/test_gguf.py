"""What is particular to the block types of GGUF: bytes that the gguf package reads, and how scales are chosen."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.errors import ConfigError
from mezzotint.grids.gguf.grid import GgufGrid
from mezzotint.grids.gguf.types import BLOCK_TYPES
from mezzotint.rounding.gptq import Gptq
from mezzotint.testing.problems import ProblemSettings, make_problem

every_type = pytest.mark.parametrize("name", BLOCK_TYPES)
# Relative squared error of normal weights, rounded to nearest: three digits, measured once with the search as it is.
ERROR = {
    "Q4_0": 0.00656,
    "Q4_1": 0.00487,
    "Q5_0": 0.00162,
    "Q5_1": 0.00117,
    "Q8_0": 2.47e-05,
    "IQ4_NL": 0.00542,
    "Q2_K": 0.0673,
    "Q3_K": 0.0205,
    "Q4_K": 0.00495,
    "Q5_K": 0.00124,
    "Q6_K": 0.000297,
}


def quantization_type(name):
    return gguf.GGMLQuantizationType[name]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def fitted(name, weight, importance=None):
    return GgufGrid(type=name, range="error" if importance is None else "weighted").fit(weight, importance)


def random_blocks(name, rows, blocks, seed):
    """Any bits but for scales, which are finite and not zero."""
    t = BLOCK_TYPES[name]
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows * blocks, t.nbytes), dtype=torch.uint8, generator=generator)
    parts = t.unpack(raw)
    for what in parts.keys() & {"super_scale", "super_min"}:
        parts[what] = (0.5 + torch.rand(rows * blocks, 1, generator=generator)).half().float()
    return t.pack(parts).view(rows, -1)


@every_type
def test_blocks_are_as_large_as_the_package_says(name):
    t = BLOCK_TYPES[name]
    assert (t.block, t.nbytes) == gguf.GGML_QUANT_SIZES[quantization_type(name)]


@every_type
@given(seed=st.integers(0, 2**20), rows=st.integers(1, 3), blocks=st.integers(1, 3))
def test_any_bytes_decode_as_the_package_decodes_them(name, seed, rows, blocks):
    stored = random_blocks(name, rows, blocks, seed)
    shape = (rows, blocks * BLOCK_TYPES[name].block)
    code, grid = GgufGrid(type=name).restore(shape, {"blocks": stored})
    expected = gguf.dequantize(stored.numpy(), quantization_type(name))
    np.testing.assert_array_equal(grid.decode(code).numpy(), expected)
    torch.testing.assert_close(grid.store(code, shape)["blocks"], stored, rtol=0, atol=0)


@every_type
def test_what_is_fitted_decodes_as_the_package_decodes_it(name):
    weight = normal(6, 512)
    weight[2], weight[3, :256] = 0, 0
    weight[4] *= 1e-4
    weight[5] = weight[5].abs() + 0.1
    grid = fitted(name, weight)
    code = grid.encode(weight)
    expected = gguf.dequantize(grid.store(code, (6, 512))["blocks"].numpy(), quantization_type(name))
    np.testing.assert_array_equal(grid.decode(code).numpy(), expected)


@every_type
def test_error_of_normal_weights(name):
    weight = normal(128, 1024)
    grid = fitted(name, weight)
    error = (grid.decode(grid.encode(weight)) - weight).square().sum() / weight.square().sum()
    # 128 x 1024 weights: the standard error of the mean is a third of a percent
    assert float(error) == pytest.approx(ERROR[name], rel=0.01)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_search_beats_the_plain_range_of_the_package(name):
    weight = normal(64, 256)
    grid = fitted(name, weight)
    ours = (grid.decode(grid.encode(weight)) - weight).square().sum()
    plain = gguf.dequantize(gguf.quantize(weight.numpy(), quantization_type(name)), quantization_type(name))
    assert float(ours) < 0.93 * float((torch.from_numpy(plain) - weight).square().sum())


@every_type
def test_importance_moves_the_error_to_columns_that_matter_less(name):
    weight = normal(32, 512)
    importance = torch.where(torch.arange(512) % 4 == 0, 16.0, 1.0)

    def error(grid):
        return ((grid.decode(grid.encode(weight)) - weight).square() * importance).sum()

    assert float(error(fitted(name, weight, importance))) < float(error(fitted(name, weight)))


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K"])
def test_zero_is_a_value_where_there_is_a_zero_point(name):
    grid = fitted(name, normal(4, 256))
    zeros = torch.zeros(4, 256)
    torch.testing.assert_close(grid.decode(grid.encode(zeros)), zeros, rtol=0, atol=0)


@every_type
def test_blocks_of_zeros_stay_zeros(name):
    weight = normal(2, 512)
    weight[0] = 0
    grid = fitted(name, weight)
    assert not grid.decode(grid.encode(weight))[0].any()


@every_type
def test_gptq_lowers_the_error_that_matters(name):
    settings = ProblemSettings(grid=GgufGrid(type=name), rows=16, columns=256, tokens=2000, seed=1, dtype=torch.float32)
    problem = make_problem(settings)
    gram = problem.statistics.gram

    def loss(value):
        error = value - problem.weight
        return float(((error @ gram) * error).sum())

    rounded = Gptq(damping=0.01).round(problem.aim, problem.grid, problem.statistics)
    assert loss(rounded.value) < 0.8 * loss(problem.grid.decode(problem.grid.encode(problem.weight)))


@pytest.mark.parametrize(
    ("name", "width", "taken"),
    [
        ("Q2_K", 576, "Q4_0"),
        ("Q3_K", 576, "Q4_0"),
        ("Q4_K", 576, "Q5_0"),
        ("Q5_K", 576, "Q5_1"),
        ("Q6_K", 576, "Q8_0"),
        ("Q6_K", 512, "Q6_K"),
        ("Q4_0", 576, "Q4_0"),
    ],
)
def test_a_width_that_does_not_divide_takes_the_type_that_llama_cpp_takes(name, width, taken):
    assert GgufGrid(type=name).resolve((4, width), torch.float32).type == taken


@pytest.mark.parametrize(
    ("grid", "width", "message"),
    [
        (GgufGrid(type="Q4_K", fallback=False), 576, r"blocks of 256 columns.*576.*grid.fallback=true"),
        (GgufGrid(type="Q4_K"), 100, r"blocks of 256 columns.*100 columns.*Keep it\.$"),
        (GgufGrid(type="Q4_0"), 100, r"blocks of 32 columns.*Keep it\.$"),
    ],
)
def test_what_fits_no_block_is_refused(grid, width, message):
    with pytest.raises(ConfigError, match=message):
        grid.resolve((4, width), torch.float32)


def test_the_weighted_range_needs_statistics():
    with pytest.raises(ConfigError, match=r"weighted.*use 'error'"):
        GgufGrid(type="Q4_0").fit(normal(2, 32), None)
