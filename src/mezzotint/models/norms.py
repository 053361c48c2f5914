"""Determines what a normalisation computes, by running it on random numbers, not by its name."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mezzotint.core.structure import NormEdge, Reader

ROWS = 3
SPREAD = 100.0  # large against every epsilon
# float32 rounding of sums over up to 2^14 numbers, and eps / SPREAD^2, both stay far below
TOLERANCE = 1e-3


class NormForm(NamedTuple):
    """A normalisation: names of its parameters in the module, and how they enter."""

    gain: str
    bias: str | None
    plus_one: bool
    has_mean: bool

    def edge(self, path: str, readers: tuple[Reader, ...], *, on_stream: bool) -> NormEdge:
        """The edge from the normalisation at ``path`` to what reads it."""
        return NormEdge(
            parameter=f"{path}.{self.gain}",
            gain="1+w" if self.plus_one else "w",
            has_mean=self.has_mean,
            bias=None if self.bias is None else f"{path}.{self.bias}",
            readers=readers,
            on_stream=on_stream,
        )


def probe(module: nn.Module) -> NormForm | None:
    """The form of ``module``, or None if it is not ``n(x) * gain (+ bias)`` with ``n(x)`` of mean square one.

    ``n`` must not change when its input is scaled; it has a mean if it does not change when a constant is added.

    Args:
        module: without children; its parameters, on any device, are replaced for the probe.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    if not 1 <= len(shapes) <= 2 or len(set(shapes.values())) != 1:
        return None
    width = next(iter(shapes.values()))[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, width, generator=generator) * SPREAD
    random = torch.randn(width, generator=generator)
    zero, one = torch.zeros(width), torch.ones(width)

    def run(given: dict[str, Tensor], at: Tensor = x) -> Tensor:
        return functional_call(module, {name: given.get(name, zero) for name in shapes}, (at,))

    with torch.no_grad():
        base = run({})
        if not isinstance(base, Tensor) or base.shape != x.shape:
            return None
        biases = [name for name in shapes if _close(run({name: random}) - base, random.expand_as(x))]
        gains = [name for name in shapes if name not in biases]
        if len(gains) != 1:
            return None
        gain = gains[0]
        plus_one = not _close(base, torch.zeros_like(x))
        neutral = {} if plus_one else {gain: one}
        normal = run(neutral)
        form = NormForm(gain, biases[0] if biases else None, plus_one, _close(run(neutral, x + SPREAD), normal))
        scaled = normal * (1 + random) if plus_one else normal * random
        is_norm = (
            _close(run({gain: random}), scaled)
            and _close(run(neutral, x * 3), normal)
            and _close(normal.square().mean(-1), torch.ones(ROWS))
        )
    return form if is_norm else None


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE))
