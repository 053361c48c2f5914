"""``mezzotint.json``: the report of a run, with all decisions and results."""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from mezzotint.core.records import BlockRecord, MatrixRecord, as_json
from mezzotint.errors import ModelError
from mezzotint.planning.planned import Planned
from mezzotint.report.command import command_of

REPORT_NAME = "mezzotint.json"


def plan_json(planned: Planned) -> dict[str, Any]:
    """The plan as one JSON object."""
    plan = planned.plan
    calibration = planned.calibration
    return {
        "linears": [
            {
                "name": e.matrix,
                "block": e.block,
                "shape": list(planned.shapes[e.matrix]),
                "target": stage(e.target),
                "transform": None if e.transform is None else stage(e.transform),
                "grid": stage(e.grid),
                "rounding": stage(e.rounding),
                "curvature": None if e.curvature is None else stage(e.curvature),
                "refinement": None if e.refinement is None else stage(e.refinement),
                "bits_per_weight": e.bits.total / (planned.shapes[e.matrix][0] * planned.shapes[e.matrix][1]),
                "because": e.because,
            }
            for e in plan.entries
        ],
        "kept": dict(plan.kept),
        "stepped_down": [
            {"what": step.what, "why": step.why, "matrices": list(names)} for step, names in planned.steps_down.items()
        ],
        "format": plan.format,
        "engine": plan.engine,
        "bytes": plan.bytes,
        "bits_per_weight": planned.bits_per_weight,
        "bits_per_weight_without_side_data": planned.bits_per_weight_without_side_data,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "calibration": None
        if calibration is None
        else {"source": calibration.source, "samples": calibration.samples, "seqlen": calibration.seqlen},
        "imatrix": None if planned.importance is None else planned.importance.name,
        "fingerprint": plan.fingerprint,
    }


def stage(value: Any) -> dict[str, Any]:
    """A stage's kind and settings."""
    return {"kind": value.kind, **{f.name: getattr(value, f.name) for f in dataclasses.fields(value)}}


def full_report(
    planned: Planned,
    records: Sequence[MatrixRecord | BlockRecord],
    *,
    output_bytes: int,
    out: str,
    original_bytes: int,
    spent: Mapping[str, float],
    by_rank: Sequence[Mapping[str, float]],
    times: Mapping[str, float],
) -> dict[str, Any]:
    """The report of a finished run.

    Args:
        planned: what was asked for and decided.
        records: of matrices and blocks, as they came.
        output_bytes: of all tensors, as they were written.
        out: name of the output folder.
        original_bytes: of all tensors of the original.
        spent: ``seconds``, ``cpu_seconds`` and ``peak_rss_bytes`` of all processes that worked on it.
        by_rank: the same of each rank, without earlier processes.
        times: seconds by stage.
    """
    request = planned.request
    linears = [as_json(r) for r in records if isinstance(r, MatrixRecord)]
    blocks = [as_json(r) for r in records if isinstance(r, BlockRecord)]
    return {
        "mezzotint": version("mezzotint"),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": request.device},
        "ranks": request.ranks,
        "precision": planned.precision,
        "model": request.model_name,
        "recipe": request.recipe.model_dump(mode="json"),
        "command": command_of(request, planned.calibration, out),
        "seed": request.seed,
        **spent,
        "by_rank": [dict(one) for one in by_rank],
        "times": dict(times),
        "promised_peak_memory_bytes": planned.plan.peak_memory_bytes,
        **({"peak_device_bytes": torch.cuda.max_memory_allocated()} if request.device == "cuda" else {}),
        "output_bytes": output_bytes,
        "original_bytes": original_bytes,
        "plan": plan_json(planned),
        "bits_per_weight": planned.bits_per_weight,
        "bits_per_weight_without_side_data": planned.bits_per_weight_without_side_data,
        "linears": linears,
        "blocks": blocks,
        "decisions": {r["name"]: dict(r["decisions"]) for r in linears if r["decisions"]},
    }


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a folder that mezzotint made.

    Raises:
        ModelError: the folder has none, or it is not readable.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        raise ModelError(f"{str(folder)!r} has no {REPORT_NAME}. Give a folder that `mezzotint quantize` made.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{str(path)!r} is not valid JSON ({error}). Quantize again.") from error
