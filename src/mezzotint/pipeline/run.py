"""One quantization from request to finished folder."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mezzotint.calibration import Windows
from mezzotint.errors import MezzotintError, RunError, WriteError
from mezzotint.formats.folder import OutputFolder, check_space, copy_companions, write_json
from mezzotint.models import Source
from mezzotint.pipeline.adapter import FOLDER, Adapter
from mezzotint.pipeline.calibrate import calibrated_streams, calibration_windows
from mezzotint.pipeline.card import write_card
from mezzotint.pipeline.costs import CalibrationPlan
from mezzotint.pipeline.curvature import planned_curvature, reader_of
from mezzotint.pipeline.memory import return_freed_memory
from mezzotint.pipeline.output import Elsewhere, Output
from mezzotint.pipeline.plan import Planned, make_plan
from mezzotint.pipeline.ranks import ALONE, Ranks
from mezzotint.pipeline.report import REPORT_NAME, cpu_seconds, full_report, peak_rss_bytes, read_report, rss_bytes
from mezzotint.pipeline.request import Request
from mezzotint.pipeline.resume import WORK, Keeper, Work, identity_of
from mezzotint.pipeline.solve import MatrixRecord, Solver
from mezzotint.pipeline.source import open_original
from mezzotint.pipeline.streams import Streams
from mezzotint.pipeline.sweep import BlockRecord, Sweep
from mezzotint.submodules.lora import Lora


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


def plan(request: Request) -> Planned:
    """What would be done; reads headers, no weights."""
    return make_plan(open_original(request.model, trust_remote_code=request.trust_remote_code), request)


def quantize(
    request: Request,
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
        request: what is asked for.
        out: folder to make; it must not exist, or be empty.
        listener: told of progress on the first rank; what it raises stops the run.
        resume: continue the work that lies in ``out.partial``; without any, start.
        ranks: that share the work; the first one checks, writes and tells.

    Raises:
        MezzotintError: the request, the model, the text, the format or the disk is at fault; the message says how.
    """
    clock = _Clock()
    with ranks.led():
        source = open_original(request.model, trust_remote_code=request.trust_remote_code)
        planned = make_plan(source, replace(request, ranks=ranks.size))
        partial = out.absolute().with_name(out.name + ".partial")
        folder, identity = None, None
        if ranks.first:
            if not partial.exists():
                check_space(out, planned.plan.bytes * planned.form.copies)
            folder, identity = OutputFolder(out, resume=resume), identity_of(source, planned)
        work = Work(partial, identity, resume=resume, ranks=ranks)
    if request.memory is not None:
        return_freed_memory()
    run = _Run(source, planned, work, clock, listener or (lambda _: None))
    try:
        work.tell()
        report = run.work()
    except BaseException as error:
        at_fault = isinstance(error, MezzotintError) and not isinstance(error, RunError)
        if work.resumed or (run.begun and not at_fault):
            error.add_note(f"The work so far lies in {partial}; the same command with --resume continues it.")
        elif ranks.first:  # nothing that is left could be continued, and it must not look like a model
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder is not None:
        try:
            folder.finish()
        except OSError as error:  # the result is complete, and stays where the message says
            raise WriteError(str(error)) from error
        shutil.rmtree(folder.path / WORK)
    return ranks.told({"out": str(out), **report})


class _Clock:
    """Time and processor time of this process since the run began."""

    def __init__(self) -> None:
        self._started, self._cpu_started = time.perf_counter(), cpu_seconds()
        self.times: dict[str, float] = {}
        self._marked = self._started

    def mark(self, stage: str) -> None:
        """A stage is over."""
        now = time.perf_counter()
        self.times[stage], self._marked = now - self._marked, now

    @property
    def seconds(self) -> float:
        """Up to the last mark."""
        return self._marked - self._started

    def spent(self) -> dict[str, float]:
        """Everything up to now."""
        return {
            "seconds": time.perf_counter() - self._started,
            "cpu_seconds": cpu_seconds() - self._cpu_started,
            "peak_rss_bytes": peak_rss_bytes(),
        }


class _Run:
    """The work between the plan and the finished folder.

    Attributes:
        begun: there is a state that can be continued.
    """

    def __init__(self, source: Source, planned: Planned, work: Work, clock: _Clock, tell: Listener) -> None:
        self._source = source
        self._planned = planned
        self._folder = work.folder.parent
        self._work = work
        self._ranks = work.ranks
        self._clock = clock
        self._others: list[Mapping[str, float]] = []
        self._tell = tell if work.ranks.first else lambda _: None
        self.begun = False

    def work(self) -> dict[str, Any]:
        """Fill the unfinished folder; gives the report, on the first rank."""
        if self._work.complete:  # and only the rename is missing
            return read_report(self._folder) if self._ranks.first else {}
        resumed, journal_bytes = self._work.resumed, self._work.journal_bytes
        self._clock.mark("plan")
        windows = self._windows()
        output: Output | Elsewhere = Elsewhere()
        if self._ranks.first:
            output = Output(self._source, self._planned, self._folder, resume=resumed, journal_bytes=journal_bytes)
        try:
            self._begin(output)
            self._measure(windows)
            streams = self._streams(windows)
            self._clock.mark("calibration")
            adapter = _adapter(self._planned, self._work)
            self._sweep(streams, output, adapter)
            self._meet()
            report = self._finished(output, adapter) if isinstance(output, Output) else {}
        except OSError as error:
            if isinstance(error, RunError):
                raise
            # the request was right when it was checked: a disk that is full or gone is a failure while running
            raise WriteError(str(error)) from error
        finally:
            output.release()
        return report

    def _finished(self, output: Output, adapter: Adapter | None) -> dict[str, Any]:
        """Write what comes behind the quantized matrices; gives the report."""
        if adapter is not None:
            adapter.write(self._folder / FOLDER, self._source.folder.name)
        output.copy_rest()
        output.close()
        write_json(self._folder / "config.json", self._config())
        trusted = self._planned.request.trust_remote_code
        copy_companions(self._source.folder, self._folder, trusted=trusted)
        size = self._planned.form.finish(
            self._folder, self._source.config.to_dict(), self._planned.plan, self._source.map
        )
        self._clock.mark("sweep")
        report = self._report(size)
        write_json(self._folder / REPORT_NAME, report)
        write_card(self._folder, self._source.folder)
        self._work.commit(self._work.block, complete=True)
        return report

    def _windows(self) -> Windows | None:
        """The calibration text, which the first rank reads or samples for all."""
        if self._planned.calibration is None:
            return None
        found = self._read_windows(self._planned.calibration) if self._ranks.first else None
        given = self._ranks.given(None if found is None else _tensors_of(found))
        return Windows(tokens=given["tokens"], mask=given.get("mask"), source=self._planned.calibration.source)

    def _read_windows(self, calibration: CalibrationPlan) -> Windows:
        """That of the earlier process where it was sampled, else read, and compared with it."""
        kept = self._work.windows
        if kept is not None and calibration.source == "self":
            return Windows(
                tokens=kept.read("tokens"), mask=kept.read("mask") if "mask" in kept else None, source="self"
            )
        windows = calibration_windows(
            self._source,
            calibration,
            self._planned.request,
            lambda done, total: self._tell(Progress(stage="sampling", done=done, total=total)),
        )
        self._work.keep_windows(_tensors_of(windows), windows.source)
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
        entries = self._planned.plan.entries
        return calibrated_streams(
            self._source, self._planned, entries, windows, self._folder, saved=saved, ranks=self._ranks
        )

    def _begin(self, output: Output | Elsewhere) -> None:
        """From here on a run can be continued."""
        self._work.begin()
        if not self._work.resumed:
            self._work.commit(0, journal_bytes=output.checkpoint(), spent=self._meet())
        self.begun = True

    def _sweep(self, streams: Streams | None, output: Output | Elsewhere, adapter: Adapter | None) -> None:
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
            Sweep(
                self._source,
                entries,
                streams,
                solver=solver,
                notify=notify,
                device=request.device,
                rewritten=output.rewrite,
                adapter=adapter,
                keeper=keeper,
                importance=self._planned.importance,
            ).run()
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

    def _config(self) -> dict[str, Any]:
        """The original's config.json with the format's own part."""
        config = json.loads((self._source.folder / "config.json").read_text(encoding="utf-8"))
        quantization = self._planned.form.config(self._planned.plan, self._source.map)
        if quantization is not None:
            config["quantization_config"] = dict(quantization)
        return config


def _tensors_of(windows: Windows) -> dict[str, Tensor]:
    """By name; without padding there is no mask."""
    return {"tokens": windows.tokens, **({} if windows.mask is None else {"mask": windows.mask})}


def _adapter(planned: Planned, work: Work) -> Adapter | None:
    """What takes low-rank compensations, with those of an earlier process."""
    settings = next((e.compensation for e in planned.plan.entries if isinstance(e.compensation, Lora)), None)
    return None if settings is None else Adapter(settings, work.adapter)
