"""One quantization from request to finished folder."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.errors import RunError, WriteError
from mezzotint.formats.folder import OutputFolder, check_space, copy_companions, write_json
from mezzotint.models import Source
from mezzotint.pipeline.adapter import FOLDER, Adapter
from mezzotint.pipeline.calibrate import calibrated_streams
from mezzotint.pipeline.card import write_card
from mezzotint.pipeline.output import Output
from mezzotint.pipeline.plan import Planned, make_plan
from mezzotint.pipeline.report import REPORT_NAME, cpu_seconds, full_report
from mezzotint.pipeline.request import Request
from mezzotint.pipeline.solve import MatrixRecord, Solver
from mezzotint.pipeline.source import open_original
from mezzotint.pipeline.streams import Streams
from mezzotint.pipeline.sweep import BlockRecord, Sweep
from mezzotint.submodules.lora import Lora


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is: ``done`` of ``total`` steps of a ``stage``, and the last record."""

    stage: str
    done: int
    total: int
    record: MatrixRecord | BlockRecord | None = None


Listener = Callable[[Progress], None]


def plan(request: Request) -> Planned:
    """What would be done; reads headers, no weights."""
    return make_plan(open_original(request.model, trust_remote_code=request.trust_remote_code), request)


def quantize(request: Request, out: Path, listener: Listener | None = None) -> dict[str, Any]:
    """Quantize a model folder into ``out`` and return the report.

    Everything happens in ``out.partial``; the folder gets its name by one rename when it is complete.

    Args:
        request: what is asked for.
        out: folder to make; it must not exist, or be empty.
        listener: told of progress.

    Raises:
        MezzotintError: the request, the model, the text, the format or the disk is at fault; the message says how.
    """
    tell = listener or (lambda _: None)
    started, cpu_started = time.perf_counter(), cpu_seconds()
    source = open_original(request.model, trust_remote_code=request.trust_remote_code)
    planned = make_plan(source, request)
    check_space(out, planned.plan.bytes * planned.form.copies)
    folder = OutputFolder(out)
    try:
        report = _work(source, planned, folder, tell, started=started, cpu_started=cpu_started)
    except BaseException:
        # nothing that is left could be continued, and it must not look like a model
        shutil.rmtree(folder.partial, ignore_errors=True)
        raise
    try:
        folder.finish()
    except OSError as error:  # the result is complete, and stays where the message says
        raise WriteError(str(error)) from error
    return {"out": str(out), **report}


def _work(
    source: Source, planned: Planned, folder: OutputFolder, tell: Listener, *, started: float, cpu_started: float
) -> dict[str, Any]:
    """Fill the unfinished folder; gives the report."""
    marks = [started, time.perf_counter()]
    output = Output(source, planned, folder.partial)
    try:
        streams = _streams(source, planned, folder.partial, tell)
        marks.append(time.perf_counter())
        adapter = _adapter(planned)
        records = _sweep(source, planned, streams, output, tell, adapter=adapter)
        if adapter is not None:
            adapter.write(folder.partial / FOLDER, source.folder.name)
        output.copy_rest()
        output.close()
        write_json(folder.partial / "config.json", _config(source, planned))
        copy_companions(source.folder, folder.partial, trusted=planned.request.trust_remote_code)
        output_bytes = planned.form.finish(folder.partial, source.config.to_dict(), planned.plan, source.map)
    except OSError as error:
        if isinstance(error, RunError):
            raise
        # the request was right when it was checked: a disk that is full or gone is a failure while running
        raise WriteError(str(error)) from error
    finally:
        output.release()
    marks.append(time.perf_counter())
    stages = ("plan", "calibration", "sweep")
    times = {stage: end - start for stage, start, end in zip(stages, marks, marks[1:], strict=False)}
    report = full_report(
        planned,
        records,
        output_bytes=output_bytes,
        out=folder.path.name,
        original_bytes=sum(tensor.nbytes for tensor in source.checkpoint.tensors.values()),
        seconds=marks[-1] - started,
        cpu_seconds=cpu_seconds() - cpu_started,
        times=times,
    )
    write_json(folder.partial / REPORT_NAME, report)
    write_card(folder.partial, source.folder)
    return report


def _streams(source: Source, planned: Planned, folder: Path, tell: Listener) -> Streams | None:
    if planned.calibration is None:
        return None
    return calibrated_streams(
        source,
        planned,
        planned.plan.entries,
        folder,
        lambda done, total: tell(Progress(stage="sampling", done=done, total=total)),
    )


def _adapter(planned: Planned) -> Adapter | None:
    settings = next((e.compensation for e in planned.plan.entries if isinstance(e.compensation, Lora)), None)
    return None if settings is None else Adapter(settings)


def _sweep(
    source: Source,
    planned: Planned,
    streams: Streams | None,
    output: Output,
    tell: Listener,
    *,
    adapter: Adapter | None,
) -> list[MatrixRecord | BlockRecord]:
    records: list[MatrixRecord | BlockRecord] = []
    total = len(planned.plan.entries)

    def notify(record: MatrixRecord | BlockRecord) -> None:
        records.append(record)
        done = sum(isinstance(r, MatrixRecord) for r in records)
        tell(Progress(stage="quantizing", done=done, total=total, record=record))

    entries = {entry.matrix: entry for entry in planned.plan.entries}
    solver = Solver(entries, sink=output.put, notify=notify, seed=planned.request.seed)
    sweep = Sweep(
        source,
        planned.plan.entries,
        streams,
        solver=solver,
        notify=notify,
        device=planned.request.device,
        rewritten=output.rewrite,
        adapter=adapter,
    )
    try:
        sweep.run()
    finally:
        if streams is not None:
            streams.close()
    return records


def _config(source: Source, planned: Planned) -> dict[str, Any]:
    """The original's config.json with the format's own part."""
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    quantization = planned.form.config(planned.plan, source.map)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    return config
