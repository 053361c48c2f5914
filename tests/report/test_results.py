"""What is kept of an evaluation, the card that shows it, comparisons, and the command that repeats a run."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mezzotint import evaluate
from mezzotint.cli.app import app
from mezzotint.errors import ConfigError, ModelError
from mezzotint.evaluation.tasks import Metric, TaskRun, TaskScore, scored
from mezzotint.recipes.recipe import Recipe, Rule, load_recipe
from mezzotint.report.card import loading, update_card
from mezzotint.report.command import recipe_yaml
from mezzotint.report.compare import compare
from mezzotint.report.report import read_report
from mezzotint.report.results import RESULTS_NAME, items_of, keep_results, read_results
from runs import HELD_OUT, TEXT, TINY_LLAMA, plan_of, quantized

SIZES = {"seqlen": 64, "windows": 6, "device": "cpu"}


def task(items: tuple[float, ...]) -> TaskScore:
    run = TaskRun(count=len(items), shots=0, digest="d", metrics={"acc": Metric(value=0.5, stderr=0.1, items=items)})
    return scored(run, run)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Nearest and GPTQ at 3 bits, both measured and kept."""
    made = tmp_path_factory.mktemp("results")
    for name, items in (("rtn", (1.0, 0.0, 0.0, 0.0)), ("gptq", (1.0, 1.0, 1.0, 0.0))):
        quantized(TINY_LLAMA, made / name, name, bits=3, samples=32, seqlen=128)
        found = evaluate(made / name, HELD_OUT, against=TINY_LLAMA, **SIZES)
        keep_results(made / name, text=found, tasks={"halves": task(items)}, against="tiny_llama")
        update_card(made / name)
    return made / "rtn", made / "gptq"


def test_what_is_kept_is_what_was_found(folders: tuple[Path, Path]) -> None:
    kept = read_results(folders[1])
    found = evaluate(folders[1], HELD_OUT, against=TINY_LLAMA, **SIZES)
    text = kept["texts"][HELD_OUT.name]
    assert {name: text[name] for name in found.figures()} == found.figures()
    assert text["against"] == "tiny_llama"
    assert sum(text["by_window"]["kl"]) / sum(text["by_window"]["tokens"]) == pytest.approx(found.kl_nats)
    assert items_of(kept["tasks"]["halves"]["items"]["acc"]) == [1.0, 1.0, 1.0, 0.0]
    assert str(HELD_OUT.parent) not in (folders[1] / RESULTS_NAME).read_text(encoding="utf-8")


def test_comparison(folders: tuple[Path, Path]) -> None:
    found, pairs = compare(folders)
    assert [one.name for one in found] == ["rtn", "gptq"]
    by_measure = {pair.measure: pair for pair in pairs}
    losses = [read_results(folder)["texts"][HELD_OUT.name]["kl_nats"] for folder in folders]
    kl = by_measure["KL, nats/token"]
    assert (kl.first, kl.second) == ("gptq", "rtn")
    assert kl.difference.mean == pytest.approx(losses[1] - losses[0])
    assert kl.difference.high < 0, "GPTQ is clearly better than nearest rounding at 3 bits"
    assert (by_measure["acc"].difference.mean, by_measure["acc"].difference.count) == (0.5, 4)
    assert found[0].figures()["texts"][HELD_OUT.name]["kl_nats"] == losses[0]


def test_other_windows_and_references_are_not_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    quantized(TINY_LLAMA, tmp_path / "other", "rtn", bits=3)
    found = evaluate(tmp_path / "other", HELD_OUT, against=TINY_LLAMA, **{**SIZES, "windows": 5})
    keep_results(tmp_path / "other", text=found, against="tiny_llama")
    assert compare([folders[0], tmp_path / "other"])[1] == ()
    same = evaluate(tmp_path / "other", HELD_OUT, against=TINY_LLAMA, **SIZES)
    keep_results(tmp_path / "other", text=same, against="another_llama")  # whose divergences are from another model
    assert [pair.measure for pair in compare([folders[0], tmp_path / "other"])[1]] == ["log perplexity"]


def test_folders_that_cannot_be_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2 folders, not 1"):
        compare(folders[:1])
    with pytest.raises(ConfigError, match="is given twice"):
        compare([folders[0], folders[0]])
    with pytest.raises(ModelError, match=r"has no mezzotint.json"):
        compare([folders[0], tmp_path])
    (tmp_path / RESULTS_NAME).write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="is not valid JSON"):
        read_results(tmp_path)


def test_the_card(folders: tuple[Path, Path]) -> None:
    card = (folders[1] / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "tiny_llama"
    assert front["base_model_relation"] == "quantized"
    assert front["library_name"] == "transformers"
    report, kept = read_report(folders[1]), read_results(folders[1])
    text = kept["texts"][HELD_OUT.name]
    for part in (
        f"at {report['bits_per_weight']:.2f} bits per weight",
        f"{report['output_bytes'] / 1e6:,.1f} MB, before {report['original_bytes'] / 1e6:,.1f} MB",
        f"| {text['kl_nats']:.4f} ± {text['kl_stderr']:.4f} |",
        "| halves | acc | 0.5000 ± 0.1000 |",
        report["command"],
        "vllm serve",
    ):
        assert part in card, part
    assert str(TEXT.parent) not in card
    assert report["original_bytes"] == sum(
        path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
        for path in TINY_LLAMA.glob("*.safetensors")
    )


def test_the_original_passes_its_licence_on_and_edits_stay(tmp_path: Path) -> None:
    import shutil

    model = Path(shutil.copytree(TINY_LLAMA, tmp_path / "model"))
    (model / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Mine\n", encoding="utf-8")
    quantized(model, tmp_path / "out", "rtn")
    path = tmp_path / "out" / "README.md"
    front = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert "x" not in front["tags"]
    path.write_text(path.read_text(encoding="utf-8") + "\nMy own words.\n", encoding="utf-8")
    keep_results(tmp_path / "out", tasks={"halves": task((1.0, 0.0))}, against=None)
    update_card(tmp_path / "out")
    card = path.read_text(encoding="utf-8")
    assert "| halves | acc |" in card
    assert card.endswith("\nMy own words.\n")


def test_the_card_loads_what_it_says(tmp_path: Path) -> None:
    """The python of every card, run as it stands."""
    for form, engine in (("compressed-tensors", "transformers"), ("mezzotint", "mezzotint"), ("dense", "dense")):
        out = tmp_path / form
        quantized(TINY_LLAMA, out, "rtn", engine=engine)
        assert loading(form) in (out / "README.md").read_text(encoding="utf-8")
        for block in re.findall(r"```python\n(.*?)```", loading(form, str(out)), re.DOTALL):
            names: dict[str, Any] = {}
            exec(block, names)
            tokens = names["tokenizer"]("A plate", return_tensors="pt")
            assert names["model"](**tokens).logits.isfinite().all()


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("rtn", {}),
        ("gptq", {"bits": 3, "seed": 4, "settings": {"grid.group_size": None, "rounding.order": "natural"}}),
        (
            "default",
            {"keep": ["*.0.*", "*.mlp.down_proj"], "settings": {"target.alpha": 0.25, "refinement.kind": "none"}},
        ),
        ("qep-gptq", {"engine": "dense", "settings": {"target.kind": "loaq", "target.beta": 0.1}}),
        ("loaq-trellis", {"bits": 2.25, "lines": True}),
        ("gptq", {"precision": "float32", "lines": True, "packing": False}),
    ],
)
def test_the_command_plans_the_same(recipe: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from mezzotint.report.command import command_of

    planned = plan_of(TINY_LLAMA, recipe, **{**options, "calibration": TEXT.name})
    words = shlex.split(command_of(planned.request, planned.calibration, "out"))
    assert words[:5] == ["mezzotint", "quantize", "tiny_llama", "--out", "out"]
    monkeypatch.chdir(TEXT.parent)  # where the model and the text have these names
    result = CliRunner().invoke(app, [*words[1:], "--device", "cpu", "--dry-run", "--json"])
    assert result.exit_code == 0, result.stderr
    assert f'"fingerprint": "{planned.plan.fingerprint}"' in result.stdout


def test_an_allocated_folder_says_what_was_asked_for(tmp_path: Path) -> None:
    """Its matrices' bits are a result: the command and the recipe hold the budget."""
    from mezzotint.cli.page import single

    out = tmp_path / "small"
    report = quantized(TINY_LLAMA, out, "gptq", engine="mezzotint", settings={"allocation.kind": "knapsack"}, bits=3.5)
    assert report["command"].startswith("mezzotint quantize tiny_llama --out small --recipe gptq ")
    assert {"--set allocation.kind=knapsack", "--bits 3.5"} <= set(re.findall(r"--\S+ \S+", report["command"]))
    assert "matrices" not in yaml.safe_load(recipe_yaml(report["recipe"]))
    assert report["command"] in (out / "README.md").read_text(encoding="utf-8")
    page = single("small", read_report(out), read_results(out), None, ())
    assert "<h2>Size against loss</h2>" in page
    assert f"with {report['allocation']['kept']} bits was kept" in page


def test_a_recipe_file_that_says_the_same(tmp_path: Path) -> None:
    recipe = Recipe(
        name="mine",
        grid={"kind": "uniform", "bits": 3, "group_size": None},
        rules=(Rule(match="*.down_proj", set={"grid.bits": 8}), Rule(match="*.0.*", keep=True)),
    )
    (tmp_path / "mine.yaml").write_text(recipe_yaml(recipe.model_dump(mode="json")), encoding="utf-8")
    assert load_recipe(str(tmp_path / "mine.yaml")) == recipe
