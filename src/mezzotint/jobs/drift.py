"""How the error of the first blocks grows through the rest of the model (Figure 1 of QEP)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mezzotint.core.records import BlockRecord
from mezzotint.errors import ConfigError
from mezzotint.recipes.request import Request
from mezzotint.storage.saved import Saved, save
from mezzotint.sweep.fisher import planned_curvature, reader_of
from mezzotint.sweep.job import Job
from mezzotint.sweep.solve import Solver
from mezzotint.sweep.sweep import Sweep
from mezzotint.sweep.watcher import Watcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Difference of the two streams behind every block, when only the first blocks are quantized.

    Attributes:
        recipe: that quantized them.
        blocks: how many were quantized; the others are the original's.
        absolute: behind each block, the mean over held-out tokens and channels of the squared difference
            ``(f_m(X) - fh_m(X))^2``.
        relative: the same over the mean square of ``f_m(X)``.
    """

    recipe: str
    blocks: int
    absolute: tuple[float, ...]
    relative: tuple[float, ...]


def measure_drift(
    requests: Sequence[Request], blocks: int, progress: Callable[[int, int], None] = lambda *_: None
) -> tuple[Drift, ...]:
    """Quantize the first blocks by each request's recipe and follow both streams to the end; writes nothing.

    Args:
        requests: of one model; each has its own recipe and calibration.
        blocks: how many to quantize.
        progress: told of blocks done, over all requests.

    Raises:
        ConfigError: there are not so many blocks.
        MezzotintError: a request cannot be carried out.
    """
    found: list[Drift] = []
    for position, request in enumerate(requests):

        def passed(done: int, total: int, before: int = position) -> None:
            progress(before * total + done, len(requests) * total)

        found.append(_one(request, blocks, passed))
    return tuple(found)


class _Watching(Watcher):
    """Collects what comes out of the blocks.

    Args:
        passed: told of the number of blocks so far.
    """

    def __init__(self, passed: Callable[[int], None]) -> None:
        self.blocks: list[BlockRecord] = []
        self._passed = passed

    def finished(self, record: BlockRecord) -> None:
        """A block is finished."""
        self.blocks.append(record)
        self._passed(len(self.blocks))


def _one(request: Request, blocks: int, passed: Callable[[int, int], None]) -> Drift:
    job = Job(request, calibrate=True)
    source = job.source
    total = len(source.map.blocks)
    if not 1 <= blocks <= total:
        raise ConfigError(f"--blocks is {blocks}; this model has {total}. Give 1 to {total}.")
    planned = job.planned
    entries = [entry for entry in planned.plan.entries if entry.block is not None and entry.block < blocks]
    watcher = _Watching(lambda done: passed(done, total))
    with TemporaryDirectory(prefix="mezzotint-") as folder:
        windows = job.windows()
        streams = job.streams(windows, Path(folder), entries=entries)
        curvature = None
        if any(entry.curvature is not None for entry in entries):
            index = save(
                Path(folder) / "curvature.bin", planned_curvature(source, planned, windows, folder=Path(folder))
            )
            curvature = reader_of(Saved(Path(folder), [index]), request.device)
        solver = Solver(
            {e.matrix: e for e in entries},
            sink=lambda *_: None,
            notify=lambda _: None,
            seed=request.seed,
            curvature=curvature,
        )
        try:
            Sweep(job, streams, solver, watcher, to_the_end=True).run()
        finally:
            streams.close()
    return Drift(
        recipe=request.recipe.name,
        blocks=blocks,
        absolute=tuple(record.error or 0.0 for record in watcher.blocks),
        relative=tuple(record.relative_error or 0.0 for record in watcher.blocks),
    )
