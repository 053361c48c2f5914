"""Rotated folders: the same logits in transformers' own float64 models, and refusals by name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mezzotint.errors import ConfigError, ModelError
from mezzotint.jobs.rotate import Rotations, rotate
from mezzotint.models.skeleton import quiet
from mezzotint.transforms.rotation import rotation
from runs import TINY_LLAMA, tensors_of, tiny

IDS = torch.arange(3, 51).view(2, 24)


@contextmanager
def everything_in_float64() -> Iterator[None]:
    """Norms of transformers compute in float32, whatever the model's dtype."""
    to = torch.Tensor.to

    def wide(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        swap = {torch.float32: torch.float64}
        args = tuple(swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        return to(self, *args, **kwargs)  # type: ignore[arg-type]

    with mock.patch.object(torch.Tensor, "to", wide), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def logits(folder: Path) -> Tensor:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    with torch.no_grad(), everything_in_float64():
        return model(input_ids=IDS, use_cache=False).logits


def rotated(name: str, folder: Path, dtype: torch.dtype = torch.float64, **choices: object) -> tuple[Path, Path]:
    model = tiny(name, folder, dtype=dtype)
    rotate(model, folder / "out", Rotations(**choices))  # type: ignore[arg-type]
    return model, folder / "out"


@pytest.mark.parametrize("residual", ["hadamard", "random"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "gpt_neox"])
def test_logits_stay_where_they_are(name: str, residual: str, tmp_path: Path) -> None:
    model, out = rotated(name, tmp_path, residual=residual, heads=residual)
    expected, found = logits(model), logits(out)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    before, after = tensors_of(model), tensors_of(out)
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype for key in before)
    same = {key for key in before if torch.equal(before[key], after[key])}
    # biases of what does not write to the stream, norms of queries and keys, sinks
    assert all(key.endswith((".bias", "gate_up_proj_bias", "q_norm.weight", "k_norm.weight", "sinks")) for key in same)


@pytest.mark.parametrize(("name", "extra"), [("qwen2", 1), ("falcon_new_decoder", 1)])
def test_a_tied_head_is_untied_with_consent(name: str, extra: int, tmp_path: Path) -> None:
    model, out = rotated(name, tmp_path, untie=True)
    torch.testing.assert_close(logits(out), logits(model), rtol=0, atol=1e-9)
    assert len(tensors_of(out)) == len(tensors_of(model)) + extra
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3", "opt", "gpt2", "olmo2", "falcon_multi_query"])
def test_heads_alone_go_almost_everywhere(name: str, tmp_path: Path) -> None:
    model, out = rotated(name, tmp_path, residual="none")
    torch.testing.assert_close(logits(out), logits(model), rtol=0, atol=1e-9)
    before, after = tensors_of(model), tensors_of(out)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed
    assert all("attn" in key or "attention" in key for key in changed)


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("qwen2", {}, "its head is the embedding.*the model grows by 0.2 MiB.*--untie"),
        ("gemma3", {"untie": True}, r"o_proj passes a norm before it is added to the residual stream \[post-norm\]"),
        ("olmo2", {}, r"q_proj.*do not read the residual stream through a norm|\[post-norm\]"),
        ("opt", {"untie": True}, "the embedding computes something else afterwards"),
        ("gpt2", {"untie": True}, "the embedding computes something else afterwards"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(name: str, choices: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        rotated(name, tmp_path, **choices)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_choices_are_checked() -> None:
    for wrong in ({"residual": "hadamrad"}, {"residual": "none", "heads": "none"}, {"dtype": "int8"}):
        with pytest.raises(ConfigError):
            Rotations(**wrong)


def test_outliers_of_the_stream_are_spread_and_a_wider_dtype_keeps_the_model(tmp_path: Path) -> None:
    report = rotate(TINY_LLAMA, tmp_path / "out", Rotations(dtype="float32"))
    assert report["difference"] < 1e-5
    found = tensors_of(tmp_path / "out")
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    # weights and rotation in float32: a relative 1e-7 an operation, over the blocks
    torch.testing.assert_close(logits(tmp_path / "out"), logits(TINY_LLAMA), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("size", [1, 8, 12, 15])
def test_rotations_are_orthogonal(kind: str, size: int) -> None:
    eye, ones = torch.eye(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    for keeps_mean in (False, True):
        found = rotation(size, 3, kind, keeps_mean=keeps_mean)  # type: ignore[arg-type]
        torch.testing.assert_close(found @ found.t(), eye, rtol=0, atol=1e-13)
        assert torch.equal(found, rotation(size, 3, kind, keeps_mean=keeps_mean))  # type: ignore[arg-type]
        if size > 1:
            assert not torch.allclose(found, rotation(size, 4, kind, keeps_mean=keeps_mean))  # type: ignore[arg-type]
        if keeps_mean:
            torch.testing.assert_close(ones @ found, ones, rtol=0, atol=1e-12)
    if kind == "hadamard" and size == 8:
        torch.testing.assert_close(rotation(8, 3, kind).abs(), torch.full((8, 8), 8**-0.5, dtype=torch.float64))
