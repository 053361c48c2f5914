"""The backward pass of a model, block by block. Labels are sampled from the model's own predictions."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mezzotint.blockwise.borders import Borders
from mezzotint.blockwise.bypass import Beside, Bypass, surroundings
from mezzotint.core.contracts import Block
from mezzotint.core.metrics import token_nll
from mezzotint.errors import CalibrationError, NonFiniteError


class Backward:
    """Gradients of the log-probabilities of drawn labels, window by window; subclasses watch what they pass.

    What `Borders` keeps at a border, the hidden states of each window, is replaced by the gradient in them on the way.

    Args:
        borders: after the forward pass.
        seed: of the labels.

    Attributes:
        window: that is on its way.
        counts: positions of each window that are scored.

    Raises:
        CalibrationError: there is no position to score.
    """

    def __init__(self, borders: Borders, seed: int) -> None:
        self.borders = borders
        self.source = borders.source
        self.window = 0
        self.counts = [sum(map(len, borders.scored(window))) for window in range(len(borders))]
        self._seed = seed
        # what arrived at values that blocks hand on beside the hidden states: by window, name and writer
        self._beside: dict[tuple[int, str, int], Tensor] = {}
        if not sum(self.counts):
            raise CalibrationError(
                "no window has two tokens in a row, so there is no token to predict. Give longer windows."
            )

    def through_head(self) -> None:
        """From labels to the last block's output."""
        with self.surroundings(head=True) as bypass, torch.enable_grad(), self.watched_head():
            for window in range(len(self.borders)):
                self.window = window
                tokens = self.borders.tokens(window)
                hidden = self.borders.pop(self.borders.last, window).detach().requires_grad_(True)
                hidden.grad = torch.zeros_like(hidden)
                # drawn for all positions at once, so that chunks do not show in the labels
                generator = torch.Generator().manual_seed(self._seed + window)
                uniform = torch.rand(tokens.shape[1], generator=generator, dtype=torch.float64).to(hidden.device)
                for positions in self.borders.scored(window):
                    logits = bypass.logits(tokens, hidden, positions)[0]
                    labels = sampled(logits.detach(), uniform[positions])
                    token_nll(logits, labels).sum().backward()
                self._keep(self.borders.last, window, hidden.grad)
                self.head_done()

    def through_block(self, block: Block) -> None:
        """From a block's output to its input."""
        with self.borders.filled(block) as module, torch.enable_grad(), self.watched(block):
            for window in range(len(self.borders)):
                self.window = window
                hidden, beside = self.borders.get(block.index, window).detach().requires_grad_(True), Beside()
                gradient = self.borders.pop(block.index + 1, window)
                output = self.borders.again(module, block, window, hidden, beside)
                ends = {(name, block.index): value for name, value in beside.written.items()}
                arrived = {key: self._beside.pop((window, *key)) for key in ends if (window, *key) in self._beside}
                torch.autograd.backward([output, *(ends[key] for key in arrived)], [gradient, *arrived.values()])
                assert hidden.grad is not None
                self._keep(block.index, window, hidden.grad)
                for key, leaf in beside.read.items():
                    if leaf.grad is not None:
                        self._beside[window, *key] = self._beside.get((window, *key), 0) + leaf.grad

    def watched(self, block: Block) -> AbstractContextManager[None]:
        """Look at what arrives in a block, while it is passed."""
        raise NotImplementedError

    @contextmanager
    def watched_head(self) -> Iterator[None]:
        """Look at what arrives at the head."""
        yield

    def head_done(self) -> None:
        """A window is through the head."""

    def surroundings(self, *, head: bool) -> AbstractContextManager[Bypass]:
        """The model without its blocks."""
        return surroundings(self.source, head=head, dtype=self.borders.dtype, device=self.borders.device)

    def _keep(self, border: int, window: int, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            raise NonFiniteError(
                f"the gradient before block {border} of {self.source.folder.name!r} is NaN or infinite in "
                f"{self.borders.dtype}; check the original with `mezzotint evaluate`."
            )
        self.borders.put(border, window, gradient)


def sampled(
    logits: Float[Tensor, "positions vocab"], uniform: Float[Tensor, " positions"]
) -> Int[Tensor, " positions"]:
    """One label for each position, where its uniform number falls in the cumulated probabilities.

    Logits that differ by a rounding may give another label. It is as good a draw as the other.
    """
    cumulated = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    found = torch.searchsorted(cumulated, (uniform * cumulated[:, -1]).unsqueeze(1), right=True)
    return found.squeeze(1).clamp_max(logits.shape[1] - 1)
