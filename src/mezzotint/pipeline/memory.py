"""What a run costs, predicted from shapes: memory of the process, and floating-point work."""

from collections.abc import Sequence
from dataclasses import dataclass

from mezzotint.core.files import Entry
from mezzotint.models import Source

BASE_BYTES = 450 * 2**20  # interpreter, torch and transformers, measured on Linux
_FLOAT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Predicted costs.

    Attributes:
        peak_memory_bytes: of the process.
        stream_bytes: activations that may stay in memory; more is spilled to a file.
        keep_runs: every batch may wait inside a block, so that no prefix is computed twice.
        flops: of all forwards, statistics and roundings.
    """

    peak_memory_bytes: int
    stream_bytes: int
    keep_runs: bool
    flops: float


def estimate(source: Source, entries: Sequence[Entry], *, tokens: int, memory: int | None) -> Costs:
    """Costs of a run over that many calibration tokens (0: none needed).

    The largest block is in memory once in float32; the solver holds four squares of the widest input and three copies
    of the largest matrix; two streams of hidden states and what waits inside a block fill what ``memory`` leaves.
    """
    matrices = source.map.matrices
    blocks = [[matrices[name] for group in block.groups for name in group.matrices] for block in source.map.blocks]
    block_bytes = max(sum(m.shape[0] * m.shape[1] for m in block) for block in blocks) * _FLOAT
    quantized = [matrices[entry.matrix] for entry in entries]
    largest = max(m.shape[0] * m.shape[1] for m in quantized) * _FLOAT
    solved = [matrices[entry.matrix] for entry in entries if "gram" in entry.needs]
    widest = max((m.shape[1] for m in solved), default=0)
    solver = 4 * widest * widest * _FLOAT + 3 * largest
    hidden = source.config.get_text_config().hidden_size
    stream = 2 * tokens * hidden * _FLOAT
    inner = max(sum({m.shape[1] for m in block}) for block in blocks)
    waiting = tokens * (2 * hidden + inner) * _FLOAT
    fixed = BASE_BYTES + (block_bytes if tokens else 0) + solver
    keep_runs = memory is None or fixed + stream + waiting <= memory
    room = stream + waiting if memory is None else max(0, memory - fixed - (waiting if keep_runs else waiting // 8))
    peak = fixed + min(stream, room) + (waiting if keep_runs else waiting // 8)
    weights = sum(m.shape[0] * m.shape[1] for block in blocks for m in block)
    forward = 2 * 2 * tokens * weights
    grams = sum(2 * tokens * m.shape[1] ** 2 for m in solved) / 2
    rounding = sum(2 * m.shape[0] * m.shape[1] ** 2 for m in solved)
    return Costs(
        peak_memory_bytes=int(peak),
        stream_bytes=int(room),
        keep_runs=keep_runs,
        flops=float(forward + grams + rounding),
    )
