"""What is written behind the tensors: whatever is odd about it is found before the work, and costs no result."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import mezzotint
from mezzotint.errors import FormatError, MezzotintError, ModelError, OutputError, WriteError
from mezzotint.jobs.ending import Ending
from mezzotint.jobs.rotate import Rotations, rotate
from mezzotint.report.card import legal_front_matter, update_card
from mezzotint.report.results import read_results
from runs import TINY_LLAMA, quantized

LEGAL = "license: mit\nlanguage:\n- en\n- 'no'\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(TINY_LLAMA, tmp_path / "model"))


def make(kind: str, folder: Path, out: Path, **options: Any) -> Any:
    """Any of the commands that make a folder of a folder."""
    if kind == "convert":
        return mezzotint.convert(folder, "dense", out=out, **options)
    if kind == "rotate":
        return mezzotint.rotate(folder, out=out, **options)
    return quantized(folder, out, "rtn" if kind == "quantize" else "palette", bits=4, **options)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized folder."""
    folder = tmp_path_factory.mktemp("packed") / "q"
    quantized(TINY_LLAMA, folder, "rtn", format="mezzotint", bits=4)
    return folder


# ---- the original's card --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (LEGAL, None),
        (f"{LEGAL}last_modified: 2026-13-45\n", None),
        (f"x: !!int abc\ny: !!timestamp abc\nz: !!bool abc\n{LEGAL}", None),
        (f"{LEGAL}x: !!python/object/apply:os.system [exit]\n", None),
        (f"{LEGAL}x: &a [*a, {{*a : *a}}]\n", None),
        (f"{LEGAL}x: {'[' * 500}{']' * 500}\n", None),
        (f"{LEGAL}? [license, {{language: de}}]\n: {{license: gpl}}\n", None),
        (f"x: {'[' * 3000}\n{LEGAL}", "is not valid YAML"),
        (f"x: [\n{LEGAL}", "is not valid YAML"),
        (f"{LEGAL}x: {'long ' * 300_000}\n", "is too long"),
        ("license: [mit, [gpl]]\nlanguage: {en: de}\nlicense_name: null\nlicense_link: *a\n", ""),
        ("- license\n- mit\n", ""),
        ("", ""),
    ],
)
def test_front_matter(lines: str, told: str | None, tmp_path: Path) -> None:
    """The licence is passed on where it can be told; nothing that stands beside it matters, and nothing is built."""
    (tmp_path / "README.md").write_text(f"---\n{lines}\n---\n# A model\n", encoding="utf-8")
    found, why = legal_front_matter(tmp_path)
    assert found == ({"license": "mit", "language": ["en", "no"]} if told is None else {})
    assert (told or "") in (why or "")
    assert (why is None) == (not told)
    if why is not None:
        assert "The card has no licence" in why


def test_a_card_that_is_no_file_or_not_utf_8(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")  # to open it would take for ever
    assert legal_front_matter(tmp_path) == ({}, None)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").write_bytes(b"---\r\nlicense: mit\r\ntitle: caf\xe9\r\n---\r\n")
    assert legal_front_matter(tmp_path) == ({"license": "mit"}, None)


def test_an_edited_card_keeps_its_bytes(packed: Path, tmp_path: Path) -> None:
    card = Path(shutil.copytree(packed, tmp_path / "out")) / "README.md"
    before = card.read_bytes().replace(b"# ", b"# caf\xe9 ", 1)
    card.write_bytes(before.replace(b"Nothing yet", b"Nothing"))
    update_card(tmp_path / "out")
    assert card.read_bytes() == before


@pytest.mark.parametrize("text", ["[]", "{", '{"texts": {}}', '{"texts": [], "tasks": {}}', "[" * 100_000])
def test_results_that_cannot_be_added_to(text: str, tmp_path: Path) -> None:
    (tmp_path / "mezzotint.evaluation.json").write_text(text)
    with pytest.raises(ModelError, match=r"mezzotint.evaluation.json.*Remove it"):
        read_results(tmp_path)


# ---- odd strings ----------------------------------------------------------------------------------------------------


def test_what_utf_8_cannot_hold_is_escaped(model: Path, tmp_path: Path) -> None:
    """In config.json, in a recipe, and in names of folders; through all that makes a folder."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "note": "a\ud800"}))
    (model / "README.md").write_text(f"---\n{LEGAL}last_modified: 2026-13-45\n---\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text('summary: "\\ud800"\ngrid: {kind: uniform, bits: 4}\nrounding: {kind: nearest}\n')
    for place, make in {
        "rotated": lambda out: mezzotint.rotate(model, out=out),
        os.fsdecode(b"q\xe9"): lambda out: quantized(model, out, str(recipe), format="mezzotint"),
        "dense": lambda out: mezzotint.convert(tmp_path / os.fsdecode(b"q\xe9"), "dense", out=out),
    }.items():
        out = tmp_path / place
        assert "warnings" not in make(out)
        assert json.loads((out / "config.json").read_text(encoding="utf-8"))["note"] == "a\ud800"
        if place != "rotated":
            report = json.loads((out / "mezzotint.json").read_text(encoding="utf-8"))
            assert (report["model"], report["recipe"]["summary"]) == (model.name, "\ud800")
            front = yaml.safe_load((out / "README.md").read_text(encoding="utf-8").split("---\n")[1])
            assert (front["license"], front["language"]) == ("mit", ["en", "no"])


def test_a_config_that_is_nested_too_deeply_is_found_before_the_work() -> None:
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"a": deep}
    with pytest.raises(ModelError, match=r"config.json is nested too deeply"):
        Ending(TINY_LLAMA, trusted=False).rehearse(deep, None)


def test_gguf_metadata_that_cannot_be_written_is_found_before_the_work(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ '\ud800' }}"}))
    with pytest.raises(FormatError, match=r"in 'tokenizer.chat_template' holds a lone surrogate"):
        quantized(model, tmp_path / "out", "rtn", engine="llama.cpp", settings={"grid.kind": "gguf"})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- files that go along --------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("kind", "name", "change", "told"),
    [
        ("quantize", "tokenizer_config.json", pipe, "it is not a regular file"),
        ("palette", "LICENSE", nowhere, "it is a link to nothing"),
        ("convert", "tokenizer_config.json", pipe, "it is not a regular file"),
        ("rotate", "LICENSE", nowhere, "it is a link to nothing"),
    ],
)
def test_unreadable_files_are_refused_before_the_work(
    kind: str, name: str, change: Callable[[Path], None], told: str, packed: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packed if kind == "convert" else TINY_LLAMA, tmp_path / "model"))
    change(folder / name)
    with pytest.raises(ModelError, match=rf"{name} goes with .* cannot be read: {told}"):
        make(kind, folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_that_vanishes_is_left_out_with_a_warning(model: Path, tmp_path: Path) -> None:
    def listener(_: object) -> None:
        (model / "generation_config.json").unlink(missing_ok=True)

    report = quantized(model, tmp_path / "out", "rtn", listener=listener)
    (warning,) = report["warnings"]
    assert warning.startswith("generation_config.json was left out, because")
    assert json.loads((tmp_path / "out" / "mezzotint.json").read_text())["warnings"] == [warning]
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_a_tokenizer_that_vanishes_keeps_the_work(model: Path, tmp_path: Path) -> None:
    """A GGUF file cannot be made without it: the tensors stay, and the same command goes on from them."""

    def listener(_: object) -> None:
        if (model / "tokenizer.json").exists():
            (model / "tokenizer.json").rename(model / "away")

    options: dict[str, Any] = {"engine": "llama.cpp", "settings": {"grid.kind": "gguf"}, "keep": ["*.[12].*"]}
    with pytest.raises(MezzotintError, match=r"has no tokenizer.json") as caught:
        quantized(model, tmp_path / "out", "rtn", listener=listener, **options)
    assert "--resume continues it" in caught.value.__notes__[-1]
    (model / "away").rename(model / "tokenizer.json")
    steps: list[object] = []
    quantized(model, tmp_path / "out", "rtn", listener=steps.append, resume=True, **options)
    assert steps == []
    assert (tmp_path / "out" / "model.gguf").is_file()


# ---- converting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", ["{", "[]", '{"plan": null}', '{"plan": {}, "command": "x"}'])
def test_a_report_that_is_none_is_refused_before_converting(report: str, packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "q"))
    (folder / "mezzotint.json").write_text(report)
    with pytest.raises(ModelError, match=r"mezzotint.json.*(is not valid JSON|is not a report)"):
        mezzotint.convert(folder, "dense", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("kind", ["convert", "rotate"])
def test_a_result_is_kept_where_its_place_is_taken(kind: str, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def step(*_: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine").touch()

    def made(**options: Any) -> dict[str, Any]:
        if kind == "convert":
            return mezzotint.convert(packed, "dense", out=out, **options)
        return rotate(TINY_LLAMA, out, Rotations(), **options)

    with pytest.raises(WriteError, match=r"was created by another program.*lies in .*out.partial: rename it"):
        made(step=step)
    assert (tmp_path / "out.partial" / "config.json").is_file()
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    out.rmdir()
    done: list[object] = []
    result = made(resume=True, step=lambda *arguments: done.append(arguments))
    assert result["output_bytes"] > 0
    assert len(done) == 0 or kind == "rotate"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list(out.glob("*unfinished*"))


# ---- the place ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["quantize", "palette", "convert", "rotate"])
def test_the_files_of_others_are_left_alone(
    kind: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our marker, beside it, and whatever --resume says: nothing is written or removed."""
    (tmp_path / "out.partial" / "work").mkdir(parents=True)
    (tmp_path / "out.partial" / "work" / "state.json").write_text("{}")
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "out.partial" / "work")

    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")}

    folder = packed if kind == "convert" else TINY_LLAMA
    before = state()
    for resume in (False, True):
        for out, told in (("out", "thesis.txt, work/"), ("link", "is a link"), ("n" * 250, "is too long")):
            with pytest.raises(OutputError, match=told):
                make(kind, folder, tmp_path / out, resume=resume)
        with pytest.raises(OutputError, match=r"exists and is not empty"):
            make(kind, folder, Path(), resume=resume)
    assert state() == before


def test_a_folder_inside_the_model_leaves_the_model_as_it_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    monkeypatch.chdir(model)
    mezzotint.quantize(Path(), "rtn", out=Path("out"), device="cpu")
    assert (model / "out" / "config.json").is_file()
    assert {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()} == before
    with pytest.raises(OutputError, match=r"exists and is not empty"):
        mezzotint.quantize(Path(), "rtn", out=Path(), device="cpu")
