"""Tokens of the two streams side by side, as statistics want them."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mezzotint.blockwise.stops import Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What one batch puts into a matrix in both streams, row for row.

    Attributes:
        stream, original_stream: what the matrix's output is added to, where it is added unchanged.
    """

    quantized: Float[Tensor, "tokens in"]
    original: Float[Tensor, "tokens in"]
    stream: Float[Tensor, "tokens out"] | None
    original_stream: Float[Tensor, "tokens out"] | None

    @property
    def residual(self) -> Float[Tensor, "tokens out"] | None:
        """Difference of the two streams."""
        if self.stream is None or self.original_stream is None:
            return None
        return self.original_stream - self.stream


def normed(
    compared: Compared, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, *, own: bool
) -> Compared:
    """Inputs and streams over the root mean square of what the original weight makes of them (LoaQ, MATH.md section 8).

    Args:
        compared: both streams.
        weight: of the original.
        bias: of the original.
        own: each stream over its own root mean square; otherwise both over that of the full-precision one.
    """
    assert compared.stream is not None
    assert compared.original_stream is not None

    def scale(inputs: Tensor, stream: Tensor) -> Tensor:
        output = stream + torch.nn.functional.linear(inputs, weight, bias)
        return output.square().mean(-1, keepdim=True).clamp_min(torch.finfo(output.dtype).tiny).rsqrt()

    n = scale(compared.original, compared.original_stream)
    nh = scale(compared.quantized, compared.stream) if own else n
    return replace(
        compared,
        quantized=compared.quantized * nh,
        original=compared.original * n,
        stream=compared.stream * nh,
        original_stream=compared.original_stream * n,
    )


def token_weights(mask: Bool[Tensor, "windows seqlen"] | None, inputs: Inputs) -> Float[Tensor, " tokens"] | None:
    """Weight of each row of the inputs: zero for padding, which never enters a statistic."""
    if mask is None:
        return None
    flat = mask.flatten().to(inputs.values.dtype)
    return flat if inputs.tokens is None else flat[inputs.tokens]


def aligned(original: Inputs, quantized: Inputs) -> Float[Tensor, "tokens in"]:
    """The full-precision stream's inputs of the tokens that the quantized stream has, row for row.

    An expert may get other tokens in the two streams; where the full-precision stream has none, the quantized one's
    row stands in, so that the token counts as without drift.
    """
    if original is quantized or original.tokens is None or quantized.tokens is None:
        return original.values
    values = quantized.values.clone()
    both = torch.isin(quantized.tokens, original.tokens)
    order = torch.argsort(original.tokens)
    places = torch.searchsorted(original.tokens[order], quantized.tokens[both])
    values[both] = original.values[order[places]]
    return values
