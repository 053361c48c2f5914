"""The output folder: written beside its place, complete with what the model needs, and moved there by one rename."""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mezzotint.errors import ConfigError, OutputError, WriteError
from mezzotint.storage.files import check_space, sync_folder, write_json
from mezzotint.storage.made import remove_made, strange_names

# The first file in an unfinished folder, and the last: what it is made by, and the names of all that is ours there.
MARKER = "mezzotint.unfinished.json"
WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "mezzotint.checksums.json",
    "shards.written",
)
_SUFFIX = ".partial"
_LONGEST_INSIDE = 120  # bytes of the longest path inside an unfinished folder, with some to spare


def partial_of(path: Path) -> Path:
    """Where the output of that name is made."""
    place = _absolute(path)
    return place.parent / (place.name + _SUFFIX)


class OutputFolder:
    """A folder that appears complete or not at all: work goes on in ``DIR.partial`` beside it.

    `MARKER` is written there before anything else. It lists the names of what is made there. Nothing else is ever
    deleted, overwritten or moved into the output: where something else lies there, the run is refused.

    Making one only looks; `begin` is the first to write.

    Attributes:
        path: where the result will be.
        partial: where it is made; nothing else is written.
        resumed: work of an earlier run was found there.
        complete: what `finish` was given by an earlier run, which was stopped in it; only `finish` is left to do.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        """Check the place.

        Args:
            path: must not exist, or be an empty folder.
            resume: continue what lies in ``DIR.partial``; with nothing there, start.

        Raises:
            OutputError: the place is taken, unfinished work lies there and is not resumed, something else lies there,
                or it cannot be written.
        """
        self.path, self.partial = _absolute(path), partial_of(path)
        self.resumed = False
        self.complete: Mapping[str, Any] | None = None
        self._marker: dict[str, Any] | None = None
        self._placed = False
        try:
            self._check_names()
            self._check_place(resume=resume)
            self._check_parent()
            if not self._placed:
                self._check_partial(resume=resume)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{self.path} cannot be read: {error.strerror}. Choose another --out.") from error

    @property
    def result(self) -> Path:
        """Where the result lies now."""
        return self.path if self._placed else self.partial

    def begin(
        self, command: str, makes: Iterable[str], identity: Mapping[str, Any] | None = None, *, needed: int = 0
    ) -> None:
        """Say in ``DIR.partial`` what is made there, or check that it is the same as before.

        Args:
            command: that makes it.
            makes: names of files, relative to the folder, with ``*`` in them; of no folders.
            identity: a JSON object of what determines the result.
            needed: bytes that will be written, where nothing is there yet.

        Raises:
            ConfigError: the unfinished work is that of another command or request.
            OutputError: there is no space, or the folder cannot be made.
            WriteError: it cannot be written.
        """
        wanted: dict[str, Any] = json.loads(json.dumps(identity or {}))
        if self._marker is not None:
            before = self._marker["identity"] | {"command": self._marker["command"]}
            changes = differences(before, wanted | {"command": command})
            if changes:
                raise another_request(changes, self.path if self._placed else self.partial)
            self.resumed, self.complete = True, self._marker["complete"]
            if self.complete is None:
                self.announce(makes)
            return
        check_space(self.path, needed)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.partial} cannot be made: {error.strerror}. Choose a folder that you can write."
            ) from error
        self._marker = {
            "what": "Unfinished work of mezzotint. It deletes no file in this folder but those of these names.",
            "mezzotint": version("mezzotint"),
            "command": command,
            "makes": [],
            "complete": None,
            "identity": wanted,
        }
        try:
            self.announce(makes)
        except WriteError:
            self.discard()
            raise

    def announce(self, makes: Iterable[str]) -> None:
        """Say what else will be made, before it is.

        Raises:
            WriteError: something that is not ours lies in the folder; the work stays.
        """
        assert self._marker is not None, "begin comes first"
        self._check_ours()
        self._mark(makes=[*dict.fromkeys([*self._marker["makes"], *makes])])

    def clear(self) -> None:
        """Remove what an earlier run made, to start anew."""
        assert self._marker is not None, "begin comes first"
        remove_made(self.partial, self._marker["makes"])

    def discard(self) -> None:
        """Remove everything that was made: nothing in it is worth keeping, and it must not look like a model."""
        assert self._marker is not None, "begin comes first"
        with suppress(OSError):  # on the way out of another error
            self.clear()
            (self.partial / MARKER).unlink(missing_ok=True)
            self.partial.rmdir()

    def finish(self, result: Mapping[str, Any], *, inner: str = "") -> None:
        """Sync everything and move ``DIR.partial`` to its place by one rename.

        A run that is stopped anywhere in here leaves `complete` to the next one.

        Args:
            result: a JSON object for `complete`.
            inner: folder in ``DIR.partial`` that is the result; the rest is removed. Without it, ``work`` is.

        Raises:
            WriteError: the place was taken meanwhile, or the disk is at fault; the result stays in ``DIR.partial``.
        """
        try:
            if not self._placed:
                self._move(result, inner)
            if self.partial.is_dir() and (_marker_in(self.partial) or not any(self.partial.iterdir())):
                self.discard()
            (self.path / MARKER).unlink(missing_ok=True)
            sync_folder(self.path)
        except OSError as error:
            if isinstance(error, WriteError):
                raise
            where = self.path if self._placed else self.partial / inner
            raise WriteError(
                f"{self.path} cannot be finished: {error.strerror or error}. The finished result lies in {where}; the "
                "same command with --resume moves it to its place."
            ) from error

    def _move(self, result: Mapping[str, Any], inner: str) -> None:
        """Everything up to the rename."""
        assert self._marker is not None, "begin comes first"
        self._check_ours()
        folder = self.partial / inner
        for root, _, names in os.walk(folder):
            for name in names:
                with (Path(root) / name).open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(root))
        if inner:
            write_json(folder / MARKER, {**self._marker, "complete": dict(result)})
        else:
            self._mark(complete=dict(result))
            remove_made(self.partial, [name for name in self._marker["makes"] if name.startswith("work/")])
        try:
            folder.rename(self.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise WriteError(
                f"{self.path} was created by another program during this run. The finished result lies in "
                f"{folder}: rename it."
            ) from error
        self._placed = True
        sync_folder(self.path.parent)

    def _mark(self, **changes: Any) -> None:
        """Write the marker with changes."""
        assert self._marker is not None, "begin comes first"
        marker = {**self._marker, **changes}
        try:
            write_json(self.partial / MARKER, marker)
        except OSError as error:
            raise WriteError(f"{self.partial / MARKER} cannot be written: {error.strerror}.") from error
        self._marker = marker

    def _check_ours(self) -> None:
        """Refuse to go on beside what somebody has put there since the run began."""
        assert self._marker is not None, "begin comes first"
        strange = strange_names(self.partial, [MARKER, *self._marker["makes"]])
        if strange:
            raise WriteError(
                f"{self.partial} holds files that this run did not write: {_listed(strange)}. Move it away, "
                "and run the same "
                "command with --resume."
            )

    def _check_names(self) -> None:
        if "\0" in str(self.path):
            raise OutputError(
                f"--out is {str(self.path)!r}; a file name cannot contain a zero byte. Choose another --out."
            )
        there = _existing(self.path)
        longest, whole = os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX")
        for part in self.partial.parts:
            size = len(os.fsencode(part))
            if size > longest:
                raise OutputError(
                    f"the name {part!r} is too long: {size} bytes, and {longest} are allowed there (the result is made "
                    f"under the name of --out with {_SUFFIX!r} behind it). Choose a shorter --out."
                )
        size = len(os.fsencode(self.partial)) + _LONGEST_INSIDE
        if size > whole:
            raise OutputError(
                f"{self.path} is too long: paths in it take up to {size} bytes, and {whole} are allowed. Choose a "
                "shorter --out."
            )

    def _check_place(self, *, resume: bool) -> None:
        """What lies in the place of the result must be what a rename can replace: nothing, or an empty folder."""
        if self.path.is_symlink():
            raise OutputError(
                f"{self.path} is a link to {self.path.readlink()}; the output folder is renamed to this "
                "name at the end. "
                "Give --out the target of the link, or another folder."
            )
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise OutputError(f"{self.path} is a file, but the output is a folder. Choose another --out.")
        count = sum(1 for _ in self.path.iterdir())
        if count and resume:
            self._marker = _marker_in(self.path)
            self._placed = self._marker is not None and self._marker["complete"] is not None
        if count and not self._placed:
            raise OutputError(
                f"{self.path} exists and is not empty ({count} entries); nothing is overwritten. "
                "Remove it or choose another --out."
            )
        if not self._placed and (os.path.ismount(self.path) or self.path.samefile(Path.cwd())):
            how = "a mount point" if os.path.ismount(self.path) else "the folder that this command runs in"
            raise OutputError(
                f"{self.path} is {how}; the output folder is renamed to this name at the end. Choose "
                "another --out, for "
                f"example {self.path / 'quantized'}."
            )

    def _check_parent(self) -> None:
        there = _existing(self.path.parent)
        why = None if there.is_dir() else os.strerror(errno.ENOTDIR)
        if why is None and not os.access(there, os.W_OK | os.X_OK):
            why = os.strerror(errno.EACCES)
        if why is not None:
            raise OutputError(f"{self.partial} cannot be made in {there}: {why}. Choose a folder that you can write.")

    def _check_partial(self, *, resume: bool) -> None:
        """What lies in the place of the work must be ours to continue, or nothing."""
        if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
            how = "a link" if self.partial.is_symlink() else "a file"
            raise OutputError(
                f"{self.partial} is {how}; a run keeps its unfinished work in a folder of that name. Remove it, or "
                "choose another --out."
            )
        if not self.partial.is_dir():
            return
        self._marker = _marker_in(self.partial)
        strange = strange_names(self.partial, [MARKER, *(self._marker["makes"] if self._marker else [])])
        if self._marker is not None and not resume:
            raise OutputError(
                f"{self.partial} holds the unfinished work of an earlier run. Continue it with --resume, remove it, or "
                "choose another --out."
            )
        if strange:
            raise OutputError(
                f"{self.partial} is where a run keeps its unfinished work, and it holds what mezzotint did not make: "
                f"{_listed(strange)}. Move it away, or choose another --out."
            )
        if os.path.ismount(self.partial):
            raise OutputError(f"{self.partial} is a mount point, which cannot be renamed. Choose another --out.")


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """What differs between two values of JSON, by dotted name."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys([*before, *after])
        dot = f"{name}." if name else ""
        return [line for key in keys for line in differences(before.get(key), after.get(key), f"{dot}{key}")]
    return [] if before == after else [f"{name} (was {_short(before)}, is {_short(after)})"]


def another_request(changes: list[str], folder: Path) -> ConfigError:
    """The error for work that lies in a folder and is that of another request."""
    return ConfigError(
        f"{folder} holds the work of another request: {'; '.join(changes[:5])}{'; ...' if len(changes) > 5 else ''} "
        "changed. Give the same request as before, remove the folder, or choose another --out."
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _absolute(path: Path) -> Path:
    """With a name of its own, also where it was ``.`` or ends in ``..``."""
    place = path.absolute()
    return Path(os.path.realpath(place)) if place.name in ("", "..") else place


def _existing(path: Path) -> Path:
    """A path, or the nearest of its ancestors that is there."""
    while True:
        try:
            path.stat()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP) or path == path.parent:
                raise
            path = path.parent
        else:
            return path


def _marker_in(folder: Path) -> dict[str, Any] | None:
    """The marker of an unfinished folder; None where there is none that is whole."""
    path = folder / MARKER
    if path.is_symlink() or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    kinds = {"command": str, "makes": list, "complete": dict | None, "identity": dict}
    whole = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in kinds.items())
    return found if whole and all(isinstance(name, str) for name in found["makes"]) else None
