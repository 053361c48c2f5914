"""The output folder: written beside its place, complete with what the model needs, and moved there by one rename."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from mezzotint.errors import OutputError

# What a tokenizer, a generation or a processor reads. A list of what may come, not of what may not: an unknown file can
# be a pickle under any name. config.json and README.md are the caller's to write.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)


def copy_companions(source: Path, target: Path, *, trusted: bool = False) -> tuple[str, ...]:
    """Copy everything a model folder needs beside config.json and the weights.

    Args:
        source: the original model's folder; links in it are followed, as in the hub's cache.
        target: exists.
        trusted: also copy ``*.py``; the code of a model runs only where the user said that it may.

    Returns:
        Names of the copied files relative to the folder, sorted.
    """
    copied = []
    for path in companions(source, trusted=trusted):
        name = path.relative_to(source).as_posix()
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
        copied.append(name)
    return tuple(copied)


def companions(source: Path, *, trusted: bool = False) -> tuple[Path, ...]:
    """The files that `copy_companions` copies, sorted."""
    patterns = (*_COMPANIONS, "*.py") if trusted else _COMPANIONS
    found = []
    for path in sorted((*source.glob("*"), *source.glob("additional_chat_templates/*"))):
        name = path.relative_to(source).as_posix()
        # `*` of fnmatch also crosses a slash; the depth must agree.
        wanted = any(fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns)
        if wanted and path.is_file():
            found.append(path)
    return tuple(found)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file atomically: a reader sees the old file or the whole new one."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def check_space(path: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Args:
        path: a folder that exists or will; the space is that of its nearest existing ancestor.
        needed: bytes still to be written.

    Raises:
        OutputError: fewer bytes are available.
    """
    if _available(path) < needed:
        raise no_space(path, needed)


def no_space(path: Path, needed: int) -> OutputError:
    """The error for a full disk, quota or file size limit.

    Args:
        path: the folder that is written.
        needed: bytes of what did not fit.
    """
    available = _available(path)
    return OutputError(
        f"no space to write {path}: {needed:,} bytes are needed, {available:,} are available to this user on that disk "
        "(a quota or a file size limit may allow fewer). Free some space or choose another --out."
    )


def _available(path: Path) -> int:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class OutputFolder:
    """A folder that appears complete or not at all: work goes on in ``DIR.partial`` beside it.

    Attributes:
        path: where the result will be.
        partial: where it is made; nothing else is written.
        resumed: work of an earlier run was found there.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        """Check the place and make ``DIR.partial``.

        Args:
            path: must not exist, or be an empty folder.
            resume: continue what lies in ``DIR.partial``; with nothing there, start.

        Raises:
            OutputError: the place is taken, unfinished work lies there and is not resumed, or it cannot be written.
        """
        self.path = path.absolute()
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._check_place()
        self.resumed = self.partial.exists() and (not self.partial.is_dir() or any(self.partial.iterdir()))
        if self.resumed and (not resume or not self.partial.is_dir()):
            raise OutputError(
                f"{self.partial} holds the unfinished work of an earlier run. Continue it with --resume, remove it, or "
                "choose another --out."
            )
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.partial} cannot be made: {error.strerror}. Choose a folder that you can write."
            ) from error

    def finish(self, inner: str = "") -> None:
        """Sync everything and move ``DIR.partial`` to its place by one rename.

        Args:
            inner: folder in it that is the result; the rest of ``DIR.partial`` is removed.

        Raises:
            OutputError: the place was taken meanwhile; the work stays in ``DIR.partial``.
        """
        result = self.partial / inner
        for root, _, names in os.walk(result):
            for name in names:
                with (Path(root) / name).open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(root))
        try:
            result.rename(self.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise OutputError(
                f"{self.path} was made by somebody else while this run worked. The finished result lies in "
                f"{result}: rename it."
            ) from error
        sync_folder(self.path.parent)
        if inner:
            shutil.rmtree(self.partial)

    def _check_place(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; the output is a folder. Choose another --out.")
        if self.path.exists() and any(self.path.iterdir()):
            count = sum(1 for _ in self.path.iterdir())
            raise OutputError(
                f"{self.path} exists and is not empty ({count} entries); nothing is overwritten. "
                "Remove it or choose another --out."
            )
