"""One forward pass of single windows, block by block. It keeps the hidden states between the blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mezzotint.blockwise.bypass import Beside, Passage, surroundings
from mezzotint.calibration import Windows
from mezzotint.core.contracts import Block
from mezzotint.core.metrics import chunks
from mezzotint.errors import NonFiniteError
from mezzotint.models import Source, dematerialize, materialize
from mezzotint.storage.stores import Shelf, Store


def counted(progress: Callable[[int, int], None], total: int) -> Callable[[], None]:
    """To be called at every step of so many; tells how many are done."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return step


class Borders:
    """Hidden states of the original at every border: 0 is before the first block, ``i + 1`` behind block ``i``.

    Windows go one by one: what is wanted of them may be sums of squares, which a batch would mix.

    Args:
        source: the original; one block of it is in memory at a time.
        windows: tokens.
        store: takes the states, ``(blocks + 1) * windows * seqlen * width`` numbers.
        shelf: takes what blocks hand on beside them.
        device: where blocks run.
        dtype: in which they run.
        step: told of every block done.

    Raises:
        NonFiniteError: a block gives NaN or infinity.
    """

    def __init__(
        self,
        source: Source,
        windows: Windows,
        *,
        store: Store,
        shelf: Shelf,
        device: str,
        dtype: torch.dtype,
        step: Callable[[], None],
    ) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.last = len(source.map.blocks)
        self._windows = windows
        self._store = store
        self._passages: list[Passage] = []
        with torch.no_grad():
            with surroundings(source, head=False, dtype=dtype, device=device) as bypass:
                for window in range(len(windows)):
                    hidden, calls = bypass.record(self.tokens(window), self.mask(window))
                    self._passages.append(Passage(calls, shelf, history=True))
                    self.put(0, window, hidden)
            for block in source.map.blocks:
                with self.filled(block) as module:
                    for window in range(len(windows)):
                        output = self._passages[window].through(module, block.index, self.get(block.index, window))
                        if not torch.isfinite(output).all():
                            raise NonFiniteError(
                                f"block {block.index} of {source.folder.name!r} gives NaN or infinity in {dtype}; "
                                "check the original with `mezzotint evaluate`."
                            )
                        self.put(block.index + 1, window, output)
                step()

    def __len__(self) -> int:
        return len(self._windows)

    def tokens(self, window: int) -> Int[Tensor, "1 seqlen"]:
        """Of one window, where the blocks run."""
        return self._windows.tokens[window : window + 1].to(self.device)

    def mask(self, window: int) -> Bool[Tensor, "1 seqlen"] | None:
        """False is padding."""
        mask = self._windows.mask
        return None if mask is None else mask[window : window + 1].to(self.device)

    def scored(self, window: int) -> tuple[Int[Tensor, " positions"], ...]:
        """Positions whose next token is in the window too, none of them padding, in chunks for their logits."""
        vocabulary = self.source.config.get_text_config().vocab_size
        pieces = chunks(self._windows.seqlen, vocabulary, GRADIENT_BYTES)
        if self._windows.mask is not None:
            mask = self._windows.mask[window].cpu()
            pieces = tuple(piece[mask[piece] & mask[piece + 1]] for piece in pieces)
        return tuple(piece.to(self.device) for piece in pieces if len(piece))

    def get(self, border: int, window: int) -> Float[Tensor, "1 seqlen *width"]:
        """States at a border, or what was put there instead."""
        return self._store.get(border * len(self) + window)

    def put(self, border: int, window: int, value: Tensor) -> None:
        """Keep something at a border in the place of what is there; ``last + 1`` is a border too."""
        self._store.put(border * len(self) + window, value)

    def pop(self, border: int, window: int) -> Tensor:
        """States at a border, which are forgotten."""
        return self._store.pop(border * len(self) + window)

    @contextmanager
    def filled(self, block: Block) -> Iterator[nn.Module]:
        """The block with its weights in memory."""
        module = self.source.skeleton.get_submodule(block.path)
        materialize(module, block.path, self.source.checkpoint, dtype=self.dtype, device=self.device)
        try:
            yield module
        finally:
            dematerialize(module)

    def again(self, module: nn.Module, block: Block, window: int, hidden: Tensor, beside: Beside) -> Tensor:
        """What the block makes of a window's hidden states; ``beside`` is told what else it reads and gives."""
        return self._passages[window].through(module, block.index, hidden, beside)

    def passage(self, window: int, block: int) -> Passage:
        """Another way of a window from that block on."""
        return self._passages[window].branch(block)


GRADIENT_BYTES = 64 * 2**20  # of logits that gradients are taken of, at a time, and as much again of gradients
