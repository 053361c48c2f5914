"""Perplexity of a model, and its divergence from another, accumulated chunk by chunk of positions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from mezzotint.core.metrics import kl_nats, perplexity, token_nll
from mezzotint.errors import CalibrationError, NonFiniteError

PERCENTILES: Mapping[str, float] = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
# of float32 size: the logits of two models and three temporaries of the divergence
LOGIT_COPIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a comparison found. The fields below ``seqlen`` are None without a reference.

    Attributes:
        perplexity: of the model.
        tokens: scored, that is predicted.
        windows: with at least one scored token.
        seqlen: tokens per window.
        reference_perplexity: of the reference.
        kl_nats: mean over tokens of KL(reference || model).
        kl_stderr: standard error of that mean, from its spread over windows (tokens of one window are not
            independent); None for a single window.
        kl_percentiles: over tokens: ``p50``, ``p90``, ``p99``, ``max``.
        top1_agreement: share of tokens where both models find the same token likeliest.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int
    reference_perplexity: float | None = None
    kl_nats: float | None = None
    kl_stderr: float | None = None
    kl_percentiles: Mapping[str, float] | None = None
    top1_agreement: float | None = None


@dataclass(slots=True)
class _Window:
    """Sums over the scored tokens of one window."""

    tokens: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0


class Divergence:
    """Accumulates chunks of positions into an `Evaluation`.

    Chunks of a window are added one after the other, then the window is ended. Sums are kept in float64, divergences
    of single tokens in float32 (for the percentiles: 4 bytes a token).

    Args:
        reference: whether chunks come with the logits of a reference.
    """

    def __init__(self, reference: bool) -> None:
        self.reference = reference
        self._windows: list[_Window] = []
        self._open = _Window()
        self._kl: list[Tensor] = []

    def add(
        self,
        logits: Float[Tensor, "positions vocab"],
        targets: Int[Tensor, " positions"],
        reference: Float[Tensor, "positions vocab"] | None = None,
        *,
        mask: Bool[Tensor, " positions"] | None = None,
    ) -> None:
        """Add some positions of the current window.

        Args:
            logits: of the model, where position ``t`` predicts token ``t + 1``.
            targets: the tokens that were predicted.
            reference: logits of the reference, if there is one.
            mask: False is not scored (the target is padding).

        Raises:
            NonFiniteError: a score is not finite.
        """
        assert (reference is not None) == self.reference, "chunks with and without a reference do not mix"
        if mask is not None and not bool(mask.all()):
            logits, targets = logits[mask], targets[mask]
            reference = None if reference is None else reference[mask]
        sums, window = self._open, len(self._windows)
        sums.tokens += targets.shape[0]
        sums.nll += _finite_sum(token_nll(logits, targets), "model", window)
        if reference is None:
            return
        sums.reference_nll += _finite_sum(token_nll(reference, targets), "reference", window)
        sums.agreed += int((logits.argmax(dim=-1) == reference.argmax(dim=-1)).sum())
        kl = kl_nats(reference, logits)
        sums.kl += _finite_sum(kl, "model", window)
        self._kl.append(kl.to("cpu", torch.float32))

    def end_window(self) -> None:
        """What is added from here on belongs to the next window."""
        self._windows.append(self._open)
        self._open = _Window()

    def result(self, seqlen: int) -> Evaluation:
        """The figures over everything added.

        Args:
            seqlen: tokens per window, for the record.

        Raises:
            CalibrationError: nothing was scored.
        """
        windows = [sums for sums in (*self._windows, self._open) if sums.tokens]
        tokens = sum(sums.tokens for sums in windows)
        if tokens == 0:
            raise CalibrationError(
                f"no token was scored in {len(self._windows)} windows of {seqlen}. Give text of at least 2 tokens."
            )
        own = perplexity(math.fsum(sums.nll for sums in windows), tokens)
        if not self.reference:
            return Evaluation(perplexity=own, tokens=tokens, windows=len(windows), seqlen=seqlen)
        per_token = torch.cat(self._kl).numpy()
        quantiles = np.percentile(per_token, list(PERCENTILES.values()))
        return Evaluation(
            perplexity=own,
            tokens=tokens,
            windows=len(windows),
            seqlen=seqlen,
            reference_perplexity=perplexity(math.fsum(sums.reference_nll for sums in windows), tokens),
            kl_nats=math.fsum(sums.kl for sums in windows) / tokens,
            kl_stderr=standard_error([sums.kl for sums in windows], [sums.tokens for sums in windows]),
            kl_percentiles=dict(zip(PERCENTILES, quantiles.tolist(), strict=True)),
            top1_agreement=sum(sums.agreed for sums in windows) / tokens,
        )


def chunks(seqlen: int, vocab: int, budget_bytes: int) -> tuple[Int64[Tensor, " positions"], ...]:
    """Consecutive pieces of the positions ``0 .. seqlen - 2``: those whose next token is in the window too.

    With ``t`` one of them, ``hidden[t]`` gives the logits and ``tokens[t + 1]`` the targets. The logits of two models
    and the temporaries of `Divergence.add` fit the budget, in float32; one position is the least.

    Args:
        seqlen: tokens per window.
        vocab: entries of a row of logits.
        budget_bytes: what may live at once.

    Example:
        >>> [piece.tolist() for piece in chunks(6, 1000, 40_000)]
        [[0, 1], [2, 3], [4]]
    """
    size = max(1, budget_bytes // (LOGIT_COPIES * torch.float32.itemsize * vocab))
    return torch.arange(seqlen - 1).split(size)


def standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of ``sum(sums) / sum(counts)`` over windows (ratio estimator).

    With ``n`` windows of equal counts this is the standard deviation of the window means over ``sqrt(n)``.
    """
    n, total = len(sums), sum(counts)
    if n < 2:
        return None
    mean = math.fsum(sums) / total
    squares = math.fsum((s - c * mean) ** 2 for s, c in zip(sums, counts, strict=True))
    return math.sqrt(n / (n - 1) * squares) / total


def _finite_sum(values: Float[Tensor, " tokens"], whose: str, window: int) -> float:
    """The sum in float64.

    Raises:
        NonFiniteError: it is not finite.
    """
    total = float(values.sum(dtype=torch.float64))
    if not math.isfinite(total):
        raise NonFiniteError(
            f"logits of the {whose} in window {window} give a score of {total}. Evaluate in bfloat16 or float32, and "
            "check the weights for values that are not finite."
        )
    return total
