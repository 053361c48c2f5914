"""The two streams of hidden states, full precision and quantized, batch by batch through the model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mezzotint.blockwise.batches import Batch, batches_of
from mezzotint.blockwise.bypass import Passage, surroundings
from mezzotint.blockwise.stops import BlockRun, GroupInputs, Inputs
from mezzotint.calibration import Windows
from mezzotint.core.precision import RoundedLinears, products_in
from mezzotint.core.statistics import Accumulator, Statistics
from mezzotint.core.structure import Matrix
from mezzotint.errors import NonFiniteError
from mezzotint.kernels import multiplies_bfloat16
from mezzotint.models import Source
from mezzotint.process.ranks import ALONE, Ranks, dealt
from mezzotint.storage.saved import Index, Saved, save
from mezzotint.storage.scratch import Scratch
from mezzotint.storage.stores import Budget, Shelf, Store


def summed(ranks: Ranks, sums: Accumulator) -> Statistics:
    """What all ranks have summed, each over its own batches."""
    (sums.tokens,) = ranks.total(sums.tokens)
    ranks.add_(sums.tensors_())
    return sums.finish()


def _rows(saved: Saved, name: str, batch: Batch) -> Tensor:
    """Saved hidden states of a batch."""
    return torch.stack([saved.read(f"{name}.{batch.first + row}") for row in range(len(batch.tokens))])


def _state(saved: Saved, name: str, batch: Batch) -> dict[str, Tensor]:
    """Saved values of a batch that blocks hand on beside the hidden states."""
    first = f"{name}.{batch.first}/"
    kept = [key.removeprefix(first) for key in saved.names if key.startswith(first)]
    rows = [f"{name}.{batch.first + row}/" for row in range(len(batch.tokens))]
    return {key: torch.cat([saved.read(row + key) for row in rows]) for key in kept}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What streams may take, and how they compute.

    Attributes:
        folder: where hidden states and sums are spilled.
        stream_bytes: of hidden states that may stay in memory; None is no limit.
        keep_runs: batches may wait inside a block.
        panels: wide squares of sums lie in files.
        device: where blocks run.
        dtype: of hidden states.
        precision: of matrix products in blocks and sums, see `products_in`.
    """

    folder: Path
    stream_bytes: int | None = None
    keep_runs: bool = True
    panels: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    precision: str = "float32"


class Streams:
    """Both streams over the batches of this rank.

    The full-precision stream of the windows that statistics are fitted on is carried only where something needs it
    (``drift``); that of the held-out windows always, for the block errors.

    Args:
        source: the original.
        fit: windows for statistics.
        held_out: windows for errors and decisions.
        resources: memory, files and device.
        original_fit: carry the full-precision stream of the fit windows too.
        saved: hidden states to start from, of an earlier `save` on every rank; None starts from the tokens.
        ranks: that share the batches.

    Attributes:
        batches: of this rank.
        fitted: number of windows that statistics are fitted on, of all ranks; those that are held out follow.
        ranks: that have the others.
        storage: makes room for wide squares of sums; None is in memory.
        factors: of the products that drift and residual are summed from: bfloat16 where that is the precision and the
            processor gains by it (twice as fast as factors that torch rounds for each product).
    """

    def __init__(
        self,
        source: Source,
        fit: Windows,
        held_out: Windows,
        resources: Resources,
        *,
        original_fit: bool,
        saved: Saved | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        folder, device, dtype = resources.folder, resources.device, resources.dtype
        self.dtype = dtype
        self.ranks = ranks
        self.storage = partial(Scratch, folder, "sums") if resources.panels else None
        self._precision = resources.precision
        gains = torch.device(device).type == "cpu" and dtype == torch.float32 and multiplies_bfloat16()
        self.factors = torch.bfloat16 if resources.precision == "bfloat16" and gains else None
        self.fitted = len(fit)
        whole = [*batches_of(fit, False), *batches_of(held_out, True, len(fit))]
        own = dealt([len(batch.tokens) for batch in whole], ranks.size)[ranks.number]
        self.batches = [whole[index] for index in own]
        self._source = source
        self._keep_runs = resources.keep_runs
        self._device = device
        budget = Budget(resources.stream_bytes)
        self._quantized = Store(budget, folder)
        self._original = Store(budget, folder)
        self._carried = [i for i, batch in enumerate(self.batches) if batch.held_out or original_fit]
        self._passages: list[dict[str, Passage]] = []
        self._shelf = Shelf(budget, folder)
        self._seen: dict[tuple[int, int], dict[int | None, dict[str, int]]] = {}
        try:
            self._start(dtype, saved)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def products(self) -> Iterator[None]:
        """To be entered while blocks run and inputs are summed; what is solved meanwhile keeps full precision."""
        with products_in(self._precision), nullcontext() if self.factors is None else RoundedLinears():
            yield

    def _start(self, dtype: torch.dtype, saved: Saved | None) -> None:
        """Embed the tokens of every batch, and keep what blocks are called with."""
        with surroundings(self._source, head=False, dtype=dtype, device=self._device) as bypass:
            for index, batch in enumerate(self.batches):
                mask = None if batch.mask is None else batch.mask.to(self._device)
                hidden, calls = bypass.record(batch.tokens.to(self._device), mask)
                self._passages.append({})
                for name, store in self._stores(index):
                    passage = self._passages[index][name] = Passage(calls, self._shelf)
                    store.put(index, hidden if saved is None else _rows(saved, name, batch).to(hidden))
                    if saved is not None:
                        passage.begin({key: v.to(hidden.device) for key, v in _state(saved, name, batch).items()})

    def save(self, path: Path) -> Index:
        """Write the hidden states of every window to a file, for ``saved``.

        Raises:
            WriteError: the disk is full.
        """
        return save(path, self._named())

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for index, batch in enumerate(self.batches):
            for name, store in self._stores(index):
                for row, hidden in enumerate(store.get(index)):
                    yield f"{name}.{batch.first + row}", hidden
                for key, value in self._passages[index][name].state().items():
                    for row, piece in enumerate(value.chunk(len(batch.tokens))):
                        yield f"{name}.{batch.first + row}/{key}", piece.contiguous()

    def _stores(self, index: int) -> list[tuple[str, Store]]:
        """The streams of a batch."""
        original = [("original", self._original)] if index in self._carried else []
        return [("quantized", self._quantized), *original]

    def embed(self, matrix: Matrix, table: Float[Tensor, "vocabulary width"]) -> None:
        """Begin the quantized stream again with other embeddings; what else blocks are called with stays."""
        with surroundings(self._source, head=False, dtype=self.dtype, device=self._device) as bypass:
            matrix.view(self._source.skeleton.get_parameter(matrix.parameter).data).copy_(table)
            for index, batch in enumerate(self.batches):
                mask = None if batch.mask is None else batch.mask.to(self._device)
                self._quantized.put(index, bypass.record(batch.tokens.to(self._device), mask)[0])

    def run_original(self, block: int, module: nn.Module, wanted: Mapping[int, frozenset[str]]) -> None:
        """Advance the full-precision stream through the block, whose weights are still the original ones.

        Args:
            block: its index.
            module: the block.
            wanted: groups whose inputs are kept for `original_inputs`, with the statistics they are for.
        """
        for index in self._carried:
            hidden = self._original.get(index)
            run = BlockRun(module, block, lambda hidden=hidden: hidden, self._passages[index]["original"])
            for group, needs in wanted.items():
                self._keep_inputs(index, group, run.reach(group), stream="residual" in needs)
            output = run.finish()
            if not torch.isfinite(output).all():
                raise NonFiniteError(
                    f"block {block} of the original gives NaN or infinity on the calibration text in {self.dtype}; "
                    "check the original with `mezzotint evaluate`."
                )
            self._original.put(index, output)

    def original_inputs(self, batch: int, group: int, *, last: bool) -> dict[int | None, Inputs]:
        """What the full-precision stream put into a group; forgotten when it is given for the last time."""
        kept = self._seen.pop((batch, group)) if last else self._seen[batch, group]
        give = self._shelf.release if last else self._shelf.held
        return {expert: Inputs(**{name: give(key) for name, key in keys.items()}) for expert, keys in kept.items()}

    def forget_inputs(self) -> None:
        """Forget what `original_inputs` has not given for the last time."""
        for kept in self._seen.values():
            for key in (key for keys in kept.values() for key in keys.values()):
                self._shelf.release(key)
        self._seen.clear()

    def _keep_inputs(self, batch: int, group: int, inputs: GroupInputs, *, stream: bool) -> None:
        kept = self._seen[batch, group] = {}
        for expert, value in inputs.items():
            parts = {"values": value.values, "tokens": value.tokens, "stream": value.stream if stream else None}
            kept[expert] = {name: self.hold(part) for name, part in parts.items() if part is not None}

    def hold(self, value: Tensor) -> int:
        """Keep a tensor, in memory or spilled like the streams; gives its key."""
        return self._shelf.hold(value)

    def held(self, key: int) -> Tensor:
        """A tensor that is kept."""
        return self._shelf.held(key)

    def release(self, key: int) -> None:
        """Forget a tensor that is kept."""
        self._shelf.release(key)

    def quantized_runs(self, block: int, module: nn.Module) -> list[BlockRun]:
        """One run for each batch on the quantized stream, not yet started."""
        return [
            BlockRun(
                module,
                block,
                lambda i=i: self._quantized.get(i),
                self._passages[i]["quantized"],
                keep=self._keep_runs,
            )
            for i in range(len(self.batches))
        ]

    def finish_quantized(self, runs: Sequence[BlockRun]) -> tuple[float, float]:
        """Advance the quantized stream; gives mean squared error and signal on the held-out windows."""
        error = signal = count = 0.0
        for index, (batch, run) in enumerate(zip(self.batches, runs, strict=True)):
            output = run.finish()
            self._quantized.put(index, output)
            if not batch.held_out:
                continue
            reference = self._original.get(index)
            real = slice(None) if batch.mask is None else batch.mask.to(output.device)
            error += float((output - reference)[real].double().square().sum())
            signal += float(reference[real].double().square().sum())
            count += reference[real].numel()
        error, signal, count = self.ranks.total(error, signal, count)
        return error / count, signal / count

    def head_statistics(self, needs: frozenset[str]) -> tuple[Statistics, Statistics]:
        """Statistics of the head's input; its output is added to no stream."""
        head = self._source.map.head
        assert head is not None
        width, kept = self._source.map.matrices[head].shape[1], needs - {"residual"}
        sums = [
            Accumulator(width, kept, device=self._device, storage=self.storage, factors=self.factors)
            for _ in (False, True)
        ]
        with surroundings(self._source, head=False, dtype=self.dtype, device=self._device) as bypass, torch.no_grad():
            for index, batch in enumerate(self.batches):
                tokens = batch.tokens.to(self._device)
                hidden = bypass.head_input(tokens, self._quantized.get(index)).flatten(0, -2)
                original = None
                if "drift" in needs:
                    original = bypass.head_input(tokens, self._original.get(index)).flatten(0, -2)
                weights = None if batch.mask is None else batch.mask.flatten().to(hidden)
                sums[batch.held_out].add(hidden, original=original, weights=weights)
        fit, held_out = (summed(self.ranks, one) for one in sums)
        return fit, held_out

    def close(self) -> None:
        """Free memory and files."""
        for store in (self._quantized, self._original, self._shelf):
            store.close()
