"""Perplexity of a model, and its divergence from another, accumulated chunk by chunk of positions."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mezzotint.core.metrics import kl_nats, perplexity, token_nll
from mezzotint.errors import CalibrationError, NonFiniteError
from mezzotint.evaluation.intervals import standard_error

PERCENTILES: Mapping[str, float] = {
    "p50": 50.0,
    "p90": 90.0,
    "p95": 95.0,
    "p99": 99.0,
    "p99.9": 99.9,
    "max": 100.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSums:
    """Sums over the scored tokens of one window, which is what models are compared by.

    Attributes:
        tokens: scored.
        nll: negative log likelihood under the model, in nats.
        reference_nll: under the reference.
        kl: divergence from the reference, in nats.
        agreed: tokens where both find the same token likeliest.
        lost: tokens that only the reference had likeliest, of those that came.
        gained: tokens that only the model had likeliest, of those that came.
    """

    tokens: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    lost: int = 0
    gained: int = 0

    def __add__(self, other: "WindowSums") -> "WindowSums":
        return WindowSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a comparison found.

    Standard errors come from the spread over windows (tokens of one window are not independent) and are None for a
    single one. All fields from ``reference_perplexity`` on are None without a reference.

    Attributes:
        perplexity: of the model.
        perplexity_stderr: its standard error, to first order: that of the mean negative log likelihood times it.
        tokens: scored, that is predicted.
        windows: with at least one scored token.
        seqlen: tokens per window.
        text: what it was measured on.
        digest: of the windows' tokens; two models were measured on the same ones where it is equal.
        by_window: sums over each window.
        reference_perplexity: of the reference.
        log_perplexity_ratio: ``log(perplexity / reference_perplexity)``, paired over windows.
        log_perplexity_ratio_stderr: its standard error.
        kl_nats: mean over tokens of KL(reference || model).
        kl_stderr: its standard error.
        kl_percentiles: over tokens: ``p50``, ``p90``, ``p95``, ``p99``, ``p99.9``, ``max``.
        top1_agreement: share of tokens where both models find the same token likeliest.
        top1_stderr: its standard error.
        flips: shares of tokens that the reference predicted and the model does not (``lost``), and the other way
            (``gained``), where the likeliest token counts as the prediction (arXiv 2407.09141).
    """

    perplexity: float
    perplexity_stderr: float | None
    tokens: int
    windows: int
    seqlen: int
    text: str
    digest: str
    by_window: tuple[WindowSums, ...] = field(repr=False)
    reference_perplexity: float | None = None
    log_perplexity_ratio: float | None = None
    log_perplexity_ratio_stderr: float | None = None
    kl_nats: float | None = None
    kl_stderr: float | None = None
    kl_percentiles: Mapping[str, float] | None = None
    top1_agreement: float | None = None
    top1_stderr: float | None = None
    flips: Mapping[str, float] | None = None

    def figures(self) -> dict[str, Any]:
        """Everything but the sums by window."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "by_window"}


class Divergence:
    """Accumulates chunks of positions into an `Evaluation`.

    Chunks of a window are added one after the other, then the window is ended. Sums are kept in float64, divergences
    of single tokens in float32 (for the percentiles: 4 bytes a token).

    Args:
        reference: whether chunks come with the logits of a reference.
    """

    def __init__(self, reference: bool) -> None:
        self.reference = reference
        self._windows: list[WindowSums] = []
        self._open = WindowSums()
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
        window = len(self._windows)
        nll = _finite_sum(token_nll(logits, targets), "model", window)
        if reference is None:
            self._open += WindowSums(tokens=targets.shape[0], nll=nll)
            return
        likeliest, before = logits.argmax(dim=-1), reference.argmax(dim=-1)
        hit, hit_before = likeliest == targets, before == targets
        kl = kl_nats(reference, logits)
        self._open += WindowSums(
            tokens=targets.shape[0],
            nll=nll,
            reference_nll=_finite_sum(token_nll(reference, targets), "reference", window),
            kl=_finite_sum(kl, "model", window),
            agreed=int((likeliest == before).sum()),
            lost=int((hit_before & ~hit).sum()),
            gained=int((hit & ~hit_before).sum()),
        )
        self._kl.append(kl.to("cpu", torch.float32))

    def end_window(self) -> None:
        """What is added from here on belongs to the next window."""
        self._windows.append(self._open)
        self._open = WindowSums()

    def result(self, seqlen: int, *, text: str = "", digest: str = "") -> Evaluation:
        """The figures over everything added.

        Args:
            seqlen: tokens per window, for the record.
            text: what was measured on, for the record.
            digest: of the tokens, for the record.

        Raises:
            CalibrationError: nothing was scored.
        """
        windows = tuple(sums for sums in (*self._windows, self._open) if sums.tokens)
        counts = [sums.tokens for sums in windows]
        tokens = sum(counts)
        if tokens == 0:
            raise CalibrationError(
                f"no token was scored in {len(self._windows)} windows of {seqlen}. Give text of at least 2 tokens."
            )

        def stderr(sums: list[float]) -> float | None:
            return standard_error(sums, counts)

        own = perplexity(math.fsum(sums.nll for sums in windows), tokens)
        spread = stderr([sums.nll for sums in windows])
        figures: dict[str, Any] = {}
        if self.reference:
            figures = self._against(windows, tokens, stderr)
        return Evaluation(
            perplexity=own,
            perplexity_stderr=None if spread is None else own * spread,
            tokens=tokens,
            windows=len(windows),
            seqlen=seqlen,
            text=text,
            digest=digest,
            by_window=windows,
            **figures,
        )

    def _against(
        self, windows: tuple[WindowSums, ...], tokens: int, stderr: Callable[[list[float]], float | None]
    ) -> dict[str, Any]:
        """What there is to say with a reference."""
        ratios = [sums.nll - sums.reference_nll for sums in windows]
        quantiles = np.percentile(torch.cat(self._kl).numpy(), list(PERCENTILES.values()))
        return {
            "reference_perplexity": perplexity(math.fsum(sums.reference_nll for sums in windows), tokens),
            "log_perplexity_ratio": math.fsum(ratios) / tokens,
            "log_perplexity_ratio_stderr": stderr(ratios),
            "kl_nats": math.fsum(sums.kl for sums in windows) / tokens,
            "kl_stderr": stderr([sums.kl for sums in windows]),
            "kl_percentiles": dict(zip(PERCENTILES, quantiles.tolist(), strict=True)),
            "top1_agreement": sum(sums.agreed for sums in windows) / tokens,
            "top1_stderr": stderr([float(sums.agreed) for sums in windows]),
            "flips": {name: sum(getattr(sums, name) for sums in windows) / tokens for name in ("lost", "gained")},
        }


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
