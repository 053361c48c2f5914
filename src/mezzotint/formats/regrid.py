"""Converts blocks of GGUF types to integers in groups, if the values are the same."""

from dataclasses import replace

import torch

from mezzotint.core.contracts import QuantizedWeight
from mezzotint.core.plans import Refusal
from mezzotint.errors import FormatError
from mezzotint.formats.decoded import PackedWeight
from mezzotint.formats.schemes import uniform_grid
from mezzotint.grids.gguf.grid import FittedGguf, GgufGrid
from mezzotint.grids.gguf.types import BlockType
from mezzotint.grids.uniform import FittedUniform

INTEGERS = ("compressed-tensors", "gptq", "gptq-v2")  # formats of uniform integers


def as_integers(matrix: str, packed: PackedWeight) -> PackedWeight:
    """The same codes and scales on a symmetric grid with a float16 scale a group.

    ``Q4_0``, ``Q5_0`` and ``Q8_0`` are just that: ``value = scale * (code - 2^(bits - 1))`` in groups of 32.

    Args:
        matrix: name, for messages.
        packed: on any grid; what is on no GGUF type stays.

    Raises:
        FormatError: rule ``block-type``, values of that type are no integers times a float16 scale.
    """
    if not isinstance(packed.grid, GgufGrid):
        return packed
    t = packed.grid.block_type
    reason = _reason(t)
    if reason is not None:
        refusal = Refusal(
            rule="block-type",
            what=f"type of {matrix}",
            value=t.name,
            limit=reason,
            remedy="Convert to mezzotint or dense, or quantize the original again.",
        )
        raise FormatError(f"{matrix} cannot be converted without loss: {refusal}")
    scheme = {"bits": t.bits, "group_size": t.group, "symmetric": True}
    grid = uniform_grid(scheme, torch.float16)

    def weight() -> QuantizedWeight:
        found = packed.weight()
        blocks = found.grid
        assert isinstance(blocks, FittedGguf)
        fitted = FittedUniform(grid=grid, shape=found.shape, scale=blocks.scale, zero_point=blocks.zero_point)
        return QuantizedWeight(shape=found.shape, code=found.code, grid=fitted)

    return replace(packed, grid=grid, weight=weight)


def _reason(t: BlockType) -> str | None:
    """Why a type is no grid of integers, or None."""
    if t.values is not None:
        return "codes stand for numbers of a table, which are not evenly spaced"
    if t.zero_point is None:
        return "groups have a minimum, a float16 number of its own that no integer zero point stands for"
    if "sub_scale" in t.parameters:
        return "scales of groups are products of two numbers, which float16 does not hold"
    assert t.zero_point == 2 ** (t.bits - 1), f"{t.name} is not symmetric"
    return None
