"""All grids, with their error on Gaussian weights, stored bits and decoding speed."""

import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch

from mezzotint.core.contracts import Grid
from mezzotint.formats import exl3
from mezzotint.formats.engine_rules import ANY, engines
from mezzotint.grids.gguf.types import BLOCK_TYPES
from mezzotint.grids.trellis import RATES, TrellisGrid, measured
from mezzotint.registry import GRIDS

SHAPE = (4096, 4096)  # of the matrix whose side data is counted
_SIDE = 1024  # of the Gaussian matrix that is measured
_PIECE = 128  # rows of it that the large trellis is measured on
_HOLDS = {"gguf": lambda grid: grid.kind == "gguf", "exl3": exl3.holds}  # other formats without a table: everything


@dataclass(frozen=True, slots=True, kw_only=True)
class Colour:
    """One member of the palette.

    Attributes:
        name: kind and bits, as in ``trellis-3.25``.
        aliases: what papers call a grid that this one covers.
        bits: of a code, per weight.
        bits_with_side_data: of a 4096 x 4096 matrix, one group or scale a row.
        distortion: mean squared error on Gaussian weights of unit variance.
        decode_rate: weights a second on this machine.
        engines: that load it.
    """

    name: str
    kind: str
    aliases: tuple[str, ...]
    bits: float
    bits_with_side_data: float
    distortion: float
    decode_rate: float
    engines: tuple[str, ...]

    @property
    def ratio_to_bound(self) -> float:
        """Distortion over ``2^(-2 bits)``, the least that any code of that rate can have."""
        return self.distortion * 4.0**self.bits


def palette(*, measure: bool = False) -> Iterator[Colour]:
    """Every grid, by kind and bits.

    Args:
        measure: repeat the measurement of every distortion, which takes minutes, instead of reading the committed one.
    """
    weights = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(1))
    for name, grid in members():
        resolved = grid.resolve((_SIDE, _SIDE), torch.float16)
        rows = weights[:_PIECE] if isinstance(grid, TrellisGrid) and grid.states == 16 else weights
        stored = grid.resolve(SHAPE, torch.float16).stored_bits(SHAPE)
        yield Colour(
            name=name,
            kind=grid.kind,
            aliases=tuple(_aliases(grid)),
            bits=float(grid.bits),
            bits_with_side_data=stored.total / (SHAPE[0] * SHAPE[1]),
            distortion=gaussian_distortion(resolved, rows) if measure else _committed(name, grid),
            decode_rate=_decode_rate(resolved, weights),
            engines=tuple(name for name in engines() if name not in ("dense", ANY) and _loads(name, grid)),
        )


def members() -> Iterator[tuple[str, Grid]]:
    """Names and grids: one scale a row, or a matrix for the trellis; the blocks of GGUF have their own.

    Scales are those of the least squared error, which is what they are measured by.
    """
    for bits in range(2, 9):
        yield f"uniform-{bits}", GRIDS["uniform"](bits=bits, group_size=None, range="error", range_power=2.0)
    for bits in range(2, 9):
        yield f"lookup-{bits}", GRIDS["lookup"](bits=bits, group_size=None, range="error")
    for half in range(3, 13):
        yield f"vector-{half / 2:g}", GRIDS["vector"](bits=half / 2, group_size=None, range="error")
    for name in BLOCK_TYPES:
        yield f"gguf-{name.lower()}", GRIDS["gguf"](type=name, range="error")
    yield "nf4", GRIDS["lookup"](bits=4, table="nf4", group_size=None, range="error")
    for states in (12, 16):
        for rate in RATES:
            suffix = "" if states == 12 else "-best"
            yield f"trellis-{rate / 8:g}{suffix}", TrellisGrid(bits=rate / 8, states=states)


def gaussian_distortion(grid: Grid, weights: torch.Tensor) -> float:
    """Mean squared error of fitting and encoding ``[out, in]`` standard normal weights."""
    fitted = grid.fit(weights, None)
    return float((fitted.decode(fitted.encode(weights)) - weights).square().mean())


@cache
def _table() -> dict[str, float]:
    text = files("mezzotint.jobs").joinpath("palette.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["distortion"]


def _committed(name: str, grid: Grid) -> float:
    if isinstance(grid, TrellisGrid):
        return measured(grid.states)[grid.rate].distortion
    return _table()[name]


def _decode_rate(grid: Grid, weights: torch.Tensor) -> float:
    rows = weights[:_PIECE]
    fitted = grid.fit(rows, None)
    # speed does not depend on what is decoded, and encoding with many states takes long
    code = fitted.new_code().zero_()
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        fitted.decode(code)
        best = min(best, time.perf_counter() - started)
    return rows.numel() / best


def _aliases(grid: Grid) -> Iterator[str]:
    """Q-Palette's members (arXiv 2509.20214, table of quantizers) that a trellis of the same rate replaces."""
    if isinstance(grid, TrellisGrid) and grid.states == 16:
        if grid.rate % 4 == 0 and 12 <= grid.rate <= 40:
            yield f"tcq-{grid.bits:g}"
        elif grid.rate % 4 == 2 and 14 <= grid.rate <= 38:
            yield f"half-tcq-{grid.bits:g}"
        if grid.rate % 8 == 0:
            yield f"exl3-{grid.bits:g}"


def _loads(engine: str, grid: Grid) -> bool:
    """Whether one of the engine's packed formats holds the grid, and the engine loads it from there."""
    found = engines()[engine]
    for form in found.formats:
        loads = found.loads.get(form)
        if loads is None and form != "dense" and _HOLDS.get(form, lambda _: True)(grid):
            return True
        if loads is not None and grid.kind == "uniform" and grid.bits in loads.bits:
            return True
    return False
