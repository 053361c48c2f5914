"""llama.cpp runs our files and agrees with the dense twin. Its python is named by ``MEZZOTINT_LLAMA_CPP_PYTHON``."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from engines.workers import needs, run_worker
from formats.llama import fill
from formats.models_for_gguf import CONFIGS, make_model, refill, write_file
from mezzotint.formats.gguf.format import FILE, export

PYTHON = os.environ.get("MEZZOTINT_LLAMA_CPP_PYTHON")
WORKER = Path(__file__).parent / "llama_cpp_worker.py"
PROMPTS = [list(range(3, 51)), list(range(1000, 952, -1))]
TEXT = "Once upon a time, in 1999, there wasn't  a cat; was there?"

pytestmark = needs("MEZZOTINT_LLAMA_CPP_PYTHON", "llama-cpp-python")
every_model = pytest.mark.parametrize("name", CONFIGS)


def run(folder):
    """Logits ``[prompt, token, vocabulary]``, the tokens of `TEXT`, and what follows it."""
    target = folder / "logits.npy"
    found = run_worker(PYTHON, WORKER, str(folder / FILE), json.dumps(PROMPTS), TEXT, str(target))
    return torch.from_numpy(np.load(target)), found["tokens"], found["written"]


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(PROMPTS)).logits.float()


def assert_near(logits, twin, *, blocks_of):
    """Root mean squares against what llama.cpp loses by rounding the inputs of products to 8 bits.

    The largest of 32 normal numbers is about 2.5 deviations, of 256 about 3.3; a 127th of that times 12^-1/2 is the
    error of each input, 2^-7.5 and 2^-7. Each logit lies behind nine products in turn, and their errors add up like
    independent ones, threefold: 2^-6 and 2^-5.5. Twice that is allowed, for activations that are not normal.
    """
    limit = {32: 2**-5, 256: 2**-4.5}[blocks_of] * float(twin.std())
    assert float((logits - twin).square().mean().sqrt()) < limit


@every_model
def test_dense_files_agree(name, tmp_path):
    model = make_model(CONFIGS[name]())
    write_file(model, "Q8_0", tmp_path)  # config and tokenizer
    model.save_pretrained(tmp_path)
    export(tmp_path, tmp_path / FILE, model.config.to_dict(), {}, tables=False)
    original = logits_of(model)
    logits, tokens, written = run(tmp_path)
    # Keys and values are cached in float16: an error of 2^-11 of each, some of which add up over blocks
    torch.testing.assert_close(logits, original, rtol=0, atol=2**-8 * float(original.abs().max()))
    assert tokens == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids
    assert written


@every_model
@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"])
def test_quantized_files_agree_with_their_twin(name, type_name, tmp_path):
    if type_name != "Q4_0" and name != "llama":
        pytest.skip("every type for one architecture, every architecture for one type")
    model = make_model(CONFIGS[name]())
    fill(model, write_file(model, type_name, tmp_path))
    twin = logits_of(refill(model, tmp_path))
    logits, _, _ = run(tmp_path)
    assert_near(logits, twin, blocks_of=32)


@pytest.mark.parametrize("type_name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_types_agree_with_their_twin(type_name, tmp_path):
    config = CONFIGS["llama"]()
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 256, 64
    model = make_model(config)
    twin = logits_of(refill(fill(model, write_file(model, type_name, tmp_path)), tmp_path))
    logits, _, _ = run(tmp_path)
    assert_near(logits, twin, blocks_of=256)
