"""Packed token embeddings in transformers: rows are decoded as they are asked for, and a tied head shares them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel

import mezzotint
from engines.folders import made_once
from engines.test_transformers import TOKENS, assert_same_logits, dense_weights, twin_of
from formats.test_native import quantized as rounded
from mezzotint.core.contracts import Aim
from mezzotint.engines.packed import QuantizedEmbedding, QuantizedLinear, TiedHead
from mezzotint.engines.product import rows_of
from mezzotint.formats.native import Scheme
from mezzotint.grids.lookup import LookupGrid
from mezzotint.grids.trellis import TrellisGrid
from mezzotint.grids.uniform import UniformGrid
from mezzotint.grids.vector import VectorGrid
from mezzotint.models.skeleton import quiet
from mezzotint.transforms.hadamard import Hadamard
from runs import assert_same_tensors, quantized, tensors_of, tiny

KINDS = {
    "llama": {"embeddings.kind": "trellis", "embeddings.bits": 4.0},  # its head is its own
    "qwen2": {"embeddings.kind": "uniform", "embeddings.bits": 4, "embeddings.group_size": 32},
    "gemma2": {"embeddings.kind": "vector", "embeddings.bits": 4.0},  # multiplies what it looks up
}
GRIDS = [
    UniformGrid(bits=3, group_size=16, range="error", scale_dtype="float16"),
    UniformGrid(bits=4, group_size=None, range="error", scale_per="matrix", scale_dtype="float32"),
    LookupGrid(bits=5, group_size=None, range="rms", scale_dtype="bfloat16"),
    VectorGrid(bits=2.5, group_size=16, range="rms", scale_dtype="float32"),
    TrellisGrid(bits=2.25, window=4),
    TrellisGrid(bits=3.0, window=4, scale_per="row"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Original and packed folder of a tiny architecture, made once; not to be changed."""

    def write(name: str, model: Path, out: Path) -> None:
        quantized(model, out, "rtn", settings=KINDS[name], bits=5, engine="mezzotint")

    return made_once(tmp_path_factory, write)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.kind}-{grid.bits:g}")
@pytest.mark.parametrize("turned", [False, True])
def test_rows_are_those_of_the_whole(grid: Any, turned: bool):
    transform = Hadamard(sides="input") if turned else None
    weight = rounded(grid, transform, torch.randn(37, 48, generator=torch.Generator().manual_seed(1)))
    parts = weight.grid.store(weight.code, weight.shape)
    scheme = Scheme(shape=weight.shape, grid=grid, transform=transform)
    for rows in ([0], [36, 3, 3, 35, 16, 15], list(range(37)), []):
        index = torch.tensor(rows, dtype=torch.long)
        found = rows_of(index, scheme, parts)
        if weight.basis is not None:
            found = weight.basis.take_rows(index).inverse(found)
        torch.testing.assert_close(found, weight.dense()[index], rtol=0, atol=0)


@pytest.mark.parametrize("name", list(KINDS))
def test_logits_are_those_of_the_values(name: str, folders: Any):
    model, out = folders(name)
    found, twin = mezzotint.load(out, dtype=torch.float32), twin_of(model, out)
    embedding, head = found.get_input_embeddings(), found.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert embedding.scheme.grid.kind == KINDS[name]["embeddings.kind"]
    assert isinstance(head, nn.Linear if name == "llama" else TiedHead)
    assert_same_logits(found, twin, TOKENS, 1e-5)  # many tokens: by decoding, in float32
    assert_same_logits(found, twin, TOKENS[:1, :5], 1e-3)  # few: kernels may round inputs to 16 bits
    ids = torch.tensor([[2, 5, 2], [0, 1, 95]])
    with torch.no_grad():
        torch.testing.assert_close(embedding(ids), twin.get_input_embeddings()(ids), rtol=1e-6, atol=1e-7)
    options = {"max_new_tokens": 4, "do_sample": False}
    torch.testing.assert_close(found.generate(TOKENS, **options), twin.generate(TOKENS, **options), rtol=0, atol=0)


def test_a_tied_matrix_is_stored_and_held_once(folders: Any, tmp_path: Path):
    _, out = folders("qwen2")
    stored = tensors_of(out)
    assert not any(name.startswith("lm_head") for name in stored)
    assert "model.embed_tokens.weight" in dense_weights(out)
    found = mezzotint.load(out, dtype=torch.float32)
    every = {id(t): t.nbytes for t in (*found.parameters(), *found.buffers())}
    rotary = sum(b.nbytes for n, b in found.named_buffers() if "inv_freq" in n)
    assert sum(every.values()) - rotary == sum(value.nbytes for value in stored.values())
    found.save_pretrained(tmp_path)
    assert_same_tensors(tmp_path, out)
    assert_same_logits(mezzotint.load(tmp_path, dtype=torch.float32), found, TOKENS, 0.0)


def test_a_model_that_is_cast_copied_and_tied_again(folders: Any):
    _, out = folders("gemma2")
    exact = mezzotint.load(out, dtype=torch.float32)
    found = copy.deepcopy(exact)
    assert found.get_output_embeddings()._shared[0] is found.get_input_embeddings()
    found.tie_weights()
    assert_same_logits(found, exact, TOKENS, 0.0)
    found.to(torch.bfloat16)
    with torch.no_grad():
        assert found.get_input_embeddings()(TOKENS).dtype == torch.bfloat16
        assert found(TOKENS).logits.dtype == torch.bfloat16
    found.get_input_embeddings().verify("embedding")
    assert_same_logits(found, exact, TOKENS, 0.1)
    with quiet():
        placed = type(exact).from_pretrained(out, dtype=torch.float32, device_map="cpu").eval()
        body = AutoModel.from_pretrained(out, dtype=torch.float32).eval()
    assert_same_logits(placed, exact, TOKENS, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(body(TOKENS)[0], exact.model(TOKENS)[0], rtol=0, atol=0)


def test_the_head_of_its_own_can_be_packed_too(tmp_path: Path):
    model = tiny("llama", tmp_path, dtype=torch.float32)
    rules = [{"match": "lm_head", "keep": False, "set": {"grid.bits": 6}}]
    recipe = mezzotint.Recipe(
        grid={"kind": "uniform", "range": "error"},
        rounding={"kind": "nearest"},
        embeddings={"kind": "lookup", "bits": 4},
        rules=rules,  # type: ignore[arg-type]
    )
    quantized(model, tmp_path / "out", recipe, engine="mezzotint", bits=4)
    found = mezzotint.load(tmp_path / "out", dtype=torch.float32)
    assert isinstance(found.get_output_embeddings(), QuantizedLinear)
    assert isinstance(found.get_input_embeddings(), QuantizedEmbedding)
    assert_same_logits(found, twin_of(model, tmp_path / "out"), TOKENS, 1e-5)


def test_dense_export_holds_the_same_values(folders: Any, tmp_path: Path):
    model, out = folders("qwen2")
    quantized(model, tmp_path / "dense", "rtn", settings=KINDS["qwen2"], bits=5, engine="dense")
    expected = dense_weights(out)["model.embed_tokens.weight"]
    found = tensors_of(tmp_path / "dense")
    torch.testing.assert_close(found["model.embed_tokens.weight"], expected, rtol=0, atol=0)
    assert not any(name.startswith("lm_head") for name in found)


def test_turned_rows_lose_less_than_rows_as_they_are():
    """What `lookup_stages` turns them for: columns of different size, as embeddings have."""
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(256, 64, generator=generator) * torch.rand(64, generator=generator).square()
    grid = UniformGrid(bits=4, group_size=None, range="error", scale_dtype="float16")
    aim = Aim(matrix=table, corrected=False, decisions={})
    basis = Hadamard(sides="input").fit([aim], None, None, generator)[0]
    errors = []
    for matrix, back in ((table, lambda value: value), (basis.weight(table), basis.inverse)):
        fitted = grid.fit(matrix, None)
        errors.append(float((back(fitted.decode(fitted.encode(matrix))) - table).square().mean()))
    assert errors[1] < 0.7 * errors[0]
