"""transformers loads our own format, keeps it packed, and computes what the codes stand for."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import mezzotint
from engines.folders import made_once
from formats.test_native import quantized as rounded
from mezzotint import kernels
from mezzotint.engines import hook
from mezzotint.engines.packed import QuantizedLinear
from mezzotint.engines.product import FEW, product
from mezzotint.errors import FormatError
from mezzotint.formats.decoded import packed_weights
from mezzotint.formats.native import Scheme
from mezzotint.grids.lookup import LookupGrid
from mezzotint.grids.trellis import TrellisGrid
from mezzotint.grids.uniform import UniformGrid
from mezzotint.grids.vector import VectorGrid
from mezzotint.models.skeleton import quiet
from mezzotint.recipes.recipe import Recipe, load_recipe
from runs import assert_same_tensors, quantized, stock, tensors_of

TOKENS = torch.arange(3, 51).reshape(2, 24)
# every kind of grid, with and without a transform, and a head
RULES = [
    {"match": "*.q_proj", "set": {"grid.kind": "trellis", "grid.bits": 4.25, "transform.kind": "hadamard"}},
    {"match": "*.k_proj", "set": {"grid.kind": "lookup", "grid.bits": 5, "grid.range": "rms"}},
    {"match": "*.v_proj", "set": {"grid.kind": "trellis", "grid.bits": 4.0, "grid.scale_per": "row"}},
    {"match": "*.0.mlp.down_proj", "keep": True},
    {"match": "*.gate_proj", "set": {"grid.kind": "lookup", "grid.scale_per": "matrix", "transform.kind": "quip"}},
    {"match": "*.up_proj", "set": {"grid.bits": 4, "transform.kind": "hadamard", "transform.sides": "input"}},
    {"match": "lm_head", "keep": False, "set": {"grid.bits": 6}},
]


def mixed(*, head: bool) -> Recipe:
    rules = RULES if head else RULES[:-1]
    return Recipe(**{**load_recipe("rtn").model_dump(), "grid": {"kind": "uniform", "bits": 5}, "rules": rules})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Original and packed folder of a tiny architecture, made once; not to be changed."""

    def write(_: str, model: Path, out: Path) -> None:
        head = not json.loads((model / "config.json").read_text()).get("tie_word_embeddings", True)
        quantized(model, out, mixed(head=head))

    return made_once(tmp_path_factory, write)


def dense_weights(out: Path) -> dict[str, Tensor]:
    """What the codes of the file stand for."""
    stored = tensors_of(out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    return {name: weight.dense() for name, weight in packed_weights(config, stored, stored.__getitem__).items()}


@torch.no_grad()
def twin_of(model: Path, out: Path) -> PreTrainedModel:
    twin = stock(model)
    for name, value in dense_weights(out).items():
        twin.get_parameter(name).copy_(value)
    return twin


def packed_modules(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@torch.no_grad()
def assert_same_logits(found: PreTrainedModel, expected: PreTrainedModel, tokens: Tensor, error: float) -> None:
    wanted = expected(tokens, use_cache=False).logits
    difference = (found(tokens, use_cache=False).logits - wanted).abs().max()
    assert float(difference) <= error * float(wanted.abs().max())


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without biases, and with
def test_logits_are_those_of_the_values(name: str, folders: Any):
    model, out = folders(name)
    found, twin = mezzotint.load(out, dtype=torch.float32), twin_of(model, out)
    assert {f"{n}.weight" for n in packed_modules(found)} == set(dense_weights(out))
    assert {module.scheme.grid.kind for module in packed_modules(found).values()} == {"uniform", "lookup", "trellis"}
    assert (name == "qwen2") == any(module.bias is not None for module in packed_modules(found).values())
    assert_same_logits(found, twin, TOKENS, 1e-5)  # many tokens: by decoding, in float32
    assert_same_logits(found, twin, TOKENS[:1, :5], 1e-3)  # few: kernels may round inputs to 16 bits
    assert not torch.equal(found(TOKENS).logits, stock(model)(TOKENS).logits)


def test_generates_what_the_values_do(folders: Any):
    model, out = folders("llama")
    options = {"max_new_tokens": 6, "do_sample": False}
    found = mezzotint.load(out, dtype=torch.float32).generate(TOKENS, **options)
    torch.testing.assert_close(found, twin_of(model, out).generate(TOKENS, **options), rtol=0, atol=0)


def test_nothing_decoded_is_kept(folders: Any):
    model, out = folders("llama")
    found = mezzotint.load(out, dtype=torch.float32)
    stored = sum(value.nbytes for value in tensors_of(out).values())

    def in_use() -> int:
        every = {id(t): t.nbytes for t in (*found.parameters(), *found.buffers())}
        return sum(every.values()) - sum(b.nbytes for n, b in found.named_buffers() if "inv_freq" in n)

    assert in_use() == stored < sum(value.nbytes for value in tensors_of(model).values())
    with torch.no_grad():
        found(TOKENS)
    assert in_use() == stored
    module = found.get_submodule("model.layers.0.self_attn.q_proj")
    assert {n for n in vars(module) if isinstance(vars(module)[n], Tensor)} == set()


def test_saving_writes_the_same_tensors(folders: Any, tmp_path: Path):
    _, out = folders("llama")
    mezzotint.load(out).save_pretrained(tmp_path)
    assert_same_tensors(tmp_path, out)
    again, first = mezzotint.load(tmp_path, dtype=torch.float32), mezzotint.load(out, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, first(TOKENS).logits, rtol=0, atol=0)


def test_scales_keep_their_dtype(folders: Any):
    _, out = folders("llama")
    stored = tensors_of(out)
    for found in (mezzotint.load(out, dtype=torch.bfloat16), mezzotint.load(out).to(torch.bfloat16)):
        for name, module in packed_modules(found).items():
            for part, value in module.stored.items():
                torch.testing.assert_close(value, stored[f"{name}.{part}"], rtol=0, atol=0)
            module.verify(name)
    exact = mezzotint.load(out, dtype=torch.float32)
    with torch.no_grad():
        assert found(TOKENS).logits.dtype == torch.bfloat16
    assert_same_logits(found, exact, TOKENS, 0.1)


def test_a_model_without_its_head(folders: Any):
    _, out = folders("llama")
    with quiet():
        body = AutoModel.from_pretrained(out, dtype=torch.float32).eval()
    whole = mezzotint.load(out, dtype=torch.float32)
    assert len(packed_modules(body)) == len(packed_modules(whole.model)) > 0
    with torch.no_grad():
        torch.testing.assert_close(body(TOKENS)[0], whole.model(TOKENS)[0], rtol=0, atol=0)


# ---- products -------------------------------------------------------------------------------------------------------


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Exact twins of the fused kernels, whether there are any yet or not; gives the names of those called."""
    called: list[str] = []

    def trellis_matmul(x: Tensor, packed: Tensor, *, states: int) -> Tensor:
        called.append("trellis")
        tiles = kernels.trellis_decode(packed.flatten(0, 1), states=states)
        return x.float() @ kernels.from_tiles(tiles.view(*packed.shape[:2], 256)).t()

    def packed_matmul(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, size: int, *, bits: int) -> Tensor:
        called.append("uniform")
        code = kernels.unpack_bits(words, bits, x.shape[1])
        return x.float() @ kernels.affine_decode(code, scale, zero, size).t()

    def table_matmul(x: Tensor, words: Tensor, scale: Tensor, table: kernels.LevelTable, size: int) -> Tensor:
        called.append("table")
        return x.float() @ (table.decode(words, x.shape[1]) * scale[:, torch.arange(x.shape[1]) // size]).float().t()

    monkeypatch.setattr(kernels, "table_matmul", table_matmul)
    monkeypatch.setattr(kernels, "trellis_matmul", trellis_matmul, raising=False)
    monkeypatch.setattr(kernels, "packed_matmul", packed_matmul, raising=False)
    return called


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        (UniformGrid(bits=3, group_size=16, range="minmax", scale_dtype="float16"), "uniform"),
        (UniformGrid(bits=4, group_size=None, range="minmax", symmetric=True, scale_dtype="float32"), "uniform"),
        (UniformGrid(bits=3, group_size=None, range="minmax", scale_per="matrix", scale_dtype="float32"), "uniform"),
        (LookupGrid(bits=3, group_size=16, range="rms", scale_dtype="float16"), "table"),
        (LookupGrid(bits=4, table="nf4", group_size=None, range="absmax", scale_dtype="float32"), "table"),
        (VectorGrid(bits=1.5, group_size=16, range="rms", scale_dtype="bfloat16"), "table"),
        (VectorGrid(bits=6, group_size=None, range="rms", scale_dtype="float16"), "table"),
        (TrellisGrid(bits=2.5, window=4), "trellis"),
        (TrellisGrid(bits=3.0, window=4, scale_per="row"), "trellis"),
    ],
)
def test_few_tokens_take_the_fused_product(grid: Any, kind: str, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(2)
    weight = rounded(grid, None, torch.randn(37, 50, generator=generator))
    parts = weight.grid.store(weight.code, weight.shape)
    scheme = Scheme(shape=weight.shape, grid=grid, transform=None)
    called = _calls(monkeypatch)
    for tokens, dtype, fused in (
        (FEW, torch.float32, True),
        (1, torch.bfloat16, True),
        (FEW + 1, torch.float32, False),
        (1, torch.float64, False),
    ):
        called.clear()
        x = torch.randn(tokens, 50, generator=generator).to(dtype)
        y = product(x, scheme, parts, dtype)
        assert called == [kind] * fused
        expected = x.double() @ weight.dense().double().t()
        # levels of tables are rounded to 16 bits of the largest; the rest is float32
        error = 1e-4 if fused and kind == "table" else 1e-5
        assert float((y.double() - expected).abs().max()) <= error * float(expected.abs().max())


def test_few_tokens_can_be_decoded_too(monkeypatch: pytest.MonkeyPatch, folders: Any):
    monkeypatch.setattr("mezzotint.engines.product.FEW", 0)
    model, out = folders("llama")
    assert_same_logits(mezzotint.load(out, dtype=torch.float32), twin_of(model, out), TOKENS[:1, :3], 1e-5)


def test_tensors_that_are_replaced_are_used(folders: Any):
    """A state that is assigned, not copied, leaves nothing of what was prepared from the one before."""
    model = mezzotint.load(folders("llama")[1], dtype=torch.float32)
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    first = linears[0]
    x = torch.randn(2, first.in_features, generator=torch.Generator().manual_seed(0))
    before = first(x)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    state["weight_basis_output_scale" if "weight_basis_output_scale" in state else "weight_scale"] *= 2
    first.load_state_dict(state, assign=True)
    torch.testing.assert_close(first(x), 2 * before, rtol=1e-6, atol=1e-6)


# ---- what cannot be loaded ------------------------------------------------------------------------------------------


def copied(out: Path, target: Path, **changes: Any) -> Path:
    """The folder with other keys in its ``quantization_config``."""
    for path in out.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_damage_is_noticed_and_named(folders: Any, tmp_path: Path):
    folder = copied(folders("llama")[1], tmp_path)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    name = "model.layers.1.self_attn.q_proj"
    begin, end = json.loads(data[8 : 8 + length])[f"{name}.weight_packed"]["data_offsets"]
    data[8 + length + (begin + end) // 2] ^= 4
    file.write_bytes(bytes(data))
    with pytest.raises(FormatError, match=rf"{name} is damaged"), quiet():
        mezzotint.load(folder)


def test_other_versions_and_models_are_refused(folders: Any, tmp_path: Path):
    _, out = folders("llama")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    with pytest.raises(FormatError, match="format_version 7"), quiet():
        mezzotint.load(copied(out, tmp_path, format_version=7))
    modules = {**config["modules"], "model.layers.9.mlp.up_proj": 0}
    with pytest.raises(FormatError, match="LlamaForCausalLM has no module of that name"), quiet():
        mezzotint.load(copied(out, tmp_path, modules=modules))
    with pytest.raises(FormatError, match="has a LlamaRMSNorm there, not an nn"), quiet():
        mezzotint.load(copied(out, tmp_path, modules={"model.norm": 0}))
    number = next(i for i, s in enumerate(config["schemes"]) if s["shape"] != config["schemes"][0]["shape"])
    first = next(iter(config["modules"]))
    with pytest.raises(FormatError, match=rf"{first} is packed with shape"), quiet():
        mezzotint.load(copied(out, tmp_path, modules={**config["modules"], first: number}))


# ---- registration ---------------------------------------------------------------------------------------------------


def test_registering_again_does_nothing():
    before = list(sys.meta_path)
    hook.install()
    assert "mezzotint" in AUTO_QUANTIZER_MAPPING
    assert sys.meta_path == before


FIRST = """
import sys
import mezzotint
assert not {"torch", "transformers", "pydantic"} & sys.modules.keys()
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].self_attn.q_proj).__name__ == "QuantizedLinear"
"""
SECOND = """
import transformers.quantizers.auto as auto
assert "mezzotint" not in auto.AUTO_QUANTIZER_MAPPING
import mezzotint
assert "mezzotint" in auto.AUTO_QUANTIZER_MAPPING
"""


@pytest.mark.parametrize("program", [FIRST, SECOND])
def test_importing_registers_in_either_order(program: str, folders: Any):
    _, out = folders("llama")
    done = subprocess.run([sys.executable, "-c", program, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
