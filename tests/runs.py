"""Quantizing tiny models in tests: requests, results, and tensors of a folder."""

from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import mezzotint
from mezzotint.models import Source, open_model
from mezzotint.models.skeleton import quiet
from mezzotint.planning.plan import make_plan
from mezzotint.planning.planned import Planned
from mezzotint.recipes.request import Request, make_request
from mezzotint.sweep.calibrate import calibration_windows
from mezzotint.testing import models

DATA = Path(__file__).parent / "data"
TINY_LLAMA = DATA / "tiny_llama"
TEXT = DATA / "tiny_text.txt"
HELD_OUT = DATA / "tiny_text_heldout.txt"
# float32: what is computed here is held against float64
SMALL = {"calibration": TEXT, "samples": 8, "seqlen": 32, "device": "cpu", "precision": "float32"}


def tiny(name: str, folder: Path, **options: Any) -> Path:
    """The trained Llama by its name, or a random model made in the folder."""
    if name == "tiny_llama":
        return TINY_LLAMA
    # a few ids are left for what transformers adds to the tokenizers of some architectures (Qwen2)
    with mock.patch.object(models, "VOCABULARY", models.VOCABULARY - 4):
        return models.make_tiny_model(name, folder / name, **options)


def request_of(model: Path, recipe: Any = "gptq", **options: Any) -> Request:
    """What the Python API makes of these arguments, with a small calibration text."""
    return make_request(model, recipe, **_with_defaults(options))


def plan_of(model: Path, recipe: Any = "gptq", **options: Any) -> Planned:
    return make_plan(opened(model), request_of(model, recipe, **options))


def least_memory(model: Path, recipe: Any = "gptq", **options: Any) -> int:
    """The smallest ``memory`` that is not refused: everything that can be spilled is."""
    return plan_of(model, recipe, **options).costs.least_memory_bytes


@cache
def opened(folder: Path) -> Source:
    """A model opened once, for what fills no skeleton."""
    return open_model(folder)


def quantized(model: Path, out: Path, recipe: Any = "gptq", **options: Any) -> dict[str, Any]:
    """Quantize with a small calibration text; gives the report."""
    return mezzotint.quantize(model, recipe, out=out, **_with_defaults(options))


def _with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    if "bits" in options:
        options = {**options, "bits": float(options["bits"])}  # beartype takes no int for a float
    return {**SMALL, **options}


def windows_of(source: Source, request: Request) -> tuple[Any, Any]:
    """The windows of a run: those that statistics are fitted on, and those held out."""
    planned = make_plan(source, request)
    assert planned.calibration is not None
    return calibration_windows(source, planned.calibration, request, lambda *_: None).split(seed=request.seed)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by name."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, dtype and shape included."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_same_tensors(actual: Path, expected: Path) -> None:
    """Two folders hold the same tensors, bit for bit."""
    first, second = tensors_of(actual), tensors_of(expected)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert_same_bits(value, second[name])


def stock(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """The model as transformers itself loads it."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
