"""What a run costs, predicted from shapes: memory of the process, and floating-point work."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mezzotint.core.files import Entry
from mezzotint.core.precision import products_in
from mezzotint.models import Source

BASE_BYTES = 520 * 2**20  # interpreter, torch and transformers, measured on Linux
START_SECONDS = 2.0  # opening, planning, writing
SAMPLING_BYTES = 1.8  # the whole model and its KV cache, as a multiple of the checkpoint
LOGIT_BYTES = 256 * 2**20  # of logits and what is computed from them, at a time
BATCH_TOKENS = 4096  # that run through a block together
_FLOAT = 4
_BATCH_COPIES = 4  # temporaries of a block's forward, in units of its widest activations
_FRAGMENTED = 1.4  # what the allocator holds over what is in use, measured on SmolLM2
_SLOPE_COPIES = 12  # of a batch's activations while a member is relaxed
_SAMPLING = 4  # a token sampled one by one costs so many of those that run side by side


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPlan:
    """Calibration as it will be run."""

    source: str
    samples: int
    seqlen: int

    @property
    def tokens(self) -> int:
        """In all windows, held-out ones included."""
        return self.samples * self.seqlen


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


def estimate(
    source: Source, entries: Sequence[Entry], *, calibration: CalibrationPlan | None, memory: int | None
) -> Costs:
    """Costs of a run with that calibration, if any is needed.

    The largest block is in memory once in float32; the solver holds four squares of the widest input and three copies
    of the largest matrix; two streams of hidden states and what waits inside a block fill what ``memory`` leaves.
    """
    tokens = 0 if calibration is None else calibration.tokens
    matrices = source.map.matrices
    blocks = [[matrices[name] for group in block.groups for name in group.matrices] for block in source.map.blocks]
    block_bytes = max(sum(m.shape[0] * m.shape[1] for m in block) for block in blocks) * _FLOAT
    quantized = [matrices[entry.matrix] for entry in entries]
    largest = max(m.shape[0] * m.shape[1] for m in quantized) * _FLOAT
    solved = [matrices[entry.matrix] for entry in entries if "gram" in entry.needs]
    widest = max((m.shape[1] for m in solved), default=0)
    solver = 4 * widest * widest * _FLOAT + 3 * largest
    if any(entry.submodules is not None for entry in entries):
        # originals, aims and values of the members of a part, and the vectors of conjugate gradients
        solver += 2 * block_bytes + 5 * largest + _SLOPE_COPIES * BATCH_TOKENS * widest * _FLOAT
    hidden = source.config.get_text_config().hidden_size
    stream = 2 * tokens * hidden * _FLOAT
    inner = max(sum({m.shape[1] for m in block}) for block in blocks)
    both = any("drift" in entry.needs for entry in entries)
    waiting = tokens * (2 * hidden + inner) * _FLOAT * (1 + both)
    embedding = math.prod(matrices[source.map.embedding].shape) * _FLOAT
    running = max(embedding, block_bytes + _BATCH_COPIES * BATCH_TOKENS * inner * _FLOAT) if tokens else 0
    fixed = BASE_BYTES + running + solver
    keep_runs = memory is None or fixed + stream + waiting <= memory
    room = stream + waiting if memory is None else max(0, memory - fixed - (waiting if keep_runs else waiting // 8))
    peak = fixed + _FRAGMENTED * (min(stream, room) + (waiting if keep_runs else waiting // 8))
    weights = sum(m.shape[0] * m.shape[1] for block in blocks for m in block)
    sampled = calibration is not None and calibration.source == "self"
    if sampled:
        peak = max(peak, BASE_BYTES + sum(t.nbytes for t in source.checkpoint.tensors.values()) * SAMPLING_BYTES)
    forward = 2 * tokens * weights * (1 + both + _SAMPLING * sampled)
    grams = sum(2 * tokens * m.shape[1] ** 2 for m in solved) / 2
    rounding = sum(2 * m.shape[0] * m.shape[1] ** 2 for m in solved)
    return Costs(
        peak_memory_bytes=int(peak),
        stream_bytes=int(room),
        keep_runs=keep_runs,
        flops=float(forward + grams + rounding),
    )


def flops_per_second(device: str, precision: str) -> float:
    """Speed of a float32 matrix product, computed in this precision, on this machine now."""
    square = torch.ones(768, 768, device=device)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        with products_in(precision):
            float((square @ square)[0, 0])
        best = max(best, 2 * 768**3 / (time.perf_counter() - started))
    return best
