"""Reading safetensors by offset, and everything that can be wrong with a folder of weights."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from mezzotint.errors import ModelError
from mezzotint.models import open_model
from mezzotint.models.checkpoint import Checkpoint
from mezzotint.models.skeleton import load_config

Folder = Callable[[str], Path]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8, torch.uint8, torch.bool]


@pytest.fixture
def copied(tiny_folder: Folder, tmp_path: Path) -> Path:
    """A tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


@pytest.fixture
def sharded(copied: Path) -> Path:
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: t for name, t in tensors.items() if files[name] == file}, copied / file)
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return copied


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_model(folder)
    for part in parts:
        assert part in str(caught.value)


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=4, max_size=4),
)
def test_reads_what_safetensors_writes(
    shapes: list[list[int]], dtypes: list[torch.dtype], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("written")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": (torch.randn(shape, generator=generator) * 100).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=0)
        assert checkpoint.same_bytes(name, name)


def test_shards_are_one_checkpoint(sharded: Path, tiny_folder: Folder) -> None:
    whole, parts = Checkpoint.open(tiny_folder("llama")), Checkpoint.open(sharded)
    assert set(whole.tensors) == set(parts.tensors)
    for name in whole.tensors:
        torch.testing.assert_close(parts.read(name), whole.read(name), rtol=0, atol=0)


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "does not exist", "config.json")


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", "is a file")


def test_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "is empty")


def test_configuration_without_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    refused(copied, "no model.safetensors", "Download the weights")


def test_weights_without_configuration(copied: Path) -> None:
    (copied / "config.json").unlink()
    refused(copied, "no config.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights(copied: Path, name: str) -> None:
    (copied / "model.safetensors").rename(copied / name)
    refused(copied, name, "pickled", "save_pretrained")


def test_gguf_only(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "model-Q4_K_M.gguf")
    refused(copied, "model-Q4_K_M.gguf", "GGUF", "original")


def test_other_name(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "weights.safetensors")
    refused(copied, "weights.safetensors", "Rename")


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "model-00002-of-00002.safetensors", "missing", "1 of 2", "Download")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated(sharded: Path, kept: int) -> None:
    path = sharded / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    sizes = [str(len(data)), str(len(data) - 1)] if kept == -1 else []
    refused(sharded, path.name, "Download it again", *sizes)


def test_file_cut_after_it_was_opened(copied: Path) -> None:
    checkpoint = Checkpoint.open(copied)
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ModelError, match="truncated"):
        checkpoint.read("lm_head.weight")


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0]}}',
        b"\xff\xfe",
    ],
)
def test_corrupt_header(copied: Path, header: bytes) -> None:
    (copied / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(copied, "model.safetensors", "corrupt", "Download it again")


def test_absurd_header_length(copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(b"\xff" * 64)
    refused(copied, "model.safetensors", "corrupt", "header length")


def test_trailing_bytes(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    refused(copied, "model.safetensors", "corrupt")


def test_unknown_dtype(copied: Path) -> None:
    header = b'{"a": {"dtype": "F2_E1M0", "shape": [4], "data_offsets": [0, 1]}}'
    (copied / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(1))
    refused(copied, "'a'", "F2_E1M0", "BF16")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_corrupt_index(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, "model.safetensors.index.json", "corrupt")


def test_index_that_names_other_tensors(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["made.up"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refused(sharded, "made.up", "does not hold it")


def test_index_that_leaves_the_folder(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(re.sub(r'"model-00001', '"../model-00001', index.read_text()))
    refused(sharded, "not a plain file name")


# ---- configurations ----


def edit(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return folder


def test_unknown_model_type(copied: Path) -> None:
    refused(edit(copied, model_type="lama"), "'lama'", "Update transformers")


def test_no_model_type(copied: Path) -> None:
    refused(edit(copied, model_type=None, architectures=None), "no model_type")


def test_broken_configuration(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    refused(copied, "not valid JSON")


def test_impossible_value(copied: Path) -> None:
    refused(edit(copied, num_attention_heads="four"), "'llama'", "check config.json")


def test_code_in_the_folder_is_not_run(copied: Path) -> None:
    (copied / "configuration_own.py").write_text("raise SystemExit('ran')")
    changes = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    refused(edit(copied, **changes), "'own'", "trust_remote_code")


def test_not_a_language_model(copied: Path) -> None:
    refused(edit(copied, model_type="vit", architectures=["ViTModel"]), "'vit'", "causal language model")


def test_already_quantized(copied: Path) -> None:
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    refused(edit(copied, quantization_config=quantization), "'gptq'", "original model", "[already-quantized]")


def test_packed_by_compressed_tensors_is_for_the_caller_to_decide(copied: Path) -> None:
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    config = load_config(edit(copied, quantization_config=quantization))
    assert config.quantization_config["format"] == "pack-quantized"
    refused(copied, "[already-quantized]")


def test_a_name_without_folder_is_not_looked_up_when_a_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mezzotint.models.load_config", lambda *_: pytest.fail("looked up"))
    with pytest.raises(ModelError, match="does not exist"):
        open_model("someone/some-model")
