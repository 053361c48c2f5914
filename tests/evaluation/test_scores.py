"""lm-eval through us and by itself: the same numbers; on folders of every format, and on the original."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mezzotint.errors import CalibrationError, ConfigError
from mezzotint.evaluation.scores import evaluate_tasks
from runs import HELD_OUT, TINY_LLAMA, quantized

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (extra 'eval')"),
    pytest.mark.filterwarnings("default"),  # of lm-eval and its dependencies, which are not ours to mend
]
ITEMS = 40
CHOICE = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{begin}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{endings}}}}"
num_fewshot: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def task_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which of two halves of lines goes on from a first half: made from the text that no calibration sees."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [line for line in HELD_OUT.read_text(encoding="utf-8").splitlines() if len(line.split()) > 12]
    halves = [(" ".join(line.split()[:8]), " " + " ".join(line.split()[8:])) for line in lines]
    rows = []
    for i in range(ITEMS):
        endings = [halves[i][1], halves[(i + 7) % len(halves)][1]]
        rows.append({"begin": halves[i][0], "gold": i % 2, "endings": endings[:: -1 if i % 2 else 1]})
    (folder / "halves.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = CHOICE.format(task="halves", data=folder / "halves.jsonl")
    (folder / "halves.yaml").write_text(text, encoding="utf-8")
    (folder / "broken.yaml").write_text(CHOICE.format(task="broken", data=folder / "no.jsonl"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in every format."""
    made = tmp_path_factory.mktemp("formats")
    for name, engine in (("packed", "transformers"), ("native", "mezzotint"), ("dense", "dense")):
        quantized(TINY_LLAMA, made / name, "gptq", bits=3, engine=engine)
    return {path.name: path for path in made.iterdir()}


def by_itself(folder: Path, task_path: Path, out: Path) -> dict[str, Any]:
    """What lm-eval's own command says of a folder."""
    arguments = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"]
    arguments += ["--include_path", str(task_path), "--tasks", "halves", "--batch_size", "8", "--output_path", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    (written,) = out.rglob("results_*.json")
    return json.loads(written.read_text(encoding="utf-8"))["results"]["halves"]


def test_the_numbers_of_lm_eval_itself(folders: dict[str, Path], task_path: Path, tmp_path: Path) -> None:
    alone = by_itself(folders["dense"], task_path, tmp_path)
    for folder in folders.values():
        score = evaluate_tasks(folder, ["halves"], task_path=[task_path])["halves"]
        found = {one.metric: one for one in (score, *score.others)}
        assert score.metric == "acc_norm"
        assert score.count == ITEMS
        for metric, one in found.items():
            assert one.value == alone[f"{metric},none"], (folder.name, metric)
            assert one.stderr == alone[f"{metric}_stderr,none"], (folder.name, metric)


def test_beside_the_original(folders: dict[str, Path], task_path: Path) -> None:
    score = evaluate_tasks(folders["packed"], ["halves"], against=TINY_LLAMA, task_path=[task_path], limit=30)["halves"]
    original = evaluate_tasks(TINY_LLAMA, ["halves"], task_path=[task_path], limit=30)["halves"]
    assert (score.reference, score.reference_stderr) == (original.value, original.stderr)
    assert score.difference is not None
    assert score.flips is not None
    assert score.difference.mean == pytest.approx(score.value - original.value)
    assert score.difference.mean == pytest.approx(score.flips["gained"] - score.flips["lost"])
    assert score.count == score.difference.count == 30
    assert score.digest == original.digest


def test_what_cannot_be_run_is_an_error(task_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown task 'halvs'"):
        evaluate_tasks(TINY_LLAMA, ["halvs"], task_path=[task_path])
    with pytest.raises(ConfigError, match="which is not a folder"):
        evaluate_tasks(TINY_LLAMA, ["halves"], task_path=[tmp_path / "none"])
    with pytest.raises(CalibrationError, match=r"the data of broken cannot be read.*--task-path"):
        evaluate_tasks(TINY_LLAMA, ["broken"], task_path=[task_path])
    with pytest.raises(ConfigError, match="--limit is 0; it must be at least 1"):
        evaluate_tasks(TINY_LLAMA, ["halves"], task_path=[task_path], limit=0)
