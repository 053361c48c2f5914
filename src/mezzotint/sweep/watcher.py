"""What a sweep tells of, and what it asks about the work of an earlier process."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from mezzotint.core.records import BlockRecord
from mezzotint.storage.saved import Saved


class Watcher:
    """Watches a sweep; by itself it keeps nothing, and knows of nothing that was finished before.

    Attributes:
        first: the first block that is not finished; one past the last where only the head is missing.
    """

    first = 0

    def values(self, block: int) -> list[Saved]:
        """Weights of the groups of a block that an earlier process finished, in order."""
        return []

    def rewritten(self, parameters: Sequence[str]) -> None:
        """A block's transforms changed parameters; the checkpoint gives their values."""

    def group(self, block: int, count: int, weights: Callable[[int], Iterable[tuple[str, Tensor]]]) -> None:
        """The first groups of a block are finished.

        Args:
            block: the current one.
            count: of finished groups.
            weights: of a group, dense, by name.
        """

    def finished(self, record: BlockRecord) -> None:
        """A block is finished."""

    def border(self, block: int, *, streams: bool, last: bool = False) -> None:
        """All blocks before this one are finished.

        Args:
            block: the next one.
            streams: the hidden states are still needed.
            last: everything is finished.
        """
