"""A float64 twin of AWQ's search (arXiv 2306.00978): scales, and nearest rounding of scaled columns."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch


def scales(mean_abs, strength):
    """``mean|x|^r``, divided by the root of its largest times its smallest."""
    raised = np.maximum(mean_abs**strength, 1e-4)
    return raised / np.sqrt(raised.max() * raised.min())


def rounded(weight, scale, *, bits, size):
    """``Q(W diag s) diag(1/s)``: asymmetric, by the smallest and largest value (and zero) of ``size`` columns."""
    out = np.empty_like(weight)
    scaled = weight * scale
    top = 2**bits - 1
    for start in range(0, weight.shape[1], size):
        piece = scaled[:, start : start + size]
        low, high = np.minimum(piece.min(1), 0), np.maximum(piece.max(1), 0)
        step = ((high - low) / top)[:, None]
        zero = np.clip(np.rint(-low[:, None] / step), 0, top)
        code = np.clip(np.rint(piece / step) + zero, 0, top)
        out[:, start : start + size] = (code - zero) * step
    return out / scale


class Block(NamedTuple):
    """A block of transformers' own model in float64.

    Attributes:
        inputs: ``[tokens, in]`` of its linears by name.
        shape: windows and tokens of each.
        model: around it.
    """

    module: torch.nn.Module
    inputs: Mapping[str, torch.Tensor]
    shape: tuple[int, int]
    model: torch.nn.Module

    def output(self, path):
        """Of the attention or the MLP, on the inputs of the first of its linears."""
        first = {"self_attn": "self_attn.q_proj", "mlp": "mlp.gate_proj"}[path]
        x = self.inputs[first].view(*self.shape, -1)
        submodule = self.module.get_submodule(path)
        with torch.no_grad():
            if path == "mlp":
                return submodule(x)
            length = self.shape[1]
            rope = self.model.get_submodule("model.rotary_emb")(x, torch.arange(length)[None])
            mask = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)[None, None]
            return submodule(x, position_embeddings=rope, attention_mask=mask)[0]
