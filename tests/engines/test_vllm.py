"""Our own format in vLLM: its python is named by ``MEZZOTINT_VLLM_PYTHON`` and has mezzotint installed too."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mezzotint
from engines.workers import needs, run_worker
from mezzotint.recipes.recipe import Rule, load_recipe
from runs import TINY_LLAMA, quantized, stock

PYTHON = os.environ.get("MEZZOTINT_VLLM_PYTHON")
WORKER = Path(__file__).parents[1] / "formats" / "vllm_worker.py"
PROMPTS = [list(range(3, 27)), list(range(50, 2, -2))]
# every kind of grid, a dense matrix inside a fused layer, and packed tables
RULES = [
    Rule(match="*.0.self_attn.v_proj", keep=True),
    Rule(match="*.q_proj", set={"grid.kind": "trellis", "grid.bits": 3.25, "transform.kind": "hadamard"}),
    Rule(match="*.k_proj", set={"grid.kind": "lookup", "grid.bits": 5}),
    Rule(match="*.gate_proj", set={"grid.bits": 3, "grid.group_size": 32}),
    Rule(match="*.up_proj", set={"grid.kind": "vector", "grid.bits": 3.5}),
    Rule(match="*.o_proj", set={"grid.kind": "gguf", "grid.type": "Q4_K", "grid.range": "error"}),
    Rule(match="lm_head", set={"grid.bits": 8}, keep=False),
]


pytestmark = needs("MEZZOTINT_VLLM_PYTHON", "vLLM and mezzotint")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if subprocess.run([str(PYTHON), "-c", "import mezzotint"], check=False, capture_output=True).returncode:
        pytest.skip(f"{PYTHON} does not have mezzotint")
    out = tmp_path_factory.mktemp("vllm") / "packed"
    embeddings = {"embeddings.kind": "uniform", "embeddings.bits": 8}
    quantized(
        TINY_LLAMA,
        out,
        load_recipe("rtn").with_settings(embeddings).with_rules(RULES),
        engine="vllm-cpu",
        format="mezzotint",
    )
    mezzotint.convert(out, "dense", out=out.with_name("dense"))
    return out


def log_probabilities(folder: Path) -> Tensor:
    """``[prompt, token]`` of the dense folder, as the worker gives them."""
    tokens = torch.tensor(PROMPTS)
    with torch.no_grad():
        logits = stock(folder, torch.bfloat16)(tokens).logits.float()
    return logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]


@pytest.mark.parametrize("mode", ["packed", "dense"])
def test_any_mixture_agrees_with_the_dense_folder(mode: str, folder: Path) -> None:
    arguments = str(folder), "bfloat16", json.dumps(PROMPTS)
    found = torch.tensor(run_worker(PYTHON, WORKER, *arguments, env={"MEZZOTINT_VLLM": mode}))
    twin = log_probabilities(folder.with_name("dense"))
    # Weights, inputs and outputs of some 20 products in turn are rounded to bfloat16, by 2^-9 of their size each; log-
    # probabilities are differences of logits that are as large as they.
    torch.testing.assert_close(found, twin, rtol=0, atol=2**-9 * 20**0.5 * 2 * float(twin.abs().max()))
