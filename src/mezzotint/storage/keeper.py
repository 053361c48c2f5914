"""When the state of a run is saved."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mezzotint.storage.saved import Index, Saved, save
from mezzotint.storage.work import Work

OVERHEAD = 0.05  # of the time of a run that saving its state may take


class Keeper:
    """Decides when a sweep's state is saved: after every block and group, unless that would take too much of the time.

    The first rank decides, and all of them save the hidden states that they have.

    Args:
        work: the folder.
        journal: records the finished tensors durably and gives the journal's length; None while some wait to be
            written together with others.
        streams: writes the hidden states to a file of that path.
        adapter: low-rank compensations so far, where there are any.
        spent: seconds, processor and memory so far, of all ranks.
    """

    def __init__(
        self,
        work: Work,
        *,
        journal: Callable[[], int | None],
        streams: Callable[[Path], Index] | None,
        adapter: Callable[[], Iterable[tuple[str, Tensor]]] | None,
        spent: Callable[[], Mapping[str, float]],
    ) -> None:
        self.block = work.block
        self._work = work
        self._ranks = work.ranks
        self._journal = journal
        self._streams = streams
        self._adapter = adapter
        self._spent = spent
        self._values = {work.block: [Saved(work.folder, [index]) for index in work.groups]}
        self._indices = [*work.groups]
        self._finished = time.perf_counter()
        self._took: dict[str, float] = {}

    def values(self, block: int) -> list[Saved]:
        """Weights of the groups of a block that an earlier process finished, in order."""
        return self._values.get(block, [])

    def border(self, block: int, *, streams: bool, last: bool = False) -> None:
        """All blocks before this one are finished.

        Args:
            block: the next one.
            streams: the hidden states are still needed.
            last: everything is finished.
        """
        if not self._ranks.told(last or self._due("border")):
            return
        started = time.perf_counter()
        journal = self._ranks.told(self._journal())
        if journal is None:
            return
        indices = []
        if streams and self._streams:
            name = f"streams-{block:05}" + ("" if self._ranks.first else f"-{self._ranks.number}")
            indices = self._ranks.each(self._streams(self._work.folder / f"{name}.bin"))
        self._indices = []
        self._work.commit(block, journal_bytes=journal, streams=indices, values=[], **self._others(block))
        self._done("border", started)

    def group(self, block: int, count: int, weights: Callable[[int], Iterable[tuple[str, Tensor]]]) -> None:
        """The first groups of a block are finished; their weights make the inputs of the next ones.

        Args:
            block: the current one.
            count: of finished groups.
            weights: of a group, dense, by name.
        """
        # without the hidden states before the block nothing could be continued inside it
        if not self._ranks.told(self._work.block == block and self._due("group")):
            return
        started = time.perf_counter()
        journal = self._ranks.told(self._journal())
        if journal is None:
            return
        for group in range(len(self._indices), count):
            path = self._work.folder / f"values-{block:05}-{group}.bin"
            self._indices.append(self._ranks.told(save(path, weights(group)) if self._ranks.first else None))
        self._work.commit(block, journal_bytes=journal, values=[*self._indices], **self._others(block))
        self._done("group", started)

    def _others(self, block: int) -> dict[str, Any]:
        """What every state has."""
        path = self._work.folder / f"adapter-{block:05}-{len(self._indices)}.bin"
        adapter = [save(path, self._adapter())] if self._adapter is not None and self._ranks.first else []
        return {"adapter": adapter, "spent": dict(self._spent())}

    def _due(self, kind: str) -> bool:
        return time.perf_counter() - self._finished >= self._took.get(kind, 0.0) / OVERHEAD

    def _done(self, kind: str, started: float) -> None:
        self._finished = time.perf_counter()
        self._took[kind] = self._finished - started
