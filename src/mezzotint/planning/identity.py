"""Identity of a result: a short fingerprint of the plan, and everything that a resumed run must have in common."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from mezzotint.core.plans import CalibrationPlan, Entry
from mezzotint.models import Source
from mezzotint.planning.importance import Importance
from mezzotint.planning.planned import Planned
from mezzotint.recipes.request import Request

_CHUNK = 1 << 23


def checksums_of(source: Source, *, trusted: bool) -> dict[str, Any]:
    """CRC-32 of the files that a model is made of, all of which are read: weights, configuration, tokenizer, code.

    Args:
        source: the opened model.
        trusted: its Python code is run.
    """
    weights = sorted({info.path for info in source.checkpoint.tensors.values()})
    names = ["*token*", "vocab*", "merges.txt", *(["*.py"] if trusted else [])]
    beside = sorted({path for name in names for path in source.folder.glob(name) if path.is_file()})
    return {
        "model": {path.name: [path.stat().st_size, checksum_of(path)] for path in weights},
        "config": checksum_of(source.folder / "config.json"),
        "beside": {path.name: checksum_of(path) for path in beside},
    }


def identity_of(planned: Planned, checksums: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that determines the result, apart from the calibration text itself.

    Memory, the number of processes and the place of the files are no part of it.

    Args:
        planned: what will be done.
        checksums: `checksums_of` the model.
    """
    request = planned.request
    calibration = asdict(request.calibration)
    calibration.pop("source")  # the text itself is compared
    calibration["imatrix"] = planned.importance and planned.importance.checksum
    if planned.calibration is not None:
        calibration |= {"samples": planned.calibration.samples, "seqlen": planned.calibration.seqlen}
    entries = "\n".join(repr(entry) for entry in planned.plan.entries)
    return {
        "versions": {"mezzotint": version("mezzotint"), "torch": torch.__version__, "tf": transformers.__version__},
        "model": checksums["model"],
        "config": checksums["config"],
        "recipe": request.recipe.model_dump(mode="json"),
        "seed": request.seed,
        "device": request.device,
        "precision": planned.precision,
        "format": planned.plan.format,
        "engine": request.engine,
        "calibration": calibration,
        "plan": hashlib.sha256(entries.encode()).hexdigest(),
    }


def checksum_of(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    found = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            found = zlib.crc32(data, found)
    return found


def fingerprint_of(
    source: Source,
    request: Request,
    entries: list[Entry],
    calibration: CalibrationPlan | None,
    importance: Importance | None,
    *,
    precision: str,
) -> str:
    """Changes when anything that determines the result changes."""
    told = {
        "version": version("mezzotint"),
        "torch": torch.__version__,
        "config": {name: value for name, value in source.config.to_dict().items() if name != "_name_or_path"},
        "tensors": {n: [str(t.dtype), list(t.shape)] for n, t in source.checkpoint.tensors.items()},
        "entries": [[e.matrix, *(repr(s) for s in _stages_of(e))] for e in entries],
        "calibration": calibration and {**asdict(request.calibration), **asdict(calibration)},
        "importance": importance and importance.checksum,
        "seed": calibration and request.seed,
        "precision": calibration and precision,
        "engine": request.engine,
        "format": request.format,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _stages_of(entry: Entry) -> tuple[object, ...]:
    first = (entry.target, entry.transform, entry.grid, entry.rounding, entry.curvature, entry.refinement)
    return (*first, entry.submodules, entry.compensation)
