"""Sensitivities by measurement: add noise to one matrix after the other, and measure the loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mezzotint.blockwise.borders import Borders, counted
from mezzotint.blockwise.bypass import Bypass, surroundings
from mezzotint.calibration import Windows
from mezzotint.errors import ConfigError
from mezzotint.evaluation import Divergence
from mezzotint.models import Source
from mezzotint.storage.stores import Store, temporary_stores


def noise_insertion(
    source: Source,
    windows: Windows,
    matrices: Sequence[str],
    *,
    energy: float,
    seed: int = 0,
    device: str = "cpu",
    memory: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Mapping[str, float]:
    """KL(original || changed) over ``energy`` in nats per token, for Gaussian noise in one matrix at a time.

    The definition of what `measure_sensitivity` predicts as ``fisher`` (HIGGS, arXiv 2411.17525), at the price of a
    forward pass a matrix, from its block to the end. The noise has ``|dW|^2 = energy |W|^2`` exactly.

    Args:
        source: the original.
        windows: text.
        matrices: names in the map.
        energy: relative, ``e``; small enough for the loss to grow in proportion, large enough to be seen.
        seed: of the noise.
        device: where blocks run.
        memory: bytes of hidden states that may be held; more is spilled.
        dtype: in which everything runs.
        progress: told of steps done, and of how many there are.

    Raises:
        ConfigError: there is no matrix of a name.
    """
    for name in matrices:
        if name not in source.map.matrices:
            raise ConfigError(f"{source.folder.name!r} has no matrix {name!r}. Give names that its plan shows.")
    step = counted(progress, len(source.map.blocks) + len(matrices))
    found: dict[str, float] = {}
    with temporary_stores(2, memory) as (store, changed, shelf), torch.no_grad():
        borders = Borders(source, windows, store=store, shelf=shelf, device=device, dtype=dtype, step=step)
        with surroundings(source, head=True, dtype=dtype, device=device) as bypass:
            for name in matrices:
                found[name] = _divergence(_Noise(borders, name, energy, seed), bypass, changed) / energy
                step()
    return found


class _Noise:
    """Noise in one matrix.

    Args:
        borders: the original's.
        name: of the matrix.
        energy: relative.
        seed: of the noise.
    """

    def __init__(self, borders: Borders, name: str, energy: float, seed: int) -> None:
        self.borders = borders
        places = {m: b.index for b in borders.source.map.blocks for group in b.groups for m in group.matrices}
        structure = borders.source.map
        self._matrix = structure.matrices[name]
        self._energy = energy
        self._seed = seed
        self._block = places.get(name)
        tied = structure.head is not None and structure.matrices[structure.head].tied_to is not None
        self.in_head = name == structure.head or (tied and name == structure.embedding)
        self._in_embedding = name == structure.embedding or (tied and name == structure.head)
        self._table: Tensor | None = None

    def outputs(self, bypass: Bypass, store: Store) -> None:
        """The last block's output of every window, with the noise where it lies before that."""
        borders = self.borders
        for window in range(len(borders)):
            store.put(window, self._first(bypass, window))
        first = borders.last if self.in_head and not self._in_embedding else self._block or 0
        passages = [borders.passage(window, first) for window in range(len(borders))]
        for block in borders.source.map.blocks[first:]:
            with borders.filled(block) as module, self._inserted(block.index == self._block):
                for window, passage in enumerate(passages):
                    store.put(window, passage.through(module, block.index, store.get(window)))
        for passage in passages:
            passage.close()

    def _first(self, bypass: Bypass, window: int) -> Tensor:
        """States from which on they are not the original's."""
        borders = self.borders
        if not self._in_embedding:
            return borders.get(borders.last if self._block is None else self._block, window)
        embedding = borders.source.map.matrices[borders.source.map.embedding]
        with self._swapped(borders.source.skeleton.get_parameter(embedding.parameter)):
            return bypass.record(borders.tokens(window), borders.mask(window))[0]

    @contextmanager
    def head(self) -> Iterator[None]:
        """While the head is the changed one, if it is."""
        if not self.in_head:
            yield
            return
        structure = self.borders.source.map
        assert structure.head is not None
        with self._swapped(self.borders.source.skeleton.get_parameter(structure.matrices[structure.head].parameter)):
            yield

    @contextmanager
    def _inserted(self, here: bool) -> Iterator[None]:
        """Noise in the block that is in memory, if it is the one."""
        if here:
            parameter = self.borders.source.skeleton.get_parameter(self._matrix.parameter)
            weight = self._matrix.view(parameter.data)
            weight.copy_(self._noisy(weight))
        yield

    @contextmanager
    def _swapped(self, parameter: nn.Parameter) -> Iterator[None]:
        """The changed head or embedding in the place of the original, for a while."""
        original = parameter.data
        if self._table is None:
            self._table = self._noisy(original)  # once: this goes on and off for every piece of a window
        parameter.data = self._table
        try:
            yield
        finally:
            parameter.data = original

    def _noisy(self, weight: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        size = self._energy**0.5 * weight.double().norm() / noise.norm()
        return (weight.double() + size * noise).to(weight.dtype)


def _divergence(noise: _Noise, bypass: Bypass, store: Store) -> float:
    borders = noise.borders
    noise.outputs(bypass, store)
    divergence = Divergence(reference=True)
    for window in range(len(borders)):
        tokens = borders.tokens(window)
        for positions in borders.scored(window):
            reference = bypass.logits(tokens, borders.get(borders.last, window), positions)[0]
            with noise.head():
                logits = bypass.logits(tokens, store.get(window), positions)[0]
            divergence.add(logits, tokens[0, positions + 1], reference)
        divergence.end_window()
    kl = divergence.result(seqlen=borders.tokens(0).shape[1]).kl_nats
    assert kl is not None
    return kl
