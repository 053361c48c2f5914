"""Everything that can be wrong with a request: exit 2, one message that says what to do, nothing written."""

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from runs import TEXT, TINY_LLAMA, quantized, tensors_of, tiny

Refused = Callable[..., str]
Run = Callable[..., Any]
SMALL = ("--calibration", str(TEXT), "--samples", "4", "--seqlen", "32", "--device", "cpu")


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def contains(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, text


# ---- the model ------------------------------------------------------------------------------------------------------


def test_missing_folder(refused: Refused, tmp_path: Path) -> None:
    contains(refused(tmp_path / "nowhere"), "nowhere", "does not exist", "config.json")


def test_empty_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    contains(refused(tmp_path / "model"), "is empty", "config.json")


def test_a_file_instead_of_a_folder(refused: Refused) -> None:
    contains(refused(TEXT), "is a file; a folder is needed")


def test_config_without_weights(refused: Refused, damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    contains(refused(damaged), "has no model.safetensors", "Download the weights")


def test_weights_without_config(refused: Refused, damaged: Path) -> None:
    (damaged / "config.json").unlink()
    contains(refused(damaged), "has no config.json")


def test_truncated_weights(refused: Refused, damaged: Path) -> None:
    data = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(data[:-1000])
    contains(refused(damaged), "truncated", str(len(data)), str(len(data) - 1000), "Download it again")


def test_missing_shard(refused: Refused, damaged: Path) -> None:
    tensors = tensors_of(damaged)
    (damaged / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    first = "model-00001-of-00002.safetensors"
    save_file({name: value for name, value in tensors.items() if files[name] == first}, damaged / first)
    (damaged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    contains(refused(damaged), "model-00002-of-00002.safetensors", "is missing: 1 of 2", "Download")


def test_missing_tensor(refused: Refused, damaged: Path) -> None:
    tensors = tensors_of(damaged)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save(damaged, tensors)
    contains(refused(damaged), "model.layers.1.mlp.up_proj.weight")


def test_pickled_weights(refused: Refused, damaged: Path) -> None:
    torch.save(tensors_of(damaged), damaged / "pytorch_model.bin")
    (damaged / "model.safetensors").unlink()
    contains(refused(damaged), "pytorch_model.bin", "can run code", "save_pretrained")


def test_already_quantized(refused: Refused, tmp_path: Path) -> None:
    quantized(TINY_LLAMA, tmp_path / "packed", "rtn")
    contains(refused(tmp_path / "packed"), "already quantized", "Give the original model")


def test_quantized_by_others(refused: Refused, damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (damaged / "config.json").write_text(json.dumps(config), encoding="utf-8")
    contains(refused(damaged), "already quantized", "gptq", "Give the original model")


def test_code_from_the_folder_is_not_run(refused: Refused, damaged: Path, tmp_path: Path) -> None:
    config = json.loads((damaged / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (damaged / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (damaged / "own.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\n", encoding="utf-8")
    contains(refused(damaged), "needs Python code from its folder", "trust")
    assert not (tmp_path / "proof").exists()


def test_unknown_architecture(refused: Refused, damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text(encoding="utf-8"))
    (damaged / "config.json").write_text(json.dumps({**config, "model_type": "own"}), encoding="utf-8")
    contains(refused(damaged), "model type 'own'", "Update transformers")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_weights_that_are_not_finite(value: float, recipe: str, refused: Refused, damaged: Path) -> None:
    tensors = tensors_of(damaged)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = value
    save(damaged, tensors)
    message = refused(damaged, "--recipe", recipe)
    contains(message, "model.layers.2.mlp.down_proj", "NaN or infinity in 1 of 196608 values", "Download it again")


@pytest.mark.parametrize("target", ["weight", "qep"])
def test_activations_that_are_not_finite(target: str, refused: Refused, damaged: Path) -> None:
    tensors = tensors_of(damaged)
    tensors["model.layers.1.input_layernorm.weight"][:] = 3e38  # finite, but what it multiplies is not
    save(damaged, tensors)
    message = refused(damaged, "--recipe", "gptq", "--set", f"target.kind={target}")
    contains(message, "NaN or infinity", "block 1", "mezzotint evaluate")


def test_norms_and_embeddings_that_are_not_finite(refused: Refused, damaged: Path) -> None:
    tensors = tensors_of(damaged)
    norm = tensors["model.layers.1.input_layernorm.weight"]
    tensors["model.layers.1.input_layernorm.weight"] = torch.full_like(norm, torch.nan)
    save(damaged, tensors)
    contains(refused(damaged, "--recipe", "gptq"), "model.layers.1.input_layernorm.weight", "256 of 256")
    tensors["model.layers.1.input_layernorm.weight"] = norm
    tensors["model.embed_tokens.weight"][:] = torch.inf
    save(damaged, tensors)
    contains(refused(damaged, "--recipe", "gptq"), "NaN or infinity", "block 0")


def test_vocabulary_mismatch(refused: Refused, tmp_path: Path, damaged: Path) -> None:
    tensors = tensors_of(damaged)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:1000].contiguous()
    save(damaged, tensors)
    config = json.loads((damaged / "config.json").read_text(encoding="utf-8"))
    (damaged / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}), encoding="utf-8")
    contains(refused(damaged), "tokenizer and model do not belong together", "1023", "1000 tokens", "Use the tokenizer")


def test_no_tokenizer(refused: Refused, damaged: Path) -> None:
    (damaged / "tokenizer.json").unlink()
    (damaged / "tokenizer_config.json").unlink()
    contains(refused(damaged), "no usable tokenizer", "tokenizer.json")


# ---- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--recipe", "gptk"), ("unknown recipe 'gptk'", "Did you mean 'gptq'?")),
        (("--recipe", "mine.yaml"), ("'mine.yaml' does not exist",)),
        (("--set", "grid.groupsize=64"), ("unknown setting 'grid.groupsize'", "Did you mean 'grid.group_size'?")),
        (("--set", "gridd.bits=4"), ("unknown setting", "Did you mean")),
        (("--set", "grid.bits"), ("has no '='", "grid.group_size=64")),
        (("--set", "grid.bits=["), ("not a valid YAML scalar",)),
        (("--set", "grid.symmetric=maybe"), ("'grid.symmetric'", "'maybe'")),
        (("--set", "grid.group_size=100"), ("100 does not divide the width 256", "128")),
        (("--set", "grid.group_size=0"), ("grid.group_size is 0", "at least 1")),
        (("--bits", "9"), ("grid.bits is 9", "2 to 8")),
        (("--bits", "1"), ("grid.bits is 1", "2 to 8")),
        (("--bits", "3.25"), ("--bits is 3.25", "whole bits", "--bits 3 or --bits 4")),
        (("--bits", "nan"), ("--bits is nan", "--bits 2 to 8")),
        (("--keep", "*.mpl.*"), ("'*.mpl.*' matches none", "model.layers.0.self_attn.q_proj")),
        (("--keep", "*"), ("nothing to quantize",)),
        (("--for", "vlm"), ("unknown engine 'vlm'", "Did you mean 'vllm'?")),
        (("--device", "tpu"), ("unknown device 'tpu'", "cpu")),
        (("--memory", "much"), ("'much' is not a size", "8GiB")),
        (("--samples", "1"), ("--samples is 1", "at least 2")),
        (("--samples", "many"), ("--samples is 'many'", "whole number")),
        (("--seqlen", "1000"), ("--seqlen is 1000", "at most 512 positions")),
        (("--seqlen", "-5"), ("--seqlen is '-5'", "whole number")),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], parts: tuple[str, ...], refused: Refused) -> None:
    contains(refused(TINY_LLAMA, *arguments), *parts)


def test_formats_that_cannot_hold_a_model(refused: Refused, tmp_path: Path) -> None:
    model = tiny("gpt2", tmp_path)
    contains(refused(model, "--for", "vllm"), "nn.Linear only", "Use --for dense")


# ---- the text -------------------------------------------------------------------------------------------------------


def test_missing_text(refused: Refused, tmp_path: Path) -> None:
    contains(refused(TINY_LLAMA, "--calibration", tmp_path / "no.txt"), "no.txt", "does not exist")
    contains(refused(TINY_LLAMA, "--calibration", "wikitext3"), "'wikitext3'", "Did you mean 'wikitext2'?")


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("empty.txt", b"", ("has no text", "Give a file with text")),
        ("latin.txt", "naïve ".encode("latin-1") * 50, ("is not UTF-8: byte 0xef at offset 2", "iconv")),
        ("short.txt", b"Only a few words.", ("tokens", "windows of 32", "Give more text")),
        ("text.docx", b"PK", ("'.docx'", "Rename or convert")),
        ("broken.jsonl", b'{"text": "one"}\n{"text": ', ("line 2 is not JSON",)),
        ("other.jsonl", b'{"body": "one"}\n', ("none of the fields", "body")),
    ],
)
def test_unusable_text(name: str, data: bytes, parts: tuple[str, ...], refused: Refused, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    contains(refused(TINY_LLAMA, "--calibration", tmp_path / name), *parts)


def test_too_little_memory_says_how_much_is_enough(refused: Refused, mezzotint: Run, tmp_path: Path) -> None:
    told = refused(TINY_LLAMA, "--memory", "100MiB")
    contains(told, "--memory is 100MiB", "--samples")
    enough = re.search(r"needs at least (\d+MiB)", told)
    assert enough is not None
    assert mezzotint("plan", TINY_LLAMA, *SMALL, "--memory", enough[1]).code == 0
    less = f"{int(enough[1].removesuffix('MiB')) - 1}MiB"
    assert mezzotint("plan", TINY_LLAMA, *SMALL, "--memory", less).code == 2


def test_too_large_to_sample_from(refused: Refused) -> None:
    contains(refused(TINY_LLAMA, "--memory", "1MiB", "--calibration", "self"), "--memory", "--calibration FILE")


# ---- the place ------------------------------------------------------------------------------------------------------


def test_output_that_is_not_empty(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine", encoding="utf-8")
    contains(refused(TINY_LLAMA), "exists and is not empty (1 entries)", "choose another --out")
    assert (tmp_path / "out" / "mine").read_text(encoding="utf-8") == "mine"


def test_output_that_is_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    contains(refused(TINY_LLAMA), "is a file")


def test_unfinished_work_of_another_run(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "shard").write_text("half", encoding="utf-8")
    contains(refused(TINY_LLAMA), "out.partial", "unfinished work", "choose another --out")


def test_not_enough_disk(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 12345, 12345))
    message = " ".join(refused(TINY_LLAMA).split())
    contains(message, "no space", "12,345 are available", "bytes are needed", "Free some space")


def test_an_empty_output_folder_is_fine(mezzotint: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    answer = mezzotint("quantize", TINY_LLAMA, "--out", tmp_path / "out", "--recipe", "rtn")
    assert answer.code == 0  # type: ignore[attr-defined]
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("command", ["plan", "evaluate", "inspect"])
def test_other_commands_refuse_too(command: str, mezzotint: Callable[..., object], tmp_path: Path) -> None:
    extra = ("--text", TEXT) if command == "evaluate" else ()
    answer = mezzotint(command, tmp_path / "nowhere", *extra, "--json")
    assert (answer.code, answer.stdout) == (2, "")  # type: ignore[attr-defined]
    assert "error:" in answer.stderr  # type: ignore[attr-defined]
