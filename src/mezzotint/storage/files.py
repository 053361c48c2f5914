"""The one way a small file is written: whole under another name, synced, then renamed; and the space on a disk."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mezzotint.errors import OutputError

TEMPORARY = ".tmp"  # behind the name of a file that is being written


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name to write a file under, in the place of another: a reader sees the old one or the whole new one.

    So it is after a power cut too. Where the block or the disk fails, the old file stays and nothing is left beside it.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in the place of another, see `replaced`."""
    with replaced(path) as temporary, temporary.open("wb") as file:
        yield file


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, see `replacing`."""
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file, see `replacing`."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Mapping[str, object]) -> bytes:
    r"""JSON as it is written to files.

    UTF-8 has no form for a lone surrogate, which a string of another JSON file may hold. It is written as ``\ud800``:
    that is its escape in JSON too, so that a reader gets the same string.

    Example:
        >>> json_bytes({"é": chr(0xD800)})
        b'{\n  "\xc3\xa9": "\\ud800"\n}\n'
    """
    return text_bytes(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def text_bytes(text: str) -> bytes:
    """UTF-8, with escapes for lone surrogates: names of files that are not UTF-8 bring them too."""
    return text.encode("utf-8", errors="backslashreplace")


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
