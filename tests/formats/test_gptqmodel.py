"""GPTQModel, and transformers with it, load GPTQ folders. Their python is named by ``MEZZOTINT_GPTQ_PYTHON``."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from engines.workers import needs, run_worker
from formats.llama import CONFIG, Choice, fill, make_llama, write_folder
from mezzotint.core.structure import Matrix
from mezzotint.formats.gptq import Gptq, GptqV2
from mezzotint.grids.uniform import UniformGrid

PYTHON = os.environ.get("MEZZOTINT_GPTQ_PYTHON")
WORKER = Path(__file__).parent / "gptqmodel_worker.py"
TOKENIZER = Path(__file__).parents[1] / "data" / "tiny_llama"
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.1}
PROMPTS = [list(range(3, 27)), list(range(50, 2, -2))]

pytestmark = needs("MEZZOTINT_GPTQ_PYTHON", "gptqmodel and optimum")


class Multiplied(nn.Module):
    """The product as GPTQModel computes it, by the matrix of inputs and outputs.

    Some processors add up float16 products of a transposed matrix, which `nn.Linear` has, in another order.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.matrix = nn.Parameter(linear.weight.detach().t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x.flatten(0, -2), self.matrix).view(*x.shape[:-1], -1)


def write(choose: Choice, form: Gptq, dtype: torch.dtype, folder: Path) -> tuple[Tensor, Tensor]:
    """Logits of the original, and of the twin of what was written."""
    model = make_llama(LlamaConfig(**(CONFIG.to_dict() | SIZES)), dtype)
    original = logits_of(model)
    weights = write_folder(model, choose, form, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    fill(model, weights)
    for name in weights:
        model.set_submodule(name, Multiplied(model.get_submodule(name)))
    return original, logits_of(model)


def logits_of(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor(PROMPTS)).logits.float()


def read(reader: str, folder: Path, dtype: str) -> Tensor:
    target = folder / "logits.pt"
    run_worker(PYTHON, WORKER, reader, str(folder), dtype, json.dumps(PROMPTS), str(target), "0")
    return torch.load(target)


def uniform(bits: int, *, symmetric: bool, group_size: int | None = 32) -> Choice:
    grid = UniformGrid(bits=bits, group_size=group_size, symmetric=symmetric, range="minmax")
    return lambda matrix: None if matrix.name == "lm_head" else grid


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("bits", "form", "group_size"), [(2, GptqV2(), 32), (3, Gptq(), 64), (4, Gptq(), 128), (8, GptqV2(), None)]
)
def test_gptqmodel_computes_with_our_values(bits: int, form: Gptq, group_size: int | None, dtype: str, tmp_path: Path):
    choose = uniform(bits, symmetric=form.version == 1, group_size=group_size)
    _, twin = write(choose, form, getattr(torch, dtype), tmp_path)
    # it multiplies the same dense weights by the same operator
    torch.testing.assert_close(read("gptqmodel", tmp_path, dtype), twin, rtol=0, atol=0)


def test_gptqmodel_reads_rules(tmp_path: Path):
    bits = {"0.qkv": 3, "0.o_proj": 8, "0.down_proj": None, "1.gate_up": 2, "1.down_proj": 8}

    def choose(matrix: Matrix) -> UniformGrid | None:
        b = None if matrix.name == "lm_head" else bits.get(matrix.fusion, 4)
        if matrix.name == "model.layers.1.self_attn.v_proj":
            b = 8  # it does not fuse
        return None if b is None else UniformGrid(bits=b, group_size=32, symmetric=True, range="minmax")

    _, twin = write(choose, Gptq(), torch.bfloat16, tmp_path)
    torch.testing.assert_close(read("gptqmodel", tmp_path, "bfloat16"), twin, rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "form"), [(2, GptqV2()), (3, Gptq()), (4, Gptq()), (8, Gptq())])
def test_transformers_agrees(bits: int, form: Gptq, tmp_path: Path):
    original, twin = write(uniform(bits, symmetric=form.version == 1), form, torch.float16, tmp_path)
    # Behind some ten products in turn; its kernel for 4 bits multiplies in bfloat16, the others in float16.
    found = read("transformers", tmp_path, "float16")
    tolerance = 10 * (2**-9 if bits == 4 else 2**-12)
    torch.testing.assert_close(found, twin, rtol=0, atol=tolerance * float(twin.abs().max()))
    assert float((found - twin).abs().max()) < float((original - twin).abs().max()) / 2
