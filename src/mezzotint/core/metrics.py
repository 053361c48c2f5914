"""Measures of loss: of token distributions (nats), of values (decibels) and of a linear's output (relative).

Everything is computed in float32 or wider; float64 input gives float64 results.
"""

import math

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from mezzotint.core import panels

_PANEL = 128


def kl_nats(
    reference_logits: Float[Tensor, "tokens vocab"], logits: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """KL divergence of two next-token distributions, in nats per token.

        KL(p || q) = sum p (log p - log q) + (sum q - sum p),   p = softmax(reference_logits), q = softmax(logits)

    The last two sums cancel in exact arithmetic. In floating point they cancel, to first order, the error of the two
    normalisations: in float32, over 49 152 tokens, the error is 1e-7 nats with them and up to 6e-7 without. Three
    temporaries of the size of the logits live at once. Tokens that the reference excludes (logit ``-inf``) contribute
    nothing.

    Args:
        reference_logits: of p, ``[tokens, vocab]``, any floating dtype.
        logits: of q, the same shape.

    Returns:
        ``[tokens]``, float32 or wider; at least 0 up to rounding; ``inf`` where q excludes what p does not.

    Example:
        >>> kl_nats(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3.0)]]))
        tensor([0.1438])
    """
    dtype = _wide(reference_logits, logits)
    log_ratio = torch.log_softmax(reference_logits, dim=-1, dtype=dtype)
    log_q = torch.log_softmax(logits, dim=-1, dtype=dtype)
    p = log_ratio.exp()
    log_ratio.sub_(log_q)
    mass = log_q.exp_().sum(dim=-1) - p.sum(dim=-1)
    log_ratio.masked_fill_(p == 0, 0.0)  # 0 log 0 = 0, where the logarithms give inf or nan
    return p.mul_(log_ratio).sum(dim=-1) + mass


def token_nll(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Negative log likelihood of each target, in nats: ``logsumexp(logits) - logits[target]``.

    Args:
        logits: ``[tokens, vocab]``, any floating dtype.
        targets: ``[tokens]``, ids in ``0 .. vocab - 1``.

    Returns:
        ``[tokens]``, float32 or wider.

    Example:
        >>> token_nll(torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([1]))
        tensor([0.2877])
    """
    wide = logits.to(_wide(logits))
    chosen = wide.gather(-1, targets.to(torch.int64).unsqueeze(-1)).squeeze(-1)
    return wide.logsumexp(dim=-1) - chosen


def perplexity(nll_sum: float, tokens: int) -> float:
    """``exp(nll_sum / tokens)``; ``inf`` where that is beyond a float.

    Args:
        nll_sum: sum of the negative log likelihoods, in nats.
        tokens: how many there were; at least 1.

    Raises:
        ValueError: there were no tokens.

    Example:
        >>> round(perplexity(2 * math.log(8.0), 2), 6)
        8.0
    """
    if tokens < 1:
        raise ValueError(f"perplexity of {tokens} tokens is undefined; score at least 1")
    try:
        return math.exp(nll_sum / tokens)
    except OverflowError:
        return math.inf


def sqnr_db(reference: Float[Tensor, "..."], value: Float[Tensor, "..."]) -> float:
    """Signal to quantization noise, ``10 log10(|reference|^2 / |reference - value|^2)``, in decibels.

    Args:
        reference: what was to be stored, any shape.
        value: what was stored, the same shape.

    Returns:
        Decibels; ``inf`` without noise, ``-inf`` when there is noise and no signal.

    Example:
        >>> round(sqnr_db(torch.tensor([1.0, 1.0]), torch.tensor([1.1, 0.9])), 2)
        20.0
    """
    wide = reference.to(_wide(reference, value))
    signal = float(wide.square().sum())
    noise = float((wide - value).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def h_error(weight: Float[Tensor, "out in"], value: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> float:
    """Squared error of a linear's output relative to its energy (the GPTQ objective, normalised).

        tr((V - W) gram (V - W)') / tr(W gram W')

    Args:
        weight: W, ``[out, in]``.
        value: V, what stands in its place, ``[out, in]``.
        gram: sum of ``x x'`` over the tokens, ``[in, in]``; any positive multiple gives the same.

    Returns:
        At least 0 up to rounding; 0 when neither has energy, ``inf`` when only the error has.

    Example:
        >>> h_error(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.eye(2))
        0.25
    """
    return relative(*h_energies(weight, value, gram))


def h_energies(
    weight: Float[Tensor, "out in"], value: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]
) -> tuple[float, float]:
    """Both parts of `h_error`, error and energy; each is a sum over rows."""
    dtype = _wide(weight, value, gram)
    wide = weight.to(dtype)
    return float(energies(value.to(dtype) - wide, gram).sum()), float(energies(wide, gram).sum())


def energies(
    values: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], left: Float[Tensor, "out in"] | None = None
) -> Float[Tensor, " out"]:
    """``v gram v'`` of every row v, in little more than half the time of the product.

    Args:
        values: float32 or wider.
        gram: symmetric; what lies left of its diagonal is taken twice.
        left: ``A values`` for a symmetric ``A``: then only the sum over all rows that A mixes means something.
    """
    left = values if left is None else left
    total = values.new_zeros(len(values))
    for start, rows in panels.read(gram, _PANEL):
        wide, end = rows.to(values.dtype), start + len(rows)
        product = (left[:, :start] @ wide[:, :start].t()).mul_(2)
        product.addmm_(left[:, start:end], wide[:, start:end])
        total += torch.linalg.vecdot(product, values[:, start:end])
    return total


def relative(error: float, energy: float) -> float:
    """An error over an energy; 0 when there is neither, ``inf`` when there is only the error."""
    if energy > 0:
        return error / energy
    return math.inf if error > 0 else 0.0


def _wide(*tensors: Tensor) -> torch.dtype:
    """Float32, or float64 if one of the tensors is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


# of float32 size: the logits of two models and three temporaries of the divergence
LOGIT_COPIES = 5


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
