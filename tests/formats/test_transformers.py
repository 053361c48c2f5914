"""Stock transformers is the judge: it loads our folders and computes with exactly our values."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from formats.llama import fill, make_llama, write_folder
from formats.models_for_gguf import CONFIGS, make_model, refill, write_file
from mezzotint.core.structure import Matrix
from mezzotint.formats.compressed_tensors import CompressedTensors
from mezzotint.formats.dense import Dense
from mezzotint.formats.gguf.format import FILE
from mezzotint.grids.uniform import UniformGrid
from sums import lay_alike

TOKENS = torch.arange(1, 25).reshape(2, 12)


def stock(folder: Path, **options: Any) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def assert_same(folder: Path, twin: PreTrainedModel, **options: Any) -> None:
    """The same values and logits, bit for bit: both multiply the same dense weights, laid alike in memory."""
    model = stock(folder, **options)
    with torch.no_grad():
        model(TOKENS)  # the first forward decompresses
    state = model.state_dict()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)
    lay_alike(model, twin)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, twin(TOKENS).logits, rtol=0, atol=0)


def in_blocks(grid: UniformGrid):
    return lambda matrix: None if matrix.name == "lm_head" else grid


@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size"),
    list(itertools.product(range(2, 9), (True, False), (32, 64, None))),
)
def test_one_scheme(bits: int, symmetric: bool, group_size: int | None, tmp_path: Path):
    grid = UniformGrid(bits=bits, group_size=group_size, symmetric=symmetric, range="minmax")
    model = make_llama()
    weights = write_folder(model, in_blocks(grid), CompressedTensors(), tmp_path)
    assert_same(tmp_path, fill(model, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_half_precision_checkpoint(dtype: torch.dtype, symmetric: bool, tmp_path: Path):
    grid = UniformGrid(bits=3, group_size=32, symmetric=symmetric, range="error")
    model = make_llama(dtype=dtype)
    weights = write_folder(model, in_blocks(grid), CompressedTensors(), tmp_path)
    assert_same(tmp_path, fill(model, weights))


def test_narrow_scales_in_a_float32_checkpoint(tmp_path: Path):
    grid = UniformGrid(bits=4, group_size=32, symmetric=True, range="minmax", scale_dtype="bfloat16")
    model = make_llama()
    weights = write_folder(model, in_blocks(grid), CompressedTensors(), tmp_path)
    assert_same(tmp_path, fill(model, weights))


def test_mixed_by_layer_and_inside_a_block(tmp_path: Path):
    bits = {"0.qkv": 2, "0.o_proj": 8, "0.gate_up": 5, "0.down_proj": 3, "1.qkv": 4, "1.o_proj": 8, "1.gate_up": 6}
    sizes = {"0.qkv": 32, "0.o_proj": None, "1.qkv": 64}

    def choose(matrix: Matrix) -> UniformGrid | None:
        if matrix.fusion not in bits:
            return None  # the head, and one matrix inside a block
        group_size = sizes.get(matrix.fusion, 64)
        return UniformGrid(bits=bits[matrix.fusion], group_size=group_size, symmetric=True, range="minmax")

    model = make_llama()
    weights = write_folder(model, choose, CompressedTensors(), tmp_path, shard_bytes=100_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(tmp_path, fill(model, weights))


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_head_and_kept_block(symmetric: bool, tmp_path: Path):
    grid = UniformGrid(bits=4, group_size=64, symmetric=symmetric, range="minmax")
    model = make_llama()
    weights = write_folder(
        model, lambda m: None if m.name.startswith("model.layers.1.") else grid, CompressedTensors(), tmp_path
    )
    assert "lm_head" in weights
    assert_same(tmp_path, fill(model, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense(dtype: torch.dtype, tmp_path: Path):
    grid = UniformGrid(bits=3, group_size=48, symmetric=False, range="minmax")  # ragged: dense does not mind
    model = make_llama(dtype=dtype)
    weights = write_folder(model, in_blocks(grid), Dense(), tmp_path, shard_bytes=60_000)
    assert_same(tmp_path, fill(model, weights))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_1", "IQ4_NL"])
def test_gguf_files(name: str, type_name: str, tmp_path: Path):
    if type_name != "Q4_0" and name != "llama":
        pytest.skip("every type for one architecture, every architecture for one type")
    model = make_model(CONFIGS[name]())
    fill(model, write_file(model, type_name, tmp_path))
    # What it takes from the file alone lacks biases, frequencies and windows. Mistral is a Llama to GGUF, and to it.
    config = {} if name == "mistral" else {"config": model.config}
    assert_same(tmp_path, refill(model, tmp_path), gguf_file=FILE, dtype=torch.float32, **config)


@pytest.mark.parametrize("type_name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_gguf_files_of_k_types(type_name: str, tmp_path: Path):
    config = CONFIGS["llama"]()
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 256, 64
    model = make_model(config)
    fill(model, write_file(model, type_name, tmp_path))
    assert_same(tmp_path, refill(model, tmp_path), gguf_file=FILE, dtype=torch.float32, config=config)
