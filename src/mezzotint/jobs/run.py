"""One quantization from request to finished folder."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mezzotint.blockwise.streams import Streams
from mezzotint.calibration import Windows
from mezzotint.core.plans import CalibrationPlan
from mezzotint.core.records import BlockRecord, MatrixRecord
from mezzotint.errors import MezzotintError, RunError, WriteError
from mezzotint.jobs.ending import Ending, names_of_tensors
from mezzotint.jobs.output import Elsewhere, Output
from mezzotint.models import Source
from mezzotint.planning.planned import Planned
from mezzotint.process.ranks import ALONE, Ranks
from mezzotint.process.usage import Clock, return_freed_memory, rss_bytes
from mezzotint.report.report import full_report, read_report
from mezzotint.storage.folder import OutputFolder, partial_of
from mezzotint.storage.keeper import Keeper
from mezzotint.storage.work import MAKES, Work
from mezzotint.submodules.lora import Lora
from mezzotint.sweep import adapter as adapters
from mezzotint.sweep.fisher import planned_curvature, reader_of
from mezzotint.sweep.job import Job, tensors_of
from mezzotint.sweep.solve import Solver
from mezzotint.sweep.sweep import Sweep
from mezzotint.sweep.watcher import Watcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is: ``done`` of ``total`` steps of a ``stage``, and the last record.

    Attributes:
        seconds_left: predicted from the weights that are left; None while nothing is known.
        memory_bytes: of the process now.
    """

    stage: str
    done: int
    total: int
    record: MatrixRecord | BlockRecord | None = None
    seconds_left: float | None = None
    memory_bytes: int | None = None


Listener = Callable[[Progress], None]


def quantize(
    job: Job,
    out: Path,
    listener: Listener | None = None,
    *,
    resume: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Quantize a model folder into ``out`` and return the report.

    Everything happens in ``out.partial``; the folder gets its name by one rename when it is complete. Where a run fails
    or is stopped after it has begun to work, ``out.partial`` stays, and the same request with ``resume`` continues it.

    Args:
        job: what is asked for, and the model.
        out: folder to make; it must not exist, or be empty.
        listener: told of progress on the first rank; what it raises stops the run.
        resume: continue the work that lies in ``out.partial``; without any, start.
        ranks: that share the work; the first one checks, writes and tells.

    Raises:
        MezzotintError: the request, the model, the text, the format or the disk is at fault; the message says how.
    """
    clock, partial = Clock(), partial_of(out)
    end = None
    with ranks.led():
        job = job.of(replace(job.request, ranks=ranks.size))
        planned = job.planned
        if ranks.first:
            place = OutputFolder(out, resume=resume)
            end = place, _ending(job.source, planned, out)
            needed = planned.plan.bytes * planned.form.copies
            place.begin("quantize", makes_of(planned.plan.format), job.identity(), needed=needed)
    if ranks.told(end is not None and end[0].complete is not None):  # only the rename was missing
        return ranks.told(None if end is None else _placed(end[0], out, read_report(end[0].result)))
    with ranks.led():
        work = Work(partial, None if end is None else end[0], ranks=ranks)
    if job.request.memory is not None:
        return_freed_memory()
    run = _Run(job, work, clock, listener or (lambda _: None), end=end)
    try:
        report = run.work()
    except BaseException as error:
        at_fault = isinstance(error, MezzotintError) and not isinstance(error, RunError)
        if work.resumed or work.closed or (run.begun and not at_fault):
            error.add_note(f"The work so far lies in {partial}; the same command with --resume continues it.")
        elif end is not None:  # nothing that is left could be continued, and it must not look like a model
            end[0].discard()
        raise
    return ranks.told(None if end is None else _placed(end[0], out, report))


def makes_of(form: str) -> tuple[str, ...]:
    """Names of all that a run makes in its folder until its tensors are complete."""
    return (*names_of_tensors(form), *MAKES)


def _ending(source: Source, planned: Planned, out: Path) -> Ending:
    """What comes behind the tensors, rendered once: hours later it would be late to find that it cannot be."""
    ending = Ending(source.folder, trusted=planned.request.trust_remote_code)
    nothing = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_rss_bytes": 0}
    report = full_report(
        planned, (), output_bytes=0, out=out.name, original_bytes=0, spent=nothing, by_rank=[nothing], times={}
    )
    ending.rehearse(_config(ending, source, planned), report)
    return ending


def _config(ending: Ending, source: Source, planned: Planned) -> dict[str, Any]:
    """The original's config.json with the format's own part."""
    config = ending.config()
    quantization = planned.form.config(planned.plan, source.map)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    return config


def _placed(place: OutputFolder, out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Give the finished folder its name."""
    place.finish({})
    return {"out": str(out), **report}


@contextmanager
def _running() -> Iterator[None]:
    """The request was right when it was checked: a disk that is full or gone is a failure while running."""
    try:
        yield
    except OSError as error:
        if isinstance(error, RunError):
            raise
        raise WriteError(str(error)) from error


class _Run:
    """The work between the plan and the finished folder.

    Args:
        end: on the first rank, the folder and what comes behind its tensors.

    Attributes:
        begun: there is a state that can be continued.
    """

    def __init__(
        self,
        job: Job,
        work: Work,
        clock: Clock,
        tell: Listener,
        *,
        end: tuple[OutputFolder, Ending] | None,
    ) -> None:
        self._job = job
        self._source, self._planned = job.source, job.planned
        self._folder = work.folder.parent
        self._work = work
        self._ranks = work.ranks
        self._clock = clock
        self._end = end
        self._others: list[Mapping[str, float]] = []
        self._tell = tell if work.ranks.first else lambda _: None
        self.begun = False

    def work(self) -> dict[str, Any]:
        """Fill the unfinished folder; gives the report, on the first rank."""
        with _running():
            self._work.tell()
        self._clock.mark("plan")
        if self._work.closed:
            self._work.begin()
            self._meet()
        else:
            self._quantize()
        with _running():
            return {} if self._end is None else self._finished(*self._end)

    def _quantize(self) -> None:
        """All tensors."""
        resumed, journal_bytes = self._work.resumed, self._work.journal_bytes
        windows = self._windows()
        output: Output | Elsewhere = Elsewhere()
        if self._ranks.first:
            output = Output(self._source, self._planned, self._folder, resume=resumed, journal_bytes=journal_bytes)
        with closing(output), _running():
            self._begin(output)
            self._measure(windows)
            streams = self._streams(windows)
            self._clock.mark("calibration")
            self._sweep(streams, output, _adapter(self._planned, self._work))
            self._meet()
            output.complete()
            self._work.commit(self._work.block, closed=True)

    def _finished(self, place: OutputFolder, ending: Ending) -> dict[str, Any]:
        """Write what comes behind the tensors; gives the report."""
        place.announce([*ending.names, *adapters.NAMES])
        adapter = _adapter(self._planned, self._work)
        if adapter is not None:
            adapter.write(self._folder, self._source.folder.name)
        ending.write_config(self._folder, _config(ending, self._source, self._planned))
        size = self._planned.form.finish(
            self._folder, self._source.config.to_dict(), self._planned.plan, self._source.map
        )
        self._clock.mark("sweep")
        return ending.write_report(self._folder, self._report(size))

    def _windows(self) -> Windows | None:
        """The calibration text, which the first rank reads or samples for all."""
        if self._planned.calibration is None:
            return None
        found = self._read_windows(self._planned.calibration) if self._ranks.first else None
        given = self._ranks.given(None if found is None else tensors_of(found))
        return Windows(tokens=given["tokens"], mask=given.get("mask"), source=self._planned.calibration.source)

    def _read_windows(self, calibration: CalibrationPlan) -> Windows:
        """That of the earlier process where it was sampled, else read, and compared with it."""
        kept = self._work.windows
        if kept is not None and calibration.source == "self":
            return Windows(
                tokens=kept.read("tokens"), mask=kept.read("mask") if "mask" in kept else None, source="self"
            )
        windows = self._job.windows(lambda done, total: self._tell(Progress(stage="sampling", done=done, total=total)))
        self._work.keep_windows(tensors_of(windows), windows.source)
        return windows

    def _measure(self, windows: Windows | None) -> None:
        """The curvature of the loss in the outputs of matrices, if anything needs it; the first rank measures."""
        if windows is None or not any(entry.curvature is not None for entry in self._planned.plan.entries):
            return
        self._work.keep_curvature(
            lambda: planned_curvature(
                self._source,
                self._planned,
                windows,
                folder=self._work.folder,
                progress=lambda done, total: self._tell(Progress(stage="curvature", done=done, total=total)),
            )
        )

    def _streams(self, windows: Windows | None) -> Streams | None:
        """Both streams where the run stands; None where it needs none, or no longer."""
        saved = self._work.streams
        if windows is None or (self._work.block > 0 and saved is None):
            return None
        return self._job.streams(windows, self._work.folder, saved=saved, ranks=self._ranks)

    def _begin(self, output: Output | Elsewhere) -> None:
        """From here on a run can be continued."""
        self._work.begin()
        if not self._work.resumed:
            self._work.commit(0, journal_bytes=output.checkpoint(), spent=self._meet())
        self.begun = True

    def _sweep(self, streams: Streams | None, output: Output | Elsewhere, adapter: adapters.Adapter | None) -> None:
        keeper = Keeper(
            self._work,
            journal=output.checkpoint,
            streams=None if streams is None else streams.save,
            adapter=None if adapter is None else adapter.named,
            spent=self._meet,
        )
        entries, request, notify = self._planned.plan.entries, self._planned.request, self._notifier()
        saved = self._work.curvature
        solver = Solver(
            {entry.matrix: entry for entry in entries},
            sink=output.put,
            notify=notify,
            seed=request.seed,
            ranks=self._ranks,
            curvature=None if saved is None else reader_of(saved, request.device),
        )
        try:
            Sweep(self._job, streams, solver, _Watching(keeper, output, notify), adapter=adapter).run()
        finally:
            if streams is not None:
                streams.close()

    def _notifier(self) -> Callable[[MatrixRecord | BlockRecord], None]:
        """Records what is done, and tells how far the run is."""
        sizes = {name: rows * columns for name, (rows, columns) in self._planned.shapes.items()}
        names = {record.name for record in self._work.records if isinstance(record, MatrixRecord)}
        whole, before = sum(sizes.values()), sum(sizes[name] for name in names)
        started = time.perf_counter()

        def notify(record: MatrixRecord | BlockRecord) -> None:
            memory = rss_bytes()
            elapsed = self._spent()["seconds"]
            self._work.record(record, memory_bytes=memory, elapsed_seconds=elapsed)
            if isinstance(record, MatrixRecord):
                names.add(record.name)
            elif self._planned.request.memory is not None:
                return_freed_memory()
            now = sum(sizes[name] for name in names)
            left = (time.perf_counter() - started) * (whole - now) / (now - before) if now > before else None
            self._tell(
                Progress(
                    stage="quantizing",
                    done=len(names),
                    total=len(sizes),
                    record=record,
                    seconds_left=left,
                    memory_bytes=memory,
                )
            )

        return notify

    def _meet(self) -> dict[str, float]:
        """What all ranks have spent up to now; all of them ask."""
        self._others = self._ranks.each(self._clock.spent())[1:]
        return self._spent()

    def _spent(self) -> dict[str, float]:
        """What this process has spent, and with it the others, as far as is known, and earlier ones."""
        before, own = self._work.spent, self._clock.spent()
        every = [before, own, *self._others]
        return {
            "seconds": before["seconds"] + own["seconds"],
            "cpu_seconds": sum(one["cpu_seconds"] for one in every),
            "peak_rss_bytes": max(one["peak_rss_bytes"] for one in every),
        }

    def _report(self, output_bytes: int) -> dict[str, Any]:
        before = self._work.spent
        return full_report(
            self._planned,
            self._work.records,
            output_bytes=output_bytes,
            out=self._folder.name.removesuffix(".partial"),
            original_bytes=sum(tensor.nbytes for tensor in self._source.checkpoint.tensors.values()),
            spent={**self._spent(), "seconds": before["seconds"] + self._clock.seconds},
            by_rank=[self._clock.spent(), *self._others],
            times={**({"before": before["seconds"]} if self._work.resumed else {}), **self._clock.times},
        )


class _Watching(Watcher):
    """What a sweep finishes goes to the work folder, the output and the listener."""

    def __init__(
        self, keeper: Keeper, output: Output | Elsewhere, notify: Callable[[MatrixRecord | BlockRecord], None]
    ) -> None:
        self.first = keeper.block
        self.values, self.group, self.border = keeper.values, keeper.group, keeper.border
        self.rewritten = output.rewrite
        self._notify = notify

    def finished(self, record: BlockRecord) -> None:
        """A block is finished."""
        self._notify(record)


def _adapter(planned: Planned, work: Work) -> adapters.Adapter | None:
    """What takes low-rank compensations, with those of an earlier process."""
    settings = next((e.compensation for e in planned.plan.entries if isinstance(e.compensation, Lora)), None)
    return None if settings is None else adapters.Adapter(settings, work.adapter)
