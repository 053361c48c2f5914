"""How calibration windows are divided into batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Bool, Int
from torch import Tensor

from mezzotint.calibration import Windows

BATCH_TOKENS = 4096  # that run through a block together
_WORTH_DIVIDING = 1024  # fewer tokens are one batch


def windows_of_batch(seqlen: int) -> int:
    """The most that run together."""
    return max(1, BATCH_TOKENS // seqlen)


def windows_of_batches(windows: int, seqlen: int) -> list[int]:
    """How many windows run together in each batch: at most `BATCH_TOKENS` tokens, on any number of ranks.

    Batches are even in size, and in number where there are tokens enough for two: so two ranks have the same work of
    every kind.
    """
    batches = -(-windows // windows_of_batch(seqlen))
    if windows > 1 and windows * seqlen >= _WORTH_DIVIDING:
        batches += batches % 2
    borders = [windows * number // batches for number in range(batches + 1)]
    return [end - start for start, end in pairwise(borders)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Windows that run together; fit and held-out windows never share a batch.

    Attributes:
        first: number of the first of them, over all windows that are fitted on and then all that are held out.
    """

    tokens: Int[Tensor, "windows seqlen"]
    mask: Bool[Tensor, "windows seqlen"] | None
    held_out: bool
    first: int


def batches_of(windows: Windows, held_out: bool, first: int = 0) -> Iterator[Batch]:
    """Batches as `windows_of_batches` has them; ``first`` is the number of the first window."""
    start = 0
    for size in windows_of_batches(len(windows), windows.seqlen):
        mask = None if windows.mask is None else windows.mask[start : start + size]
        yield Batch(tokens=windows.tokens[start : start + size], mask=mask, held_out=held_out, first=first + start)
        start += size
