"""Which files of a folder a run created. Their names are recorded before the first file is written.

A name is the path of a file relative to the folder, with ``*`` in it; a folder is ours where a name leads through it. A
link, a pipe or a socket never is: none is ever made.
"""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from mezzotint.storage.files import TEMPORARY


def strange_names(folder: Path, makes: Iterable[str]) -> list[str]:
    """What lies in a folder and is not ours; of a folder that is not ours, its name only."""
    return [name for name, _, ours in _entries(folder, list(makes)) if not ours]


def remove_made(folder: Path, makes: Iterable[str], *, but: Collection[str] = ()) -> None:
    """Remove what is ours, but for files of some names, and for folders in which something else lies."""
    for name, is_folder, ours in [*_entries(folder, list(makes))]:
        if name in but:
            continue
        if ours and not is_folder:
            (folder / name).unlink(missing_ok=True)
        elif ours:
            with suppress(OSError):  # somebody else's file is in it
                (folder / name).rmdir()


def _entries(folder: Path, makes: list[str], above: str = "") -> Iterator[tuple[str, bool, bool]]:
    """Names, whether they are folders, and whether they are ours: folders behind what is in them."""
    patterns = [name.split("/") for name in makes]
    with os.scandir(folder / above) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        name = f"{above}{entry.name}"
        is_folder = entry.is_dir(follow_symlinks=False)
        ours = _matches(name.split("/"), patterns, is_folder=is_folder)
        if is_folder and ours:
            yield from _entries(folder, makes, f"{name}/")
        yield f"{name}/" if is_folder else name, is_folder, ours and (is_folder or entry.is_file(follow_symlinks=False))


def _matches(parts: list[str], patterns: list[list[str]], *, is_folder: bool) -> bool:
    """Whether a file has one of the names, or a folder is part of one."""
    if not is_folder:
        plain = [*parts[:-1], parts[-1].removesuffix(TEMPORARY)]
        return any(len(p) == len(parts) and (_fits(parts, p) or _fits(plain, p)) for p in patterns)
    return any(len(p) > len(parts) and _fits(parts, p[: len(parts)]) for p in patterns)


def _fits(parts: list[str], pattern: list[str]) -> bool:
    return all(fnmatchcase(part, p) for part, p in zip(parts, pattern, strict=True))
