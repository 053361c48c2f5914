"""Runs every request. If the recipe has a budget, bits are allocated first."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from mezzotint.budgeting.allocate import Allocated, allocated
from mezzotint.core.plans import CalibrationPlan
from mezzotint.errors import ConfigError
from mezzotint.evaluation.texts import compare
from mezzotint.jobs import run
from mezzotint.jobs.ending import Ending
from mezzotint.jobs.run import Listener, Progress
from mezzotint.planning.planned import Planned
from mezzotint.process.ranks import Ranks, ranks_of
from mezzotint.recipes.recipe import Recipe
from mezzotint.recipes.request import Request
from mezzotint.report.command import command_of
from mezzotint.report.report import REPORT_NAME, read_report
from mezzotint.storage.folder import MARKER, OutputFolder, partial_of
from mezzotint.storage.work import STATE
from mezzotint.sweep import adapter
from mezzotint.sweep.job import Job

_CANDIDATES = ("allocated", "uniform")
_PATIENCE = timedelta(days=2)  # of ranks that wait for the first one's prices and measurements


def plan(request: Request, listener: Listener | None = None) -> tuple[Planned, Allocated | None]:
    """What would be done, and the allocation if there is one; that one reads weights and text.

    Args:
        request: what is asked for.
        listener: told of progress.

    Raises:
        MezzotintError: what cannot be done.
    """
    job = Job(request)
    found = _allocated(job, listener)
    return (job if found is None else job.of(found.request)).planned, found


def quantize(request: Request, out: Path, listener: Listener | None = None, *, resume: bool = False) -> dict[str, Any]:
    """Quantize a model folder into ``out`` and return the report.

    Where ``torchrun`` has started several processes, they share the work.

    With an allocation that is guarded, two candidates are made, allocated and with the same grid everywhere. Both are
    measured on the calibration windows that are held out, and the better one stays.

    Args:
        request: what is asked for.
        out: folder to make; it must not exist, or be empty.
        listener: told of progress.
        resume: continue the work that lies in ``out.partial``; bits are allocated again.

    Raises:
        MezzotintError: the request, the model, the text, the format or the disk is at fault; the message says how.
    """
    if request.recipe.stages().allocation is None:
        with ranks_of(request.device) as ranks:
            return run.quantize(Job(request), out, listener, resume=resume, ranks=ranks)
    with ranks_of(request.device, patience=_PATIENCE) as ranks:
        return _guarded(Job(request), out, listener, resume, ranks)


def _guarded(job: Job, out: Path, listener: Listener | None, resume: bool, ranks: Ranks) -> dict[str, Any]:
    """The better one of the candidates; the first rank allocates and measures, all of them quantize."""
    place = ending = found = None
    inside = partial_of(out)
    with ranks.led():
        if ranks.first:
            place = OutputFolder(out, resume=resume)
            ending = Ending(job.source.folder, trusted=job.request.trust_remote_code)
            place.begin("quantize", _makes(ending), _identity(job.request))
    if ranks.told(place is not None and place.complete is not None):  # only the last rename was missing
        return ranks.told(None if place is None else _placed(place, out, read_report(place.result)))
    try:
        with ranks.led():
            if ranks.first:
                found = _allocated(job, listener)
        candidates = _candidates(job.request, found, ranks)
        reports = {name: _made(job.of(one), inside / name, listener, resume, ranks) for name, one in candidates.items()}
        with ranks.led():
            report = {}
            if found is not None and ending is not None:
                report = _decided(job, found, reports, inside, ending)
    except BaseException as error:
        if any((inside / name).is_dir() for name in _CANDIDATES):
            error.add_note(f"Finished candidates lie in {inside}; the same command with --resume goes on from them.")
        elif place is not None and not place.resumed and next(inside.rglob(STATE), None) is None:
            place.discard()
        raise
    return ranks.told(None if place is None else _placed(place, out, report))


def _placed(place: OutputFolder, out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Give the folder that stays its name."""
    place.finish({}, inner=report["allocation"]["kept"])
    return {**report, "out": str(out)}


def _makes(ending: Ending) -> list[str]:
    """Names of all that is made: folders of candidates, finished or not, and what the original gives on their text."""
    names = [*run.makes_of("gguf"), *adapter.NAMES, *ending.names, MARKER]  # of every format
    folders = [f"{name}{suffix}" for name in _CANDIDATES for suffix in ("", ".partial")]
    return [*(f"{folder}/{name}" for folder in folders for name in names), "states/*.safetensors", "states/*.partial"]


def _identity(request: Request) -> dict[str, Any]:
    """What the candidates are made from; each of them is checked as any run is."""
    return {
        "recipe": request.recipe.model_dump(mode="json"),
        "seed": request.seed,
        "engine": request.engine,
        "format": request.format,
    }


def _candidates(request: Request, found: Allocated | None, ranks: Ranks) -> dict[str, Request]:
    """What is made, by name; only the first rank has found it."""
    candidates: dict[str, Request] = {}
    if found is not None:
        candidates["allocated"] = found.request
        if found.knapsack.guard and found.uniform is not None:
            candidates["uniform"] = found.uniform
    told = ranks.told({name: [one.engine, one.recipe.model_dump(mode="json")] for name, one in candidates.items()})
    return candidates or {
        name: replace(request, engine=engine, recipe=Recipe(**recipe)) for name, (engine, recipe) in told.items()
    }


def _decided(
    job: Job, found: Allocated, reports: Mapping[str, dict[str, Any]], folder: Path, ending: Ending
) -> dict[str, Any]:
    """The report of the candidate that stays, with what was decided on; written in its place."""
    evidence = found.as_json()
    kept = "allocated"
    if len(reports) > 1:
        evidence["held_out_kl_nats"] = losses = _measured(job.of(found.request, calibrate=True), folder)
        kept = min(reports, key=lambda name: losses[name])
    evidence["kept"] = kept
    report = {name: value for name, value in reports[kept].items() if name != "out"} | {"allocation": evidence}
    report["recipe"] = {**report["recipe"], "allocation": job.request.recipe.allocation}
    calibration = report["plan"]["calibration"]
    name = folder.name.removesuffix(".partial")
    report["command"] = command_of(job.request, calibration and CalibrationPlan(**calibration), name)
    return ending.write_report(folder / kept, report)


def _made(job: Job, out: Path, listener: Listener | None, resume: bool, ranks: Ranks) -> dict[str, Any]:
    """The report of one of the folders to choose from, or what an earlier run made of the same plan."""
    if ranks.told(resume and (out / REPORT_NAME).is_file()):
        report = read_report(out)
        if report["plan"]["fingerprint"] != job.planned.plan.fingerprint:
            raise ConfigError(f"{out} was made for another request. Remove {out.parent}, or choose another --out.")
        return {"out": str(out), **report}
    return run.quantize(job, out, listener, resume=resume, ranks=ranks)


def _allocated(job: Job, listener: Listener | None) -> Allocated | None:
    if job.request.recipe.stages().allocation is None:
        return None
    tell = listener or (lambda _: None)
    return allocated(job, lambda stage, done, total: tell(Progress(stage=stage, done=done, total=total)))


def _measured(job: Job, folder: Path) -> dict[str, float]:
    """KL of both candidates on the windows that were held out."""
    request = job.request
    _, held_out = job.windows().split(seed=request.seed)
    losses = {}
    for name in _CANDIDATES:
        result = compare(
            folder / name,
            job.source,
            held_out,
            device=request.device,
            memory=request.memory,
            cache=folder / "states",
            trust=request.trust_remote_code,
        )
        assert result.kl_nats is not None
        losses[name] = result.kl_nats
    return losses
