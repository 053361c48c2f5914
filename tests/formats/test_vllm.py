"""vLLM loads the packed folder and agrees with the dense twin. Its python is named by ``MEZZOTINT_VLLM_PYTHON``."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engines.workers import needs, run_worker
from formats.llama import CONFIG, Choice, fill, make_llama, write_folder
from mezzotint.core.plans import Format
from mezzotint.core.structure import Matrix
from mezzotint.formats.compressed_tensors import CompressedTensors
from mezzotint.formats.gptq import Gptq, GptqV2
from mezzotint.grids.uniform import UniformGrid

PYTHON = os.environ.get("MEZZOTINT_VLLM_PYTHON")
WORKER = Path(__file__).parent / "vllm_worker.py"
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.1,
}
PROMPTS = [list(range(3, 27)), list(range(50, 2, -2))]

pytestmark = needs("MEZZOTINT_VLLM_PYTHON", "vLLM")


def log_probabilities(model: LlamaForCausalLM) -> Tensor:
    """``[prompt, token]``, as the worker gives them."""
    tokens = torch.tensor(PROMPTS)
    with torch.no_grad():
        logits = model(tokens).logits.float()
    return logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]


def assert_agrees(choose: Choice, form: Format, folder: Path) -> None:
    model = make_llama(LlamaConfig(**(CONFIG.to_dict() | SIZES)), torch.bfloat16)
    original = log_probabilities(model)
    twin = log_probabilities(fill(model, write_folder(model, choose, form, folder)))
    # On processors with AMX vLLM rounds activations to 8 bits, which costs 0.16 here; rounding the weights costs 1 to
    # 1.5, and misreading them more.
    tolerance = (original - twin).abs().max().item() / 4
    found = torch.tensor(run_worker(PYTHON, WORKER, str(folder), "bfloat16", json.dumps(PROMPTS)))
    torch.testing.assert_close(found, twin, rtol=0, atol=tolerance)


# without a GPU vLLM has kernels for 4 bits only; per channel some take widths that are multiples of 128
@pytest.mark.parametrize(
    ("form", "symmetric", "group_size"),
    [
        (CompressedTensors(), True, 32),
        (CompressedTensors(), False, 32),
        (CompressedTensors(), True, None),
        (Gptq(), True, 32),
        (GptqV2(), True, 128),
    ],
)
def test_agrees_with_the_dense_twin(form: Format, symmetric: bool, group_size: int | None, tmp_path: Path):
    grid = UniformGrid(bits=4, group_size=group_size, symmetric=symmetric, range="minmax")
    assert_agrees(lambda m: None if m.name == "lm_head" else grid, form, tmp_path)


def test_rules_of_gptq_hold_for_what_vllm_fuses(tmp_path: Path):
    sizes = {"0.qkv": 32, "1.gate_up": 32, "1.o_proj": 128, "0.down_proj": None}

    def choose(matrix: Matrix) -> UniformGrid | None:
        size = None if matrix.name == "lm_head" else sizes.get(matrix.fusion, 64)
        return None if size is None else UniformGrid(bits=4, group_size=size, symmetric=True, range="minmax")

    assert_agrees(choose, Gptq(), tmp_path)
