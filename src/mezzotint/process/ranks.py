"""The processes that share a run, started by ``torchrun``: what each does, and how they tell each other.

Calibration windows and the rows of matrices are divided; statistics are summed, rows are joined, and the first rank
writes. A single process is a world of one, in which all of this does nothing.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from mezzotint.core.dtypes import SAFETENSORS_DTYPES, SAFETENSORS_NAMES
from mezzotint.errors import ConfigError, RankError

TIMEOUT = timedelta(hours=1)  # of one exchange; the first rank may meanwhile sample text or copy tensors


class Ranks:
    """The processes of a run.

    What is exchanged must be asked for by all of them in the same order.

    Attributes:
        number: of this process, from 0.
        size: how many there are.
    """

    def __init__(self, number: int = 0, size: int = 1) -> None:
        self.number = number
        self.size = size

    @property
    def first(self) -> bool:
        """This process writes and reports."""
        return self.number == 0

    @contextmanager
    def led(self) -> Iterator[None]:
        """All ranks do it at once; where the first one fails, the others keep quiet about their own failures.

        Raises:
            RankError: on the others, where the first has failed.
        """
        try:
            yield
        except BaseException as error:
            # a rank that is interrupted waits for nobody
            stopped = (self.first or isinstance(error, Exception)) and not self.told(False)
            if stopped and not self.first:
                raise RankError("rank 0 has stopped. Its message says why.") from error
            raise
        if not self.told(True):
            raise RankError("rank 0 has stopped. Its message says why.")

    def told(self, value: Any) -> Any:
        """What the first rank has, a value of JSON."""
        if self.size == 1:
            return value
        data = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(data)])
        with self.exchanging():
            distributed.broadcast(size, 0)
            text = _bytes_of(data) if self.first else torch.empty(int(size), dtype=torch.uint8)
            distributed.broadcast(text, 0)
        return json.loads(bytes(text.numpy()))

    def each(self, value: Any) -> list[Any]:
        """What every rank has, values of JSON in the order of the ranks."""
        if self.size == 1:
            return [value]
        data = self.joined(_bytes_of(json.dumps(value).encode() + b"\n"))
        return [json.loads(line) for line in bytes(data.numpy()).splitlines()]

    def given(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Tensors of the first rank, by name, in main memory; the others give None."""
        held = {name: value.cpu().contiguous() for name, value in (tensors or {}).items()}
        if self.size == 1:
            return held
        specs = self.told([[name, SAFETENSORS_NAMES[t.dtype], list(t.shape)] for name, t in held.items()])
        for name, kind, shape in specs:
            if not self.first:
                held[name] = torch.empty(shape, dtype=SAFETENSORS_DTYPES[kind])
            with self.exchanging():
                distributed.broadcast(_as_bytes(held[name]), 0)
        return held

    def add_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over the ranks, the same bytes on all of them."""
        if self.size > 1:
            for value in tensors:
                with self.exchanging():
                    distributed.all_reduce(value)

    def total(self, *values: float) -> tuple[float, ...]:
        """Sums of numbers over the ranks, in their order: the same on all of them."""
        if self.size == 1:
            return values
        found = [torch.empty(len(values), dtype=torch.float64) for _ in range(self.size)]
        with self.exchanging():
            distributed.all_gather(found, torch.tensor(values, dtype=torch.float64))
        return tuple(sum(column) for column in zip(*(row.tolist() for row in found), strict=True))

    def joined(self, part: Tensor, axis: int = 0) -> Tensor:
        """What the ranks have one behind another on an axis, in their order."""
        if self.size == 1:
            return part
        mine = part.movedim(axis, 0).contiguous()
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        with self.exchanging():
            distributed.all_gather(lengths, torch.tensor([len(mine)]))
            longest = max(int(length) for length in lengths)
            padded = mine.new_zeros((longest, *mine.shape[1:]))
            padded[: len(mine)] = mine
            found = [torch.empty_like(padded) for _ in range(self.size)]
            # as bytes: gloo does not know every type
            distributed.all_gather([_as_bytes(value) for value in found], _as_bytes(padded))
        pieces = [value[: int(length)] for value, length in zip(found, lengths, strict=True)]
        return torch.cat(pieces).movedim(0, axis).contiguous()

    def share(self, rows: int, unit: int) -> "Share":
        """This rank's rows of a matrix, whole units of them; all of them where there are fewer units than ranks."""
        units = -(-rows // unit)
        if self.size == 1 or units < self.size:
            return WHOLE
        first, last = (units * number // self.size * unit for number in (self.number, self.number + 1))
        # the last share is open: a matrix that is padded to whole units has more rows
        return Share(slice(first, None if self.number == self.size - 1 else last), self)

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Where processes wait for each other.

        Raises:
            RankError: the others do not answer.
        """
        try:
            yield
        except RuntimeError as error:  # of torch, for whatever goes wrong between processes
            raise RankError(
                f"rank {self.number} of {self.size} got no answer from the others ({str(error).splitlines()[0]}). One "
                f"of them has failed (then its message says why), was killed, or took too long. "
                "Run the same command with --resume; the number of ranks may be another one."
            ) from error


ALONE = Ranks()


class Share(NamedTuple):
    """Rows of a matrix that one rank works on.

    Attributes:
        rows: which.
        ranks: that have the other rows; of one process if this rank has them all.
    """

    rows: slice
    ranks: Ranks


WHOLE = Share(slice(None), ALONE)


def dealt(sizes: Sequence[int], hands: int) -> tuple[tuple[int, ...], ...]:
    """Divide things of these sizes evenly: their numbers, in order, for every hand.

    The largest first, each to the hand that has least.

    Example:
        >>> dealt([8, 8, 8, 4, 4], 2)
        ((0, 2), (1, 3, 4))
    """
    held: list[list[int]] = [[] for _ in range(hands)]
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        min(held, key=lambda hand: sum(sizes[i] for i in hand)).append(index)
    return tuple(tuple(sorted(hand)) for hand in held)


def world_size() -> int:
    """How many processes ``torchrun`` has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def ranks_of(device: str, patience: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """The processes that ``torchrun`` has started, connected: by gloo, and by nccl where they work on GPUs.

    Args:
        device: ``cpu`` or ``cuda``; with that, each process of a host gets a GPU of its own.
        patience: how long they wait for each other.

    Raises:
        ConfigError: a host has fewer GPUs than processes.
        RankError: they do not find each other.
    """
    if world_size() == 1:
        yield ALONE
        return
    if device == "cuda":
        own, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= count:
            raise ConfigError(
                f"this host has {count} GPUs, and process {own} of it has none left. Start torchrun with "
                f"--nproc-per-node {count}."
            )
        torch.cuda.set_device(own)
    ranks = Ranks(int(os.environ["RANK"]), world_size())
    given = distributed.is_initialized()
    if not given:
        with ranks.exchanging():
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=patience)
    yield ranks
    if not given:
        distributed.destroy_process_group()


def _as_bytes(value: Tensor) -> Tensor:
    """A view of a contiguous tensor."""
    return value.flatten().view(torch.uint8)


def _bytes_of(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
