"""The examples, run as they stand on the trained tiny model."""

import json
import os
import runpy
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from examples.new_grid import PowersGrid
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from mezzotint.registry import FORMATS, GRIDS, ROUNDINGS
from mezzotint.testing import strategies
from mezzotint.testing.grid_contracts import GRID_CONTRACTS, GridCase
from runs import HELD_OUT, TEXT, TINY_LLAMA

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run an example with arguments; gives what it printed."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    # what an example adds is gone behind it
    for registry in (FORMATS, GRIDS, ROUNDINGS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_quantize_in_python(example: Any, tmp_path: Path) -> None:
    printed = example("quantize_in_python.py", TINY_LLAMA, TEXT, HELD_OUT, tmp_path / "out")
    assert "21 matrices, 4.16 bits a weight, format compressed-tensors" in printed
    assert "nats per token" in printed
    assert "\nThe wheel" in printed  # what the model writes behind it may hold line ends


def test_own_recipe(example: Any, tmp_path: Path) -> None:
    printed = example("own_recipe.py", TINY_LLAMA, TEXT, tmp_path / "out")
    assert printed.count("8 bits, because of rule 'model.layers.0.*'") == 6
    assert printed.count("4 bits, because of rule '*.mlp.down_proj'") == 3
    assert "from Python: 3." in printed


def test_new_rounding(example: Any, tmp_path: Path) -> None:
    printed = example("new_rounding.py", TINY_LLAMA, TEXT, HELD_OUT, tmp_path / "out")
    losses = {line.split()[0]: float(line.split()[-1]) for line in printed.splitlines()}
    assert max(losses["gptq"], losses["cyclic"]) < losses["nearest"]


@pytest.mark.slow
def test_new_grid(example: Any, tmp_path: Path) -> None:
    printed = example("new_grid.py", TINY_LLAMA, TEXT, HELD_OUT, tmp_path / "out")
    losses = {tuple(line.split()[:2]): float(line.split()[-1]) for line in printed.splitlines()}
    for kind in ("powers", "lookup", "uniform"):
        assert losses[kind, "gptq"] < losses[kind, "nearest"]
    # of two tables of eight values that of least error for normal numbers loses less, at any rounding; uniform grids
    # have zero points, and stored bits, beyond that
    for rounding in ("nearest", "gptq"):
        assert losses["lookup", rounding] < 0.9 * losses["powers", rounding]
    assert losses["lookup", "gptq"] < losses["uniform", "gptq"]


@pytest.mark.parametrize("contract", GRID_CONTRACTS, ids=lambda contract: contract.__name__)
@given(data=st.data())
def test_new_grid_keeps_the_contracts(contract: Any, data: st.DataObject) -> None:
    settings = st.builds(
        PowersGrid,
        bits=st.integers(2, 4),
        group_size=st.sampled_from([None, "auto", 1, 3, 8, 16]),
        scale_per=st.sampled_from(["group", "row", "matrix"]),
        range=st.sampled_from(["rms", "absmax", "error", "weighted"]),
        scale_dtype=st.sampled_from(["auto", "float16", "bfloat16", "float32"]),
    )
    contract(data, GridCase(settings=settings, has_zero=False))


@pytest.mark.parametrize("bits", [1, 5])
def test_new_grid_refuses_bad_settings(bits: int) -> None:
    strategies.assert_refused(PowersGrid, {"bits": bits})


def test_new_format(example: Any, tmp_path: Path) -> None:
    printed = example("new_format.py", TINY_LLAMA, TEXT, HELD_OUT, tmp_path / "out")
    assert printed.startswith("refused: ")
    assert "Use --set grid.group_size=32. [plain-groups]" in printed
    assert "21 matrices, every value that of the dense folder" in printed
    assert float(printed.split()[-1]) < 0.01  # four bits lose .004; reading anything else than the values loses nats
    assert 'mezzotint.convert("FOLDER", "dense"' in (tmp_path / "out-plain" / "README.md").read_text(encoding="utf-8")


# of a plate's matrices and a Llama's
NAMES = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.merge": "self_attn.o_proj",
    "switch": "mlp.gate_proj",
    "widen": "mlp.up_proj",
    "narrow": "mlp.down_proj",
}


def test_new_architecture(example: Any, tmp_path: Path) -> None:
    printed = example("new_architecture.py", TINY_LLAMA, TEXT, HELD_OUT, tmp_path / "out")
    untold, told = printed.split("blocks.0, told 7 names:")
    assert "query (?), key (?), value (?) read the output of blocks.0.before.weight" in untold
    assert "no matrix is known to have the role" in untold
    assert "query (q), key (k), value (v) read the output of blocks.0.before.weight" in told
    assert "lpcd-gptq is planned" in told
    plate, llama = (
        [float(part.split()[-1]) for part in line.split(",")]
        for line in printed.splitlines()
        if line.startswith(("plate:", "llama:"))
    )
    # The plate multiplies in another order in norms and positions, which changes last bits. Each of them may turn a
    # code, and this code others in later matrices: the models lose as much as two good roundings of the same matrices.
    assert plate[0] == pytest.approx(llama[0], rel=1e-3)
    assert plate[1] == pytest.approx(llama[1], rel=0.5)
    folders = [tmp_path / f"out-{name}-3bit" for name in ("plate", "llama")]
    reports = [json.loads((folder / "mezzotint.json").read_text()) for folder in folders]
    first = [report["linears"][: len(NAMES)] for report in reports]
    for (ours, theirs), one, other in zip(NAMES.items(), *first, strict=True):
        assert (one["name"], other["name"]) == (f"blocks.0.{ours}", f"model.layers.0.{theirs}")
        # What reads the first norm has the same inputs but for last bits: no code in a thousand differs. Of what comes
        # behind it in the first block, some in a thousand do; a code that differs moves an error by its own size.
        rel = 1e-3 if theirs[-6:] in ("q_proj", "k_proj", "v_proj") else 0.05
        for key in ("weight_error", "h_error", "objective"):
            assert one[key] == pytest.approx(other[key], rel=rel), (ours, key)


def test_own_data(example: Any, tmp_path: Path) -> None:
    text = TEXT.read_text(encoding="utf-8") + HELD_OUT.read_text(encoding="utf-8")
    pieces = [text[start : start + 400] for start in range(0, len(text), 400)]
    records = tmp_path / "records.jsonl"
    records.write_text("\n".join(json.dumps({"text": piece}) for piece in pieces), encoding="utf-8")
    printed = example("own_data.py", TINY_LLAMA, records, tmp_path / "out")
    halves = [
        set((tmp_path / "out" / name).read_text().splitlines()) for name in ("calibration.jsonl", "evaluation.jsonl")
    ]
    assert halves[0].isdisjoint(halves[1])
    assert "KL, nats/token, gptq minus rtn: -" in printed
    assert "significant" in printed


SERVER = """#!{python}
import http.server, json, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def answer(self, value):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(value).encode())
    def do_GET(self):
        self.answer({{"data": []}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({{"choices": [{{"text": f" {{asked['max_tokens']}} words of {{sys.argv[1:3]}}"}}]}})
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""


@pytest.mark.parametrize(
    ("program", "model", "said"), [("vllm", "folder", "['serve', "), ("llama-server", "model.gguf", "['--model', ")]
)
def test_serve(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, model: str, said: str
) -> None:
    """The example's own part: a stand-in answers on the port as these servers do."""
    server = tmp_path / program
    server.write_text(SERVER.format(python=sys.executable), encoding="utf-8")
    server.chmod(server.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    printed = example("serve.py", tmp_path / model, "Count")
    assert f"Count 32 words of {said}" in printed
