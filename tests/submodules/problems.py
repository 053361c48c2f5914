"""Small attention and MLP problems in float64, and the same as explicit functions of one weight."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mezzotint.core.statistics import Accumulator, Statistics
from mezzotint.submodules.batches import AttentionBatch, Linear, MlpBatch, Outer
from mezzotint.submodules.scores import Pattern

WINDOWS, SEQLEN, WIDTH, GROUPS, OWN, DIM, OUT, INNER = 3, 7, 8, 2, 2, 4, 6, 10
HEADS = GROUPS * OWN


def rope(outputs: Tensor, heads: int) -> Tensor:
    """``[windows, heads, seqlen, dim]``, each head turned by its position."""
    x = outputs.unflatten(-1, (heads, DIM)).transpose(1, 2)
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * 0.7
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def normed_rope(outputs: Tensor, heads: int) -> Tensor:
    """The same behind a norm of each head, as in Qwen3."""
    x = outputs.unflatten(-1, (heads, DIM))
    return rope((x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt()).flatten(-2), heads)


def plain(outputs: Tensor, heads: int) -> Tensor:
    return outputs.unflatten(-1, (heads, DIM)).transpose(1, 2)


@dataclass
class Problem:
    """Originals, quantized stand-ins, batches and statistics."""

    originals: dict[str, Linear]
    linears: dict[str, Linear]
    batches: list[Any]
    generator: torch.Generator

    def all(self) -> list[Any]:
        return self.batches


def linear(rows: int, width: int, generator: torch.Generator, *, bias: bool = True) -> Linear:
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64) * width**-0.5
    return Linear(weight, torch.randn(rows, generator=generator, dtype=torch.float64) * 0.1 if bias else None)


def disturbed(found: Linear, generator: torch.Generator, size: float = 0.2) -> Linear:
    noise = torch.randn(found.weight.shape, generator=generator, dtype=torch.float64)
    return found._replace(weight=found.weight * (1 + size * noise))


def noisy(value: Tensor, generator: torch.Generator, size: float = 0.3) -> Tensor:
    return value + size * torch.randn(value.shape, generator=generator, dtype=value.dtype)


def attention_problem(
    seed: int = 0, *, count: int = 1, normed: bool = False, mask: bool = False, looking: bool = False, **pattern: Any
) -> Problem:
    """Batches with grouped heads; ``mask`` leaves the last tokens of the first window out, ``looking`` goes through the
    next norm."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"q": HEADS * DIM, "k": GROUPS * DIM, "v": GROUPS * DIM}
    originals = {kind: linear(rows, WIDTH, g) for kind, rows in sizes.items()}
    originals["o"] = linear(OUT, HEADS * DIM, g)
    linears = {kind: disturbed(found, g) for kind, found in originals.items()}
    turned = normed_rope if normed else rope
    batches = []
    for _ in range(count):
        original = torch.randn(WINDOWS, SEQLEN, WIDTH, generator=g, dtype=torch.float64)
        weights = torch.ones(WINDOWS, SEQLEN, dtype=torch.float64)
        if mask:
            weights[0, -2:] = 0
        stream = torch.randn(WINDOWS, SEQLEN, OUT, generator=g, dtype=torch.float64)
        outer = Outer(
            original=torch.randn(WINDOWS, SEQLEN, HEADS * DIM, generator=g, dtype=torch.float64),
            original_stream=stream,
            stream=noisy(stream, g),
            mask=weights if mask else None,
            normed=looking,
        )
        batches.append(
            AttentionBatch(
                inputs=noisy(original, g),
                original=original,
                query=lambda u: turned(u, HEADS),
                key=lambda u: turned(u, GROUPS),
                value=lambda u: plain(u, GROUPS),
                pattern=Pattern(**{"scaling": DIM**-0.5, "weights": weights if mask else None, **pattern}),
                outer=outer,
            )
        )
    return Problem(originals, linears, batches, g)


def mlp_problem(seed: int = 0, *, count: int = 1, gated: bool = True, looking: bool = False) -> Problem:
    g = torch.Generator().manual_seed(seed)
    originals = {"up": linear(INNER, WIDTH, g), "down": linear(OUT, INNER, g), "gate": linear(INNER, WIDTH, g)}
    linears = {kind: disturbed(found, g) for kind, found in originals.items()}
    batches = []
    for _ in range(count):
        original = torch.randn(WINDOWS, SEQLEN, WIDTH, generator=g, dtype=torch.float64)
        inputs = noisy(original, g)
        stream = torch.randn(WINDOWS, SEQLEN, OUT, generator=g, dtype=torch.float64)
        gate = torch.nn.functional.silu(linears["gate"](inputs))
        hidden = originals["up"](original) * torch.nn.functional.silu(originals["gate"](original))
        function = (lambda u, gate=gate: gate * u) if gated else torch.nn.functional.gelu
        batches.append(
            MlpBatch(
                inputs=inputs,
                hidden=function,
                outer=Outer(original=hidden, original_stream=stream, stream=noisy(stream, g), normed=looking),
            )
        )
    return Problem(originals, linears, batches, g)


def statistics(problem: Problem) -> Statistics:
    """Of the inputs of the first linears, every token counted."""
    sums = Accumulator(WIDTH, frozenset(), dtype=torch.float64)
    for batch in problem.batches:
        sums.add(batch.inputs.flatten(0, 1))
    return sums.finish()


def naive_scores(batch: AttentionBatch, linears: dict[str, Linear], inputs: Tensor) -> Tensor:
    """``[windows, heads, queries, keys]`` before the mask, with what follows them."""
    query, key = batch.query(linears["q"](inputs)), batch.key(linears["k"](inputs))
    found = torch.einsum("whqd,whkd->whqk", query, key.repeat_interleave(OWN, 1)) * batch.pattern.scaling
    cap = batch.pattern.softcap
    return found if cap is None else cap * torch.tanh(found / cap)


def seen(batch: AttentionBatch) -> Tensor:
    if batch.pattern.visible is not None:
        return batch.pattern.visible[:, None]
    return torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril()[None, None]


def score_residual(batch: AttentionBatch, linears: dict[str, Linear], originals: dict[str, Linear]) -> Tensor:
    """Every masked difference of scores, as one vector."""
    difference = naive_scores(batch, linears, batch.inputs) - naive_scores(batch, originals, batch.original)
    difference = difference * seen(batch)
    weights = batch.pattern.weights
    return (difference if weights is None else difference * weights[:, None, :, None]).flatten()


def stream_residual(batch: AttentionBatch, linears: dict[str, Linear], originals: dict[str, Linear]) -> Tensor:
    """Every difference of the streams after attention, as one vector."""
    scores = naive_scores(batch, linears, batch.inputs).masked_fill(~seen(batch), -torch.inf)
    value = batch.value(linears["v"](batch.inputs)).repeat_interleave(OWN, 1)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return outer_residual(batch.outer, linears["o"](mixed), originals["o"])


def mlp_residual(batch: MlpBatch, linears: dict[str, Linear], originals: dict[str, Linear]) -> Tensor:
    return outer_residual(batch.outer, linears["down"](batch.hidden(linears["up"](batch.inputs))), originals["down"])


def outer_residual(outer: Outer, output: Tensor, last: Linear) -> Tensor:
    goal = outer.original_stream + last(outer.original)
    difference = outer.stream + output - goal
    if outer.normed:
        difference = difference / goal.square().mean(-1, keepdim=True).sqrt()
    return (difference if outer.mask is None else difference * outer.mask.unsqueeze(-1)).flatten()
