"""What a run costs, predicted from shapes: memory of the process, and floating-point work."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mezzotint.blockwise.batches import windows_of_batches
from mezzotint.calibration.windows import HELD_OUT_EVERY
from mezzotint.core.plans import CalibrationPlan, Entry
from mezzotint.core.precision import products_in
from mezzotint.errors import ConfigError
from mezzotint.models import Source
from mezzotint.planning.memory import BASE_BYTES, Phases, Tokens, curvature_tokens, phases, unbounded
from mezzotint.process.ranks import dealt

START_SECONDS = 2.0  # opening, planning, writing
SAMPLING_BYTES = 1.8  # the whole model and its KV cache, as a multiple of the checkpoint
_OF_DEVICE = 0.9  # of what is free on a GPU: libraries and pieces between tensors take the rest
_SAMPLING = 4  # a token sampled one by one costs so many of those that run side by side


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Predicted costs.

    Attributes:
        peak_memory_bytes: of the process.
        least_memory_bytes: the smallest limit that can be kept.
        stream_bytes: activations that may stay in memory; more is spilled to a file. None is no limit.
        keep_runs: every batch may wait inside a block, so that no prefix is computed twice.
        panels: wide squares of sums lie in files and are worked on a panel at a time.
        flops: of all forwards, statistics and roundings.
    """

    peak_memory_bytes: int
    least_memory_bytes: int
    stream_bytes: int | None
    keep_runs: bool
    panels: bool
    flops: float


def estimate(
    source: Source,
    entries: Sequence[Entry],
    *,
    calibration: CalibrationPlan | None,
    memory: int | None,
    device: str = "cpu",
    ranks: int = 1,
) -> Costs:
    """Costs of a run with that calibration, if any is needed.

    Args:
        source: the original.
        entries: what is done.
        calibration: None if nothing needs it.
        memory: bytes that each process may take; None is no limit but that of the device.
        device: that computes; sums lie in files on the CPU only. What is predicted lies in the memory of a GPU, but for
            what Python and its packages take, so what is free there is a limit too.
        ranks: processes that share the work.

    Raises:
        ConfigError: it cannot be done in so little memory; says in how much it can.
    """
    tokens = None if calibration is None else _largest_share(calibration, ranks)
    found = phases(source, entries, tokens)
    sampled = calibration is not None and calibration.source == "self"
    sampling = BASE_BYTES + int(_stored(source) * SAMPLING_BYTES) if sampled else 0
    filed = phases(source, entries, tokens, panels=device == "cpu")
    least, panels = _least(filed), False
    whole = max(phase.peak(phase.spilled, keep_runs=True) for phase in found)
    room, keep_runs, peak = None, True, unbounded(whole)
    limit = _limit(memory, device)
    if limit is not None:
        most, name = limit
        _check(most, name, least, sampling)
        panels = most < _least(found)
        found = filed if panels else found
        keep_runs = max(phase.peak(0, keep_runs=True) for phase in found) <= most
        room = min(most - phase.peak(0, keep_runs=keep_runs) for phase in found)
        peak = max(phase.peak(room, keep_runs=keep_runs) for phase in found)
    return Costs(
        peak_memory_bytes=max(peak, sampling),
        least_memory_bytes=max(least, sampling),
        stream_bytes=room,
        keep_runs=keep_runs,
        panels=panels,
        flops=_flops(source, entries, tokens, sampled=sampled, ranks=ranks),
    )


def _least(found: Iterable[Phases]) -> int:
    """Memory in which it can be done."""
    return max(phase.peak(0, keep_runs=False) for phase in found)


def _largest_share(calibration: CalibrationPlan, ranks: int) -> Tokens:
    """The tokens of the rank that has the most, at least a batch."""
    seqlen, held_out = calibration.seqlen, max(1, calibration.samples // HELD_OUT_EVERY)
    sizes = [size for part in (calibration.samples - held_out, held_out) for size in windows_of_batches(part, seqlen)]
    return Tokens(total=max(sum(sizes[i] for i in hand) for hand in dealt(sizes, ranks)) * seqlen, seqlen=seqlen)


def _limit(memory: int | None, device: str) -> tuple[int, str] | None:
    """The smaller limit of what was asked for and what is free on a GPU, and what it is called."""
    limits = [] if memory is None else [(memory, f"--memory is {memory / 2**20:.0f}MiB")]
    free = free_device_bytes(device)
    if free is not None:
        room = BASE_BYTES + int(_OF_DEVICE * free)
        limits.append((room, f"the GPU has {free / 2**20:.0f}MiB free, enough for {room / 2**20:.0f}MiB in all"))
    return min(limits, default=None)


def free_device_bytes(device: str) -> int | None:
    """What is free on a GPU now; None without one."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else None


def _check(memory: int, name: str, least: int, sampling: int) -> None:
    """Refuse what cannot be promised."""
    if memory >= max(least, sampling):
        return
    # rounded up, so that what is asked for by this message is enough
    needed = f"{-(-max(least, sampling) // 2**20)}MiB"
    other = (
        f", or text with --calibration FILE: sampling it from the model needs the whole model, without it "
        f"{-(-least // 2**20)}MiB are enough"
        if sampling
        else ", or fewer tokens with --samples and --seqlen"
    )
    raise ConfigError(f"{name}; this plan needs at least {needed}. Give that much{other}.")


def _stored(source: Source) -> int:
    return sum(tensor.nbytes for tensor in source.checkpoint.tensors.values())


def _flops(source: Source, entries: Sequence[Entry], given: Tokens | None, *, sampled: bool, ranks: int) -> float:
    matrices = source.map.matrices
    tokens = 0 if given is None else given.total
    backward = 0 if given is None else curvature_tokens(entries, given)
    weights = sum(
        matrices[name].shape[0] * matrices[name].shape[1]
        for block in source.map.blocks
        for group in block.groups
        for name in group.matrices
    )
    solved = [matrices[entry.matrix] for entry in entries if "gram" in entry.needs]
    both = any("drift" in entry.needs for entry in entries)
    forward = 2 * tokens * weights * (1 + both + _SAMPLING * sampled)
    grams = sum(2 * tokens * m.shape[1] ** 2 for m in solved) / 2
    rounding = sum(2 * m.shape[0] * m.shape[1] ** 2 for m in solved)
    # forward, and forward and backward again, without gradients of weights
    curvature = 6 * backward * weights
    return float(forward + grams + rounding / ranks + curvature)


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
