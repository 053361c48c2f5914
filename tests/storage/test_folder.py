"""The output folder: complete or not there."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mezzotint.errors import ConfigError, ModelError, OutputError, WriteError
from mezzotint.formats.companions import companions, copy_companions
from mezzotint.storage.files import check_space, write_json
from mezzotint.storage.folder import MARKER, OutputFolder

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
    assert sorted(companions(source, trusted=trusted)) == expected
    assert copy_companions(source, target, companions(source, trusted=trusted)) == ()
    found = {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*") if p.is_file()}
    assert found == {name: name for name in expected}


def test_companions_follow_links_and_skip_folders(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "LICENSES").mkdir(parents=True)
    target.mkdir()
    (tmp_path / "blob").write_text("{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    assert companions(source) == ("tokenizer.json",)
    copy_companions(source, target, companions(source))
    assert not (target / "tokenizer.json").is_symlink()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.symlink_to("nowhere"), "a link to nothing"),
        (os.mkfifo, "not a regular file"),  # to open it would take for ever
        pytest.param(
            lambda path: path.touch(mode=0),
            "Permission denied",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything"),
        ),
    ],
)
def test_companions_that_cannot_be_read(make: Callable[[Path], None], why: str, tmp_path: Path):
    """They are refused before the work; at its end they are left out with a warning."""
    make(tmp_path / "vocab.json")
    with pytest.raises(ModelError, match=rf"vocab.json goes with the model and cannot be read: .*{why}"):
        companions(tmp_path)
    (warning,) = copy_companions(tmp_path, tmp_path / "target", ["vocab.json"])
    assert why in warning
    assert not (tmp_path / "target").exists()


def test_json_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "config.json"
    value = {"name": "é", "limit": [0.0, float("inf")], "no character": "a\ud800b\udfff"}
    write_json(path, value)
    assert "é" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == value
    with pytest.raises(TypeError):
        write_json(path, {"name": object()})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        write_json(path, {"name": "new"})
    assert json.loads(path.read_text(encoding="utf-8")) == value
    assert list(tmp_path.iterdir()) == [path]


# ---- the output folder ----------------------------------------------------------------------------------------------

MAKES = ("model*.safetensors", "work/state.json", "work/part-*.bin")


def begun(path: Path, *, resume: bool = False, command: str = "test", **identity: object) -> OutputFolder:
    folder = OutputFolder(path, resume=resume)
    folder.begin(command, MAKES, identity)
    return folder


def fill(folder: OutputFolder) -> None:
    """As a run does."""
    (folder.partial / "work").mkdir(exist_ok=True)
    for name in ("model.safetensors", "work/state.json", "work/part-1.bin", "work/part-2.bin.tmp"):
        (folder.partial / name).write_text("x")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_folder_appears_complete(tmp_path: Path):
    folder = begun(tmp_path / "deep" / "out")
    assert not folder.resumed
    assert names(folder.partial) == {MARKER}
    fill(folder)
    folder.announce(["config.json"])
    (folder.partial / "config.json").write_text("{}")
    assert not folder.path.exists()
    folder.finish({"seconds": 1})
    assert names(tmp_path) == {"deep", "deep/out", "deep/out/model.safetensors", "deep/out/config.json"}


def test_an_inner_folder_may_be_the_result(tmp_path: Path):
    folder = OutputFolder(tmp_path / "out")
    folder.begin("test", ["a/file", "b/file", f"a/{MARKER}"])
    for inner in ("a", "b"):
        (folder.partial / inner).mkdir()
        (folder.partial / inner / "file").write_text(inner)
    folder.finish({}, inner="a")
    assert names(tmp_path) == {"out", "out/file"}
    assert (tmp_path / "out" / "file").read_text() == "a"


def test_relative_paths_and_empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = begun(Path("out"))
    monkeypatch.chdir("/")
    fill(folder)
    folder.finish({})
    assert names(tmp_path) == {"out", "out/model.safetensors"}


def link(path: Path) -> None:
    (path.parent / "real").mkdir()
    path.symlink_to(path.parent / "real")


@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        ("out", lambda path: path.write_text("x"), "is a file, but the output is a folder"),
        (
            "out/model",
            lambda path: (path.parent.mkdir(), path.write_text("x")),
            r"exists and is not empty \(1 entries\)",
        ),
        ("out", link, "out is a link to .*real; the output folder is renamed to this name"),
        ("out", lambda path: path.symlink_to("nowhere"), "is a link to nowhere"),
        ("out", lambda path: (path.mkdir(), os.chdir(path)), "is the folder that this command runs in.*out/quantized"),
        ("out.partial", lambda path: path.write_text("x"), "out.partial is a file; a run keeps its unfinished work"),
        ("out.partial", link, "out.partial is a link"),
        ("out.partial", os.mkfifo, "out.partial is a file"),
        (
            "out.partial/photos",
            lambda path: (path.mkdir(parents=True), (path / "one.jpg").write_text("x")),
            r"holds what mezzotint did not make: photos/\. Move it away",
        ),
        (
            "out.partial/work",
            lambda path: (path.mkdir(parents=True), (path / "state.json").write_text("{}")),
            "did not make: work/",
        ),
        (f"out.partial/{MARKER}", lambda path: path.mkdir(parents=True), f"did not make: {MARKER}/"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_places_that_are_refused(
    name: str, make: Callable[[Path], object], told: str, resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Everything stays as it is, however the run is started."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    before = names(tmp_path)
    with pytest.raises(OutputError, match=told):
        begun(tmp_path / "out", resume=resume)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("out", "told"),
    [
        (".", "is the folder that this command runs in"),
        ("", "is the folder that this command runs in"),
        ("sub/..", "exists and is not empty|is the folder that this command runs in"),
        ("n" * 250, r"too long: 258 bytes, and 255 are allowed there.*Choose a shorter --out"),
        ("new/" + "é" * 126, r"too long: 260 bytes"),
        ("/".join(["n" * 200] * 21), r"is too long: paths in it take up to \d+ bytes, and 4096 are allowed"),
        ("zero\0", "a file name cannot contain a zero byte"),
        ("/", "exists and is not empty"),
        ("/proc/out", "cannot be made"),
        ("file/out", r"cannot be made in .*file: Not a directory"),
    ],
)
def test_names_that_are_refused(out: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("x")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(OutputError, match=told):
        begun(Path("../file/out") if out == "file/out" else Path(out))
    assert names(tmp_path) == {"file", "here"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=r"cannot be made in .*: Permission denied"):
        OutputFolder(tmp_path / "out")


def test_unfinished_work(tmp_path: Path):
    first = begun(tmp_path / "out", resume=True, seed=0)  # nothing to resume: starts
    fill(first)
    before = names(first.partial)
    with pytest.raises(OutputError, match=r"out.partial holds the unfinished work of an earlier run"):
        OutputFolder(tmp_path / "out")
    for told, other in (
        (r"seed \(was 0, is 1\)", {"seed": 1}),
        (r"command \(was \"test\"", {"seed": 0, "command": "x"}),
    ):
        with pytest.raises(ConfigError, match=f"holds the work of another request: {told}"):
            begun(tmp_path / "out", resume=True, **other)  # pyright: ignore[reportArgumentType]
    again = begun(tmp_path / "out", resume=True, seed=0)
    assert again.resumed
    assert names(again.partial) == before
    again.clear()
    assert names(again.partial) == {MARKER}
    again.discard()
    assert names(tmp_path) == set()


def test_what_others_put_there_is_neither_removed_nor_moved(tmp_path: Path):
    folder = begun(tmp_path / "out")
    fill(folder)
    for name in ("thesis.txt", "work/notes.txt"):
        (folder.partial / name).write_text("mine")
    (folder.partial / "model-2.safetensors").symlink_to(tmp_path)  # a name of ours, but nothing that we make
    told = "model-2.safetensors, thesis.txt, work/notes.txt. Move it away"
    with pytest.raises(OutputError, match=f"holds what mezzotint did not make: {told}"):
        OutputFolder(tmp_path / "out", resume=True)
    for late in (lambda: folder.finish({}), lambda: folder.announce(["thesis.txt"])):
        with pytest.raises(WriteError, match=f"holds files that this run did not write: {told}"):
            late()
    assert not folder.path.exists()
    folder.discard()
    assert names(folder.partial) == {"model-2.safetensors", "thesis.txt", "work", "work/notes.txt"}


class _KilledError(BaseException):
    """As if the process ended."""


@pytest.mark.parametrize("inner", ["", "a"])
def test_killed_while_it_finishes(inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Wherever that is, nothing is lost: the next one only finishes."""
    done, count = False, 0
    while not done:
        out = tmp_path / f"{count}"
        folder = OutputFolder(out)
        folder.begin("test", ["a/file", f"a/{MARKER}", "work/state.json"])
        for name in ("a", "work"):
            (folder.partial / name).mkdir()
            (folder.partial / name / ("file" if name == "a" else "state.json")).write_text(name)
        with monkeypatch.context() as patched:
            left = count

            def step(kind: str) -> Callable[..., object]:
                real = getattr(os, kind)

                def call(*arguments: object, **options: object) -> object:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise _KilledError
                    return real(*arguments, **options)

                return call

            for kind in ("unlink", "rmdir", "rename", "replace", "fsync"):
                patched.setattr(os, kind, step(kind))
            try:
                folder.finish({"n": 1}, inner=inner)
                done = True
            except _KilledError:
                pass
        if not done and (not out.exists() or (out / MARKER).exists()):  # else only the last word was missing
            again = OutputFolder(out, resume=True)
            again.begin("test", [])
            assert again.complete in (None, {"n": 1})
            again.finish({"n": 1}, inner=inner)
        assert names(tmp_path) == {
            f"{n}{p}" for n in range(count + 1) for p in ("", "/file" if inner else "/a/file")
        } | (set() if inner else {f"{n}/a" for n in range(count + 1)})
        count += 1
    assert count > 8


def test_place_taken_meanwhile_keeps_the_work(tmp_path: Path):
    folder = begun(tmp_path / "out")
    fill(folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("y")
    with pytest.raises(WriteError, match=r"was created by another program.*lies in .*out.partial: rename it"):
        folder.finish({})
    assert (folder.partial / "model.safetensors").read_text() == "x"


def test_space(tmp_path: Path):
    check_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(OutputError, match=r"1,000,000,000,000,000,000 bytes are needed, [\d,]+ are available"):
        OutputFolder(tmp_path / "not" / "yet").begin("test", [], needed=10**18)
    assert names(tmp_path) == set()
