"""Engines on what is written for them: they load it, agree with the dense folder, go on writing, and serve it.

Their pythons are named by ``MEZZOTINT_VLLM_PYTHON`` (which must have mezzotint, for our own format),
``MEZZOTINT_LLAMA_CPP_PYTHON`` (with its server) and ``MEZZOTINT_GPTQ_PYTHON``; SmolLM2 lies in ``MEZZOTINT_SMOLLM2``,
or in demo/smollm2, where ``make demo`` leaves it. With ``MEZZOTINT_ENGINE_RESULTS=FILE`` rows are kept there; the table
of docs/engines.md is made from benchmarks/results/engines.json.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

import mezzotint
from engines.workers import HERE, needs, run_worker, served, version_of
from mezzotint.formats.gguf.format import FILE
from mezzotint.recipes.recipe import Rule, load_recipe
from runs import HELD_OUT, TINY_LLAMA, quantized, stock

ROOT = Path(__file__).parents[2]
VLLM, LLAMA_CPP, GPTQ = (os.environ.get(f"MEZZOTINT_{name}_PYTHON") for name in ("VLLM", "LLAMA_CPP", "GPTQ"))
SMOLLM2 = Path(os.environ.get("MEZZOTINT_SMOLLM2", ROOT / "demo" / "smollm2"))
RESULTS = os.environ.get("MEZZOTINT_ENGINE_RESULTS")
WRITTEN = 8  # tokens
PROMPT = HELD_OUT.read_text(encoding="utf-8")[:240]


class Read(NamedTuple):
    """What an engine made of a folder.

    Attributes:
        found: log-probabilities of the prompt's last tokens, each after all before it.
        written: number of tokens behind it.
        http: it was asked so.
    """

    found: Tensor
    written: int
    http: bool | None
    version: str


class Case(NamedTuple):
    """A cell of the table.

    Attributes:
        error: of a product, root of mean square, as a part of its root mean square.
        small: the tiny model only.
        rules: settings of matrices, by pattern.
        reader: of `READERS`, if it is not that of the engine.
    """

    engine: str
    form: str
    bits: str
    settings: dict[str, Any]
    error: float
    small: bool = False
    rules: Mapping[str, dict[str, Any]] = {}
    reader: str | None = None

    @property
    def name(self) -> str:
        return f"{self.reader or self.engine}-{self.form}-{self.bits}"


INT8 = 2**-7  # of inputs rounded to 8 bits, whose largest is 3.3 deviations: 3.3 / 127 * 12^-1/2
BF16 = 2**-9  # of inputs, weights and outputs that are rounded
EXACT = 0.0  # the same operator on the same dense weights
INTEGERS = {"grid.symmetric": True}
ROWS = {"grid.group_size": None}
MAIN = ("Q2_K", "Q4_K", "Q8_0")
TRELLIS = {"grid.kind": "trellis", "grid.bits": 3.25, "transform.kind": "hadamard"}
# what differs from block to block and inside one; q, k and v as one, gate and up too, where engines fuse them
SIZES = {
    "*.1.self_attn.[qkv]_proj": {"grid.group_size": 64},
    "*.o_proj": {"grid.symmetric": False},
    "*.0.mlp.[gu]*": {"grid.symmetric": False, "grid.group_size": 16},
    "*.mlp.down_proj": ROWS,
}
WIDTHS = {
    "*.1.self_attn.q_proj": {"grid.bits": 8},
    "*.v_proj": {"grid.bits": 2, "grid.group_size": 32},
    "*.o_proj": {"grid.bits": 3},
    "*.mlp.down_proj": {"grid.bits": 8, **ROWS},
}
TYPES = {
    "*.v_proj": {"grid.type": "Q6_K"},
    "*.1.self_attn.[qk]_proj": {"grid.type": "Q2_K"},
    "*.o_proj": {"grid.type": "Q5_1"},
    "*.up_proj": {"grid.type": "Q3_K"},
    "*.1.mlp.down_proj": {"grid.type": "IQ4_NL"},
}
CASES = [
    Case("vllm-cpu", "compressed-tensors", "4", INTEGERS | {"grid.bits": 4}, INT8),
    Case("vllm-cpu", "compressed-tensors", "4, zero points", {"grid.bits": 4}, INT8),
    Case("vllm-cpu", "compressed-tensors", "4, mixed", INTEGERS | {"grid.bits": 4}, INT8, small=True, rules=SIZES),
    Case("vllm-cpu", "gptq", "4", INTEGERS | {"grid.bits": 4}, INT8),
    Case("vllm-cpu", "gptq-v2", "4", INTEGERS | {"grid.bits": 4}, INT8, small=True),
    Case("vllm-cpu", "mezzotint", "3", {"grid.bits": 3}, BF16, small=True),
    Case("vllm-cpu", "mezzotint", "3.25, trellis", TRELLIS, BF16),
    *(
        Case("llama.cpp", "gguf", name, {"grid.type": name}, INT8, small=name not in MAIN)
        for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
    ),
    Case("llama.cpp", "gguf", "Q4_K, mixed", {"grid.kind": "gguf", "grid.type": "Q4_K"}, INT8, small=True, rules=TYPES),
    Case("gptqmodel", "gptq", "4", INTEGERS | {"grid.bits": 4}, BF16),
    Case("gptqmodel", "gptq", "3", INTEGERS | {"grid.bits": 3}, BF16, small=True),
    Case("gptqmodel", "gptq-v2", "2, zero points", {"grid.bits": 2}, BF16, small=True),
    Case("gptqmodel", "gptq-v2", "8, zero points", {"grid.bits": 8}, BF16, small=True),
    Case("gptqmodel", "gptq", "4, mixed", INTEGERS | {"grid.bits": 4}, BF16, small=True, rules=WIDTHS),
    Case("transformers", "gptq", "4", INTEGERS | {"grid.bits": 4}, BF16, reader="transformers with GPTQModel"),
    *(
        Case(
            "transformers",
            "compressed-tensors",
            str(bits),
            INTEGERS | {"grid.bits": bits},
            EXACT,
            small=bits not in (3, 4),
        )
        for bits in range(2, 9)
    ),
    Case("transformers", "compressed-tensors", "3, zero points", {"grid.bits": 3}, EXACT),
    Case("transformers", "compressed-tensors", "8, a scale a row", INTEGERS | {"grid.bits": 8} | ROWS, EXACT),
    Case("transformers", "compressed-tensors", "4, mixed", INTEGERS | {"grid.bits": 4}, EXACT, rules=WIDTHS),
    Case("transformers", "gguf", "Q4_K", {"grid.type": "Q4_K"}, EXACT),
    Case("transformers", "mezzotint", "3.25, trellis", TRELLIS, BF16),
]
MARKS = {
    "vllm-cpu": needs("MEZZOTINT_VLLM_PYTHON", "vLLM and mezzotint"),
    "llama.cpp": needs("MEZZOTINT_LLAMA_CPP_PYTHON", "llama-cpp-python and its server"),
    "gptqmodel": needs("MEZZOTINT_GPTQ_PYTHON", "gptqmodel"),
    "transformers with GPTQModel": needs("MEZZOTINT_GPTQ_PYTHON", "gptqmodel and optimum"),
    "transformers": [pytest.mark.engine],
}


def read_by_vllm(folder: Path, tokens: list[int]) -> Read:
    options = "--served-model-name quantized --dtype bfloat16 --enforce-eager --max-model-len 256 --port {port}"
    command = [str(VLLM), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options.split()]
    return _over_http(command, folder, tokens, f"vllm-cpu {version_of(str(VLLM), 'vllm-cpu')}")


def read_by_llama_cpp(folder: Path, tokens: list[int]) -> Read:
    """Its server shifts the log-probabilities of prompts that begin without a BOS: they are asked for without it."""
    file, target = folder / FILE, folder / "logits.npy"
    worker = ROOT / "tests" / "formats" / "llama_cpp_worker.py"
    run_worker(LLAMA_CPP, worker, str(file), json.dumps([tokens]), PROMPT, str(target))
    version = f"llama-cpp-python {version_of(str(LLAMA_CPP), 'llama-cpp-python')}"
    answered = _over_http(
        [str(LLAMA_CPP), str(HERE / "llama_cpp_server.py"), str(file), "{port}"], folder, tokens, version
    )
    return answered._replace(found=_of_tokens(torch.from_numpy(np.load(target)), tokens))


def _over_http(command: list[str], folder: Path, tokens: list[int], version: str) -> Read:
    body = {
        "model": "quantized",
        "prompt": PROMPT,
        "max_tokens": WRITTEN,
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
    }
    log = folder.with_name(folder.name + ".log")
    with served(command, log, {"VLLM_CPU_KVCACHE_SPACE": "1"}) as ask:
        answer = ask("/v1/completions", body)
    written = answer["usage"]["completion_tokens"]
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    (choice,) = answer["choices"]
    assert choice["text"].startswith(PROMPT)
    return Read(torch.tensor(choice["logprobs"]["token_logprobs"][2:-written]), written, http=True, version=version)


def read_by_gptqmodel(folder: Path, tokens: list[int], reader: str = "gptqmodel") -> Read:
    target = folder / "logits.pt"
    words = [reader, str(folder), "bfloat16", json.dumps([tokens]), str(target), str(WRITTEN)]
    (written,) = run_worker(GPTQ, ROOT / "tests" / "formats" / "gptqmodel_worker.py", *words)
    found = _of_tokens(torch.load(target), tokens)
    return Read(found, written, http=None, version=f"GPTQModel {version_of(str(GPTQ), 'gptqmodel')}")


def read_by_both(folder: Path, tokens: list[int]) -> Read:
    """By transformers, which asks GPTQModel for the modules."""
    read = read_by_gptqmodel(folder, tokens, "transformers")
    return read._replace(version=f"transformers {version_of(str(GPTQ), 'transformers')}, {read.version}")


@torch.no_grad()
def read_by_transformers(folder: Path, tokens: list[int]) -> Read:
    # the settings in a GGUF file are not all that transformers needs
    options = {"gguf_file": FILE, "config": AutoConfig.from_pretrained(folder)} if (folder / FILE).exists() else {}
    model = stock(folder, torch.bfloat16, **options)
    row = torch.tensor([tokens])
    found = _of_tokens(model(row).logits, tokens)
    written = model.generate(row, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False).shape[1] - len(
        tokens
    )
    return Read(found, written, http=None, version=f"transformers {version_of(sys.executable, 'transformers')}")


READERS: dict[str, Callable[[Path, list[int]], Read]] = {
    "vllm-cpu": read_by_vllm,
    "llama.cpp": read_by_llama_cpp,
    "gptqmodel": read_by_gptqmodel,
    "transformers with GPTQModel": read_by_both,
    "transformers": read_by_transformers,
}


def _of_tokens(logits: Tensor, tokens: list[int]) -> Tensor:
    """Log-probabilities of all tokens but the first."""
    return logits[0, :-1].float().log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.fixture(params=["tiny_llama", "SmolLM2-135M-Instruct"])
def model(request: pytest.FixtureRequest) -> tuple[str, Path]:
    if request.param == "tiny_llama":
        return request.param, TINY_LLAMA
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip(f"SmolLM2 is not in {SMOLLM2}; `make demo` puts it there, MEZZOTINT_SMOLLM2 names another folder")
    return request.param, SMOLLM2


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=MARKS[case.reader or case.engine]) for case in CASES]
)
def test_it_loads_agrees_writes_and_serves(case: Case, model: tuple[str, Path], tmp_path: Path) -> None:
    name, original = model
    if case.small and name != "tiny_llama":
        pytest.skip("every cell with the tiny model, the main ones with this")
    out, dense = tmp_path / "out", tmp_path / "dense"
    rules = [Rule(match=pattern, set=settings) for pattern, settings in case.rules.items()]
    recipe = load_recipe("rtn").with_rules(rules) if rules else "rtn"  # by its name it takes what suits the engine
    quantized(original, out, recipe, engine=case.engine, format=case.form, settings=case.settings)
    mezzotint.convert(out, "dense", out=dense)
    tokens = AutoTokenizer.from_pretrained(original)(PROMPT).input_ids
    read = READERS[case.reader or case.engine](out, tokens)
    assert read.written == WRITTEN
    with torch.no_grad():
        logits = stock(dense, torch.bfloat16)(torch.tensor([tokens])).logits
    difference = (read.found - _of_tokens(logits, tokens)[-len(read.found) :]).abs()
    keep(
        {
            "engine": case.reader or case.engine,
            "version": read.version,
            "format": case.form,
            "bits": case.bits,
            "model": name,
            "largest_log_probability_difference": float(difference.max()),
            "tokens_generated": read.written,
            "http": read.http,
        }
    )
    # Errors of products in turn add up like independent ones; twice that, for activations that are not normal.
    products = 4 * json.loads((original / "config.json").read_text())["num_hidden_layers"] + 1
    limit = 2 * case.error * products**0.5 * float(logits.float().std())
    assert float(difference.square().mean().sqrt()) <= limit


def keep(row: dict[str, Any]) -> None:
    """Add a row to the results, in the place of an earlier one of the same cell."""
    if RESULTS is None:
        return
    path = Path(RESULTS)
    cell = ("engine", "format", "bits", "model")
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    places = [i for i, old in enumerate(rows) if all(old[name] == row[name] for name in cell)]
    place = places[0] if places else len(rows)
    path.write_text(json.dumps([*rows[:place], row, *rows[place + 1 :]], indent=1) + "\n", encoding="utf-8")
