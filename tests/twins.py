"""Two explicit float64 models, original and quantized, run by transformers itself: what the sweep's sums must equal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.blockwise.source import open_source
from mezzotint.models import Source
from runs import stock

Seen = Mapping[str, Tensor]


def quantized_twin(model: Path, out: Path, **options: Any) -> torch.nn.Module:
    """The original in float64, with the exact values of the packed or dense weights in ``out``."""
    twin, source = stock(model, torch.float64, **options), open_source(out)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(source.checkpoint.parameter(name).double())
    return twin


def run(model: torch.nn.Module, source: Source, tokens: Tensor, mask: Tensor | None = None) -> Seen:
    """Inputs of linears and norms by module name, outputs of blocks by path: rows of real tokens only."""
    real = torch.ones(tokens.numel(), dtype=torch.bool) if mask is None else mask.flatten()
    seen: dict[str, Tensor] = {}
    watched = [m.name for m in source.map.matrices.values() if m.expert is None and not m.lookup]
    watched += [name for name, _ in model.named_modules() if name.endswith("layernorm")]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2)[real]})
        )
        for name in watched
    ]
    handles += [
        model.get_submodule(block.path).register_forward_hook(
            lambda _, __, out, path=block.path: seen.update({path: out.flatten(0, -2)[real]})
        )
        for block in source.map.blocks
    ]
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=None if mask is None else mask.long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def routes(model: torch.nn.Module, tokens: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    """Of each block with experts: their input ``[tokens, hidden]`` and which experts each token goes to."""
    found: list[tuple[Tensor, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: found.append((args[0], args[1])))
        for name, module in model.named_modules()
        if name.endswith("mlp.experts")
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def assert_sum(actual: Tensor | None, left: Tensor, right: Tensor, *, size: Tensor, error: float = 1e-5) -> None:
    """``sum left right'`` over tokens, up to what float32 does to the inputs.

    Hidden states of a few blocks in float32 differ by a relative 1e-6 or so from those in float64 (some hundred
    roundings of 6e-8 that add up as a random walk); ``left`` may be a difference of vectors of norm ``size``. By Cauchy
    and Schwarz an entry of the sum then differs by at most ``2 error size_i |right_j|``.
    """
    assert actual is not None
    expected = left.t() @ right
    bound = 2 * error * torch.outer(size.norm(dim=0), right.norm(dim=0))
    excess = ((actual.double() - expected).abs() / bound).max()
    assert excess <= 1, f"off by {float(excess):.3g} times the bound"
