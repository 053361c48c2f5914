"""The trellis code in plain torch: any device. The C++ is tested against these, bit for bit.

The search is that of `trellis.h`: whole-number costs times ``2**s`` with the high bits of the state below them, so that
one minimum decides ties as well. All states of an element are ``[top, p, q]``, ``top`` the bits that tell the survivors
of a node apart, ``q`` the new bits: the predecessor is ``(top, p)`` and the next node ``(p, q)``; nothing is gathered.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

TILE = 256
UNIT = 147.7
_SURVIVOR_BYTES = 2**28  # of the tiles that are searched at once


def ends(rate: int, device: torch.device) -> Int64[Tensor, " elements"]:
    """Where the bits of each element of a tile end."""
    return (torch.arange(TILE, device=device) + 1) * rate // 8


def state_values(states: int, device: torch.device) -> Int64[Tensor, " values"]:
    """``UNIT`` times what each state stands for: the bytes of a product modulo ``2**32``, summed and centred."""
    product = torch.arange(2**states, device=device) * 0x83DCD12D
    return sum((product >> byte) & 255 for byte in (0, 8, 16, 24)) - 510  # pyright: ignore[reportReturnType]


def decode(packed: Int32[Tensor, "tiles rate"], states: int, dtype: torch.dtype) -> Float[Tensor, "tiles 256"]:
    """See `mezzotint.kernels.trellis_decode`."""
    rate, device = packed.shape[1], packed.device
    table = state_values(states, device).to(torch.float32) * torch.tensor(1 / UNIT, device=device)
    last = ends(rate, device) - 1
    word = packed.to(torch.int64) & 0xFFFFFFFF
    pair = word.roll(1, dims=1)[:, last // 32] << 32 | word[:, last // 32]
    return table.to(dtype)[(pair >> (31 - last % 32)) & (2**states - 1)]


def encode(values: Float[Tensor, "tiles 256"], rate: int, states: int, window: int) -> Int32[Tensor, "tiles {rate}"]:
    """See `mezzotint.kernels.trellis_encode`."""
    search = _Search(states=states, rate=rate)
    tiles_at_once = max(1, _SURVIVOR_BYTES // (TILE << states - rate // 8))
    if not len(values):
        return torch.empty(0, rate, dtype=torch.int32, device=values.device)
    return torch.cat([search.run(part, window) for part in values.split(tiles_at_once)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    states: int
    rate: int

    def shift(self, element: int) -> int:
        return (element + 1) * self.rate // 8 - element * self.rate // 8

    @property
    def scale_bits(self) -> int:
        return -(-self.rate // 8)

    def run(self, values: Tensor, window: int) -> Int32[Tensor, "tiles rate"]:
        values = values if values.dtype == torch.float64 else values.to(torch.float32)
        target = torch.round((values * (2 * UNIT)).clamp(-4080, 4080)).to(torch.int32)
        tables = {k: self._tables(k, values.device) for k in {self.rate // 8, self.scale_bits}}
        seam = self._states(target, tables, (TILE - window, 2 * window), None)[:, 0] >> self.shift(0)
        return self._pack(self._states(target, tables, (0, TILE), seam))

    def _tables(self, k_next: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``v * 2**s`` and ``v * v * 2**s + top`` of all states, ``[top, node]``."""
        value = state_values(self.states, device).to(torch.int32).reshape(2**k_next, -1) << self.scale_bits
        top = torch.arange(2**k_next, device=device, dtype=torch.int32)[:, None]
        return value, (value >> self.scale_bits) * value + top

    def _states(
        self, target: Tensor, tables: dict[int, tuple[Tensor, Tensor]], span: tuple[int, int], pinned: Tensor | None
    ) -> Int64[Tensor, "tiles elements"]:
        """The best states of ``span = (first, steps)``, round the end; ``pinned`` is the node before and behind."""
        first, steps = span
        tiles = torch.arange(len(target), device=target.device)
        cost = target.new_zeros(len(target), 2 ** (self.states - self.shift(first)))
        if pinned is not None:
            cost += self._excluded()
            cost[tiles, pinned] = 0
        elements = [(first + i) % TILE for i in range(steps)]
        survivors: list[Tensor] = []
        for element in elements:
            cost, survivor = self._step(cost, target[:, element], element, tables)
            survivors.append(survivor)
        node = self._lowest(cost) if pinned is None else pinned
        states = torch.zeros(len(target), TILE, dtype=torch.int64, device=target.device)
        for element, survivor in zip(reversed(elements), reversed(survivors), strict=True):
            top = survivor[tiles, node].to(torch.int64)
            states[:, element] = top << (self.states - self.shift(element + 1)) | node
            node = states[:, element] >> self.shift(element)
        return states

    def _step(
        self, cost: Tensor, target: Tensor, element: int, tables: dict[int, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Costs of the next nodes, and the tops of the states that survive."""
        k, k_next = self.shift(element), self.shift(element + 1)
        slope, square = tables[k_next]
        sums = torch.mul(slope, -target[:, None, None]).add_(square)  # [tiles, top, node]
        sums = sums.view(len(target), 2**k_next, -1, 2**k).add_(cost.view(len(target), 2**k_next, -1, 1))
        best = sums.amin(dim=1).flatten(1)
        below = 2**self.scale_bits - 1
        survivor = (best & below).to(torch.uint8)
        best &= ~below
        return best - best.amin(dim=1, keepdim=True), survivor

    def _excluded(self) -> int:
        """More than any path can make up for before all nodes can be reached; `trellis.h` derives it."""
        reach = (self.states - 1) // (self.rate // 8)
        return (reach * 4161600 + 1) << self.scale_bits

    @staticmethod
    def _lowest(cost: Tensor) -> Int64[Tensor, " tiles"]:
        """The first of the lowest, which `argmin` does not promise."""
        nodes = torch.arange(cost.shape[1], device=cost.device)
        return torch.where(cost == cost.amin(dim=1, keepdim=True), nodes, cost.shape[1]).amin(dim=1)

    def _pack(self, states: Int64[Tensor, "tiles elements"]) -> Int32[Tensor, "tiles rate"]:
        device = states.device
        end = ends(self.rate, device)
        bit = torch.arange(32 * self.rate, device=device)
        element = torch.searchsorted(end, bit, right=True)
        bits = (states[:, element] >> (end[element] - 1 - bit)) & 1
        word = (bits.reshape(-1, self.rate, 32) << torch.arange(31, -1, -1, device=device)).sum(dim=2)
        return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)
