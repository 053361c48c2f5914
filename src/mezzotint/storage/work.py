"""The work folder: the saved state of a run, from which another process can resume, and the log."""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from mezzotint.core.records import BlockRecord, MatrixRecord
from mezzotint.errors import ConfigError, WriteError
from mezzotint.process.ranks import ALONE, Ranks
from mezzotint.storage.files import write_json
from mezzotint.storage.folder import OutputFolder, another_request
from mezzotint.storage.made import remove_made
from mezzotint.storage.saved import Index, Saved, damaged, save

WORK = "work"
LOG = "log.jsonl"
STATE = "state.json"
_BY_BLOCK = ("streams-[0-9]*.bin", "values-[0-9]*.bin", "adapter-[0-9]*.bin")
_TENSORS = ("windows.bin", "windows-again.bin", "curvature.bin", *_BY_BLOCK)
_SPILLED = ("spill-*", ".nfs*")  # of a process that was killed before it took the name away; of a server of files
MAKES = tuple(f"{WORK}/{name}" for name in (LOG, STATE, *_TENSORS, *_SPILLED))
_KINDS = {"linear": MatrixRecord, "block": BlockRecord}


class Work:
    """The folder ``work`` of an unfinished output: a log with one line a record, and a state that names the rest.

    The state is replaced by one rename and holds checksums of everything it names, so that it is as of some moment,
    whatever happens afterwards: what is behind that moment in the log and in the journal of the tensors is cut off.

    The first rank writes; the others know what it knows.

    Args:
        folder: of the unfinished output.
        place: the same on the first rank, begun; continued if there is a state in it, else emptied.
        ranks: that share the run.

    Attributes:
        block: the first that is not finished; one past the last where only the head is missing, two where nothing is.
        records: of what is finished.
        spent: seconds, seconds of processor and peak memory of the earlier processes.
        resumed: there was a state.

    Raises:
        OutputError: the state is damaged.
    """

    def __init__(self, folder: Path, place: OutputFolder | None, *, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.folder = folder / WORK
        self.block = 0
        self.records: list[MatrixRecord | BlockRecord] = []
        self.spent = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_rss_bytes": 0}
        self._state: dict[str, Any] = {"windows": None, "curvature": None, "streams": [], "values": [], "adapter": []}
        self._log_checksum = 0
        self._place = place
        self.resumed = place is not None and place.resumed and (self.folder / STATE).is_file()
        if self.resumed:
            self._load()

    def tell(self) -> None:
        """Let all ranks know where the run stands; from here on there is something in the folder.

        Raises:
            ConfigError: a rank does not see the folder.
        """
        if self.resumed:
            remove_made(self.folder, _SPILLED)
        elif self._place is not None:  # an earlier run was killed before there was anything to continue
            self._place.clear()
            self.folder.mkdir()
            (self.folder / LOG).touch()
        self.resumed, self._state, self.block, self.spent = self.ranks.told(
            [self.resumed, self._state, self.block, self.spent]
        )
        blind = [number for number, seen in enumerate(self.ranks.each(self.folder.is_dir())) if not seen]
        if blind:
            raise ConfigError(
                f"rank {blind[0]} does not see {self.folder.parent}, where the state of the run is kept. Choose an "
                "--out on a file system that all hosts share."
            )

    @property
    def journal_bytes(self) -> int | None:
        """Of the journal of finished tensors, at the moment of the state."""
        return self._state.get("journal_bytes")

    @property
    def closed(self) -> bool:
        """All tensors are written, and their files closed."""
        return self._state.get("closed", False)

    @property
    def windows(self) -> Saved | None:
        """Calibration text of the earlier process."""
        return Saved(self.folder, [self._state["windows"]]) if self._state["windows"] else None

    @property
    def curvature(self) -> Saved | None:
        """Of the outputs of matrices, where it was measured."""
        return Saved(self.folder, [self._state["curvature"]]) if self._state["curvature"] else None

    def keep_curvature(self, measure: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Keep what the first rank measures, for all; an earlier process may have done it."""
        if self._state["curvature"] is None:
            path = self.folder / "curvature.bin"
            self._state["curvature"] = self.ranks.told(save(path, measure()) if self.ranks.first else None)
            self.commit(self.block)

    @property
    def streams(self) -> Saved | None:
        """Hidden states before `block`; None where they are not needed, or are the embedded tokens."""
        return Saved(self.folder, self._state["streams"]) if self._state["streams"] else None

    @property
    def adapter(self) -> Saved | None:
        """Low-rank compensations so far."""
        return Saved(self.folder, self._state["adapter"]) if self._state["adapter"] else None

    @property
    def groups(self) -> tuple[Index, ...]:
        """Files with the weights of the first groups of `block`, which are finished."""
        return tuple(self._state["values"])

    def keep_windows(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Keep the calibration text, or check that it is the text of the run that is continued.

        Raises:
            ConfigError: it is another text.
        """
        if self._state["windows"] is None:
            self._state["windows"] = save(self.folder / "windows.bin", tensors.items())
            return
        index = save(self.folder / "windows-again.bin", tensors.items())
        (self.folder / "windows-again.bin").unlink()
        if index["tensors"] != self._state["windows"]["tensors"]:
            raise another_request([f"the calibration text from {source!r}"], self.folder.parent)

    def begin(self) -> None:
        """Forget what was logged behind the state: from here on there is something to add."""
        if self.resumed and self.ranks.first:
            os.truncate(self.folder / LOG, self._state["log"][0])
            self.log("resumed", block=self.block, groups=len(self.groups))

    def log(self, event: str, **values: Any) -> None:
        """Append a line for people and programs that watch."""
        if not self.ranks.first:
            return
        line = (json.dumps({"event": event, **values}) + "\n").encode()
        with (self.folder / LOG).open("ab") as file:
            file.write(line)
        self._log_checksum = zlib.crc32(line, self._log_checksum)

    def record(self, record: MatrixRecord | BlockRecord, **values: Any) -> None:
        """Keep what came out of a matrix or a block."""
        self.records.append(record)
        event = "linear" if isinstance(record, MatrixRecord) else "block"
        self.log(event, **asdict(record), **values)

    def commit(self, block: int, **changes: Any) -> None:
        """Make everything so far durable: from now on a run is continued here.

        Args:
            block: the first that is not finished.
            **changes: of the state: ``journal_bytes``, ``streams``, ``values``, ``spent``, ``closed``.

        Raises:
            WriteError: the disk is full; the state before stays.
        """
        if not self.ranks.first:
            self.block = block
            return
        try:
            with (self.folder / LOG).open("ab") as file:
                os.fsync(file.fileno())
                size = file.tell()
            state = {**self._state, **changes, "block": block, "log": [size, self._log_checksum]}
            text = json.dumps(state, sort_keys=True)
            write_json(self.folder / STATE, {"checksum": zlib.crc32(text.encode()), "state": state})
        except OSError as error:
            raise WriteError(f"cannot save the state of the run: {error}. Free some space.") from error
        self._state, self.block = state, block
        named = {index["file"] for index in self._files()}
        remove_made(self.folder, _TENSORS, but=named)

    def _files(self) -> Iterable[Index]:
        return [
            *(self._state[kind] for kind in ("windows", "curvature") if self._state[kind]),
            *(i for kind in ("streams", "values", "adapter") for i in self._state[kind]),
        ]

    def _load(self) -> None:
        path = self.folder / STATE
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            self._state = whole["state"]
            good = zlib.crc32(json.dumps(self._state, sort_keys=True).encode()) == whole["checksum"]
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(path, f"is damaged ({error})") from error
        if not good:
            raise damaged(path, "is damaged")
        size, self._log_checksum = self._state["log"]
        data = (self.folder / LOG).read_bytes()[:size] if (self.folder / LOG).is_file() else b""
        if len(data) < size or zlib.crc32(data) != self._log_checksum:
            raise damaged(self.folder / LOG, "is truncated or damaged")
        self.records = [record for record in map(_record_of, data.splitlines()) if record is not None]
        self.block, self.spent = self._state["block"], self._state["spent"]
        Saved(self.folder, [*self._files()]).verify()  # damage shows now, not hours later


def _record_of(line: bytes) -> MatrixRecord | BlockRecord | None:
    values = json.loads(line)
    kind = _KINDS.get(values["event"])
    return None if kind is None else kind(**{f.name: values[f.name] for f in fields(kind)})
