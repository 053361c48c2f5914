"""The output folder: complete or not there."""

import errno
import json
import os
from pathlib import Path

import pytest

from mezzotint.errors import OutputError
from mezzotint.formats.folder import OutputFolder, check_space, copy_companions, write_json

WANTED = [
    "LICENSE",
    "LICENSE.md",
    "NOTICE.txt",
    "additional_chat_templates/tools.jinja",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
]
UNWANTED = [
    "config.json",
    "README.md",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "training_args.bin",
    "tokenizer.pkl",
    "vocab.pkl",
    "optimizer.pt",
    "consolidated.00.pth",
    "original/tokenizer.model",
    "additional_chat_templates/evil.pkl",
]


def make_source(folder: Path) -> Path:
    for name in [*WANTED, *UNWANTED, "modeling_custom.py"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("trusted", [False, True])
def test_companions(trusted: bool, tmp_path: Path):
    source, target = make_source(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    expected = sorted(WANTED + (["modeling_custom.py"] if trusted else []))
    assert sorted(copy_companions(source, target, trusted=trusted)) == expected
    found = {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*") if p.is_file()}
    assert found == {name: name for name in expected}


def test_companions_follow_links(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (tmp_path / "blob").write_text("{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    (source / "vocab.json").symlink_to(tmp_path / "nowhere")
    assert copy_companions(source, target) == ("tokenizer.json",)
    assert not (target / "tokenizer.json").is_symlink()


def test_json_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "config.json"
    write_json(path, {"name": "é", "limit": [0.0, float("inf")]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "é", "limit": [0.0, float("inf")]}
    with pytest.raises(TypeError):
        write_json(path, {"name": object()})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        write_json(path, {"name": "new"})
    assert json.loads(path.read_text(encoding="utf-8"))["name"] == "é"


def test_folder_appears_complete(tmp_path: Path):
    folder = OutputFolder(tmp_path / "deep" / "out")
    assert not folder.resumed
    (folder.partial / "inner").mkdir()
    (folder.partial / "inner" / "file").write_text("x")
    assert not folder.path.exists()
    folder.finish()
    assert (tmp_path / "deep" / "out" / "inner" / "file").read_text() == "x"
    assert not folder.partial.exists()


def test_empty_folder_may_be_there(tmp_path: Path):
    (tmp_path / "out").mkdir()
    folder = OutputFolder(tmp_path / "out")
    (folder.partial / "file").write_text("x")
    folder.finish()
    assert (tmp_path / "out" / "file").exists()


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = OutputFolder(Path("out"))
    monkeypatch.chdir("/")
    folder.finish()
    assert (tmp_path / "out").is_dir()


def test_taken_places_are_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"is a file; the output is a folder"):
        OutputFolder(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model").write_text("x")
    with pytest.raises(OutputError, match=r"exists and is not empty \(1 entries\); nothing is overwritten"):
        OutputFolder(tmp_path / "full")
    assert not (tmp_path / "full.partial").exists()


def test_unfinished_work(tmp_path: Path):
    first = OutputFolder(tmp_path / "out", resume=True)  # nothing to resume: starts
    assert not first.resumed
    (first.partial / "work").write_text("x")
    with pytest.raises(OutputError, match=r"out.partial holds the unfinished work of an earlier run"):
        OutputFolder(tmp_path / "out")
    again = OutputFolder(tmp_path / "out", resume=True)
    assert again.resumed
    assert (again.partial / "work").read_text() == "x"


def test_partial_that_is_a_file(tmp_path: Path):
    (tmp_path / "out.partial").write_text("x")
    with pytest.raises(OutputError, match=r"out.partial"):
        OutputFolder(tmp_path / "out", resume=True)


def test_place_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be made"):
        OutputFolder(tmp_path / "file" / "out")


def test_place_taken_meanwhile_keeps_the_work(tmp_path: Path):
    folder = OutputFolder(tmp_path / "out")
    (folder.partial / "work").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("y")
    with pytest.raises(OutputError, match="was made by somebody else"):
        folder.finish()
    assert (folder.partial / "work").read_text() == "x"


def test_space(tmp_path: Path):
    check_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(OutputError, match=r"1,000,000,000,000,000,000 bytes are needed, [\d,]+ are available"):
        check_space(tmp_path / "not" / "yet", 10**18)
