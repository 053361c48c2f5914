"""How the error of the first blocks grows through the rest of the model (Figure 1 of QEP)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mezzotint.blockwise.source import open_original
from mezzotint.core.records import BlockRecord, MatrixRecord
from mezzotint.errors import ConfigError
from mezzotint.planning.plan import make_plan
from mezzotint.recipes.request import Request
from mezzotint.storage.saved import Saved, save
from mezzotint.sweep.calibrate import calibrated_streams, calibration_windows
from mezzotint.sweep.fisher import planned_curvature, reader_of
from mezzotint.sweep.solve import Solver
from mezzotint.sweep.sweep import Sweep


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


def _one(request: Request, blocks: int, passed: Callable[[int, int], None]) -> Drift:
    source = open_original(request.model, trust_remote_code=request.trust_remote_code)
    total = len(source.map.blocks)
    if not 1 <= blocks <= total:
        raise ConfigError(f"--blocks is {blocks}; this model has {total}. Give 1 to {total}.")
    planned = make_plan(source, request, calibrate=True)
    entries = [entry for entry in planned.plan.entries if entry.block is not None and entry.block < blocks]
    behind: list[BlockRecord] = []

    def notify(record: MatrixRecord | BlockRecord) -> None:
        if isinstance(record, BlockRecord):
            behind.append(record)
            passed(len(behind), total)

    with TemporaryDirectory(prefix="mezzotint-") as folder:
        assert planned.calibration is not None
        windows = calibration_windows(source, planned.calibration, request, lambda *_: None)
        streams = calibrated_streams(source, planned, entries, windows, Path(folder))
        curvature = None
        if any(entry.curvature is not None for entry in entries):
            index = save(
                Path(folder) / "curvature.bin", planned_curvature(source, planned, windows, folder=Path(folder))
            )
            curvature = reader_of(Saved(Path(folder), [index]), request.device)
        solver = Solver(
            {e.matrix: e for e in entries},
            sink=lambda *_: None,
            notify=notify,
            seed=request.seed,
            curvature=curvature,
        )
        sweep = Sweep(source, entries, streams, solver=solver, notify=notify, device=request.device, to_the_end=True)
        try:
            sweep.run()
        finally:
            streams.close()
    return Drift(
        recipe=request.recipe.name,
        blocks=blocks,
        absolute=tuple(record.error or 0.0 for record in behind),
        relative=tuple(record.relative_error or 0.0 for record in behind),
    )
