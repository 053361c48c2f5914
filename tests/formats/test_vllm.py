"""vLLM loads the packed folder and agrees with the dense twin. Its python is named by ``MEZZOTINT_VLLM_PYTHON``."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from formats.llama import CONFIG, fill, make_llama, write_folder
from mezzotint.formats.compressed_tensors import CompressedTensors
from mezzotint.grids.uniform import UniformGrid

PYTHON = os.environ.get("MEZZOTINT_VLLM_PYTHON")
WORKER = Path(__file__).parent / "vllm_worker.py"
PROMPTS = [list(range(3, 27)), list(range(40, 2, -2))]

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(PYTHON is None, reason="MEZZOTINT_VLLM_PYTHON names no python that has vLLM"),
]


def log_probabilities_of_vllm(folder: Path) -> list[list[float]]:
    done = subprocess.run(
        [str(PYTHON), str(WORKER), str(folder), "bfloat16", json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


# without a GPU vLLM has kernels for 4 bits only, and for widths that are multiples of 32
@pytest.mark.parametrize(("symmetric", "group_size"), [(True, 32), (False, 32), (True, None)])
def test_agrees_with_the_dense_twin(symmetric: bool, group_size: int | None, tmp_path: Path):
    config = LlamaConfig(**(CONFIG.to_dict() | {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}))
    model = make_llama(config, torch.bfloat16)
    grid = UniformGrid(bits=4, group_size=group_size, symmetric=symmetric, range="minmax")
    weights = write_folder(
        model, lambda m: None if m.name == "lm_head" else grid, CompressedTensors(), tmp_path / "packed"
    )
    twin = fill(model, weights)
    for tokens, found in zip(PROMPTS, log_probabilities_of_vllm(tmp_path / "packed"), strict=True):
        with torch.no_grad():
            logits = twin(torch.tensor([tokens])).logits[0].float()
        expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        # bfloat16 keeps 8 bits: logits of size 1 differ by a few units of 2^-8 between orders of summation
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=0.03)
