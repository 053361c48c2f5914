"""The curvature of the loss in every matrix's outputs, measured before the sweep begins."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.blockwise.backward import Backward
from mezzotint.blockwise.borders import Borders, counted
from mezzotint.calibration import Windows
from mezzotint.core.contracts import Block, Matrix
from mezzotint.core.curvature import Curvature
from mezzotint.core.plans import Entry
from mezzotint.core.precision import products_in
from mezzotint.models import Source
from mezzotint.planning.planned import Planned
from mezzotint.storage.saved import Saved
from mezzotint.storage.stores import temporary_stores


def measure_curvature(
    source: Source,
    entries: Sequence[Entry],
    windows: Windows,
    *,
    device: str = "cpu",
    memory: int | None = None,
    folder: Path | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[tuple[str, Float[Tensor, "blocks size size"]]]:
    """The blocks of `Curvature` of every entry that wants them, by matrix, block by block of the model.

    One forward pass of a few windows keeps the hidden states between the blocks, one backward pass reads every block a
    second time; no gradient of a weight is formed.

    Args:
        source: the original.
        entries: with the settings of each matrix.
        windows: the first of them, as many as make the tokens that are asked for.
        device: where blocks run.
        memory: bytes of hidden states that may be held; more is spilled to a temporary file.
        folder: of that file; None is the system's.
        seed: of the labels.
        dtype: in which everything runs, float32 or wider.
        progress: told of steps done, and of how many there are.

    Raises:
        CalibrationError: there is no position to score.
        NonFiniteError: the model gives NaN or infinity.
    """
    sizes = {e.matrix: e.curvature.block_size for e in entries if e.curvature is not None}
    tokens = max(e.curvature.tokens for e in entries if e.curvature is not None)
    step = counted(progress, 2 * len(source.map.blocks) + 1)
    with temporary_stores(1, memory, folder) as (store, shelf):
        some = windows_for(windows, tokens)
        borders = Borders(source, some, store=store, shelf=shelf, device=device, dtype=dtype, step=step)
        gradients = _Gradients(borders, seed, sizes)
        gradients.through_head()
        step()
        for block in reversed(source.map.blocks):
            gradients.through_block(block)
            step()
            yield from gradients.taken().items()


def planned_curvature(
    source: Source,
    planned: Planned,
    windows: Windows,
    *,
    folder: Path,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[tuple[str, Float[Tensor, "blocks size size"]]]:
    """`measure_curvature` for a plan, on the windows that its statistics are fitted on."""
    fit, _ = windows.split(seed=planned.request.seed)
    with products_in(planned.precision):
        yield from measure_curvature(
            source,
            planned.plan.entries,
            fit,
            device=planned.request.device,
            memory=planned.costs.stream_bytes,
            folder=folder,
            seed=planned.request.seed,
            progress=progress,
        )


def reader_of(saved: Saved, device: str) -> Callable[[Matrix], Curvature]:
    """Gives the curvature of a matrix from the file that keeps what was measured."""
    return lambda matrix: Curvature(blocks=saved.read(matrix.name).to(device), rows=matrix.shape[0])


def windows_for(windows: Windows, tokens: int) -> Windows:
    """The first windows, as many as make that many tokens, or all of them."""
    count = -(-tokens // windows.seqlen)
    mask = None if windows.mask is None else windows.mask[:count]
    return Windows(tokens=windows.tokens[:count], mask=mask, source=windows.source)


class _Gradients(Backward):
    """Sums over the tokens of products of unit gradients in outputs."""

    def __init__(self, borders: Borders, seed: int, sizes: Mapping[str, int]) -> None:
        super().__init__(borders, seed)
        self._sizes = sizes
        self._sums: dict[str, Tensor] = {}

    def taken(self) -> dict[str, Tensor]:
        """The sums of the block that was passed last."""
        found, self._sums = self._sums, {}
        return found

    @contextmanager
    def watched(self, block: Block) -> Iterator[None]:
        """Add up what arrives at the outputs of the block's matrices."""
        with ExitStack() as stack:
            for name in (name for group in block.groups for name in group.matrices if name in self._sizes):
                matrix = self.source.map.matrices[name]
                module = self.source.skeleton.get_submodule(matrix.parameter.rpartition(".")[0])
                rows, size = matrix.shape[0], self._sizes[name]
                count = -(-rows // size)
                self._sums[name] = torch.zeros(count, size, size, dtype=self.borders.dtype, device=self.borders.device)

                def ran(_module: object, _args: object, output: Tensor, name: str = name) -> None:
                    if output.requires_grad:  # not where it only chooses
                        output.register_hook(lambda gradient: self._add(name, gradient.flatten(0, -2)))

                stack.callback(module.register_forward_hook(ran).remove)
            yield

    def _add(self, name: str, gradient: Float[Tensor, "tokens out"]) -> None:
        total = self._sums[name]
        count, size, _ = total.shape
        # a token without a gradient, padding for one, has no direction
        unit = gradient / gradient.norm(dim=1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        whole = torch.nn.functional.pad(unit, (0, count * size - unit.shape[1])).unflatten(1, (count, size))
        total.baddbmm_(whole.permute(1, 2, 0), whole.transpose(0, 1))
