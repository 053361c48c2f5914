"""A job: one request with its model, its plan and its calibration samples, each made once and handed on."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from mezzotint.blockwise.source import open_original
from mezzotint.blockwise.streams import Resources, Streams
from mezzotint.calibration import Windows
from mezzotint.core.plans import CalibrationPlan, Entry
from mezzotint.models import Source
from mezzotint.planning.identity import checksums_of, identity_of
from mezzotint.planning.plan import make_plan
from mezzotint.planning.planned import Planned
from mezzotint.process.ranks import ALONE, Ranks
from mezzotint.recipes.request import Request
from mezzotint.storage.cache import Cache
from mezzotint.storage.saved import Saved
from mezzotint.sweep.calibrate import calibration_windows


class _Model:
    """What jobs of one model share; opened when it is first asked for."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.windows: dict[str, Windows] = {}

    @cached_property
    def source(self) -> Source:
        return open_original(self._request.model, trust_remote_code=self._request.trust_remote_code)

    @cached_property
    def cache(self) -> Cache:
        return Cache()

    @cached_property
    def checksums(self) -> Mapping[str, Any]:
        return checksums_of(self.source, trusted=self._request.trust_remote_code)


class Job:
    """One request with all that follows from it.

    Args:
        request: what is asked for.
        calibrate: plan calibration even where no stage needs it.
        model: opened by another job of the same model.

    Attributes:
        source: the original.
        planned: what will be done.
        cache: of the user.

    The model is opened, and the plan made, when they are first asked for: errors are raised there.
    """

    def __init__(self, request: Request, *, calibrate: bool = False, model: _Model | None = None) -> None:
        self.request = request
        self._calibrate = calibrate
        self._model = model or _Model(request)

    def of(self, request: Request, *, calibrate: bool = False) -> "Job":
        """Another request about the same model."""
        return Job(request, calibrate=calibrate, model=self._model)

    @property
    def source(self) -> Source:  # noqa: D102
        return self._model.source

    @property
    def cache(self) -> Cache:  # noqa: D102
        return self._model.cache

    @cached_property
    def planned(self) -> Planned:  # noqa: D102
        return make_plan(self.source, self.request, calibrate=self._calibrate)

    @property
    def checksums(self) -> Mapping[str, Any]:
        """Of the model's files, which are read once for it."""
        return self._model.checksums

    def identity(self) -> dict[str, Any]:
        """What a continued run must share with this one."""
        return identity_of(self.planned, self.checksums)

    def windows(self, progress: Callable[[int, int], None] = lambda *_: None) -> Windows:
        """The calibration samples of the plan; what the model writes itself is kept in the cache.

        Args:
            progress: told of samples done.

        Raises:
            CalibrationError: the text is missing, unreadable or too short, or the tokenizer does not fit the model.
            ConfigError: the model is too large to sample from within ``--memory``.
        """
        calibration = self.planned.calibration
        assert calibration is not None, "nothing needs calibration"
        told = {"plan": asdict(calibration), "asked": asdict(self.request.calibration), "seed": self.request.seed}
        key = json.dumps(told, sort_keys=True, default=str)
        if key not in self._model.windows:
            self._model.windows[key] = self._windows(calibration, told, progress)
        return self._model.windows[key]

    def _windows(
        self, calibration: CalibrationPlan, told: Mapping[str, Any], progress: Callable[[int, int], None]
    ) -> Windows:
        def read() -> Windows:
            return calibration_windows(self.source, calibration, self.request, progress)

        if calibration.source != "self":
            return read()
        depends_on = {
            "model": self.checksums,
            "plan": told["plan"],
            "seed": self.request.seed,
            "device": self.request.device,
        }
        found = self.cache.tensors("samples", depends_on, lambda: tensors_of(read()))
        return Windows(tokens=found["tokens"], mask=found.get("mask"), source="self")

    def determined(self, windows: Windows) -> dict[str, Any]:
        """What everything depends on that is measured of the original on calibration samples."""
        return {
            "model": self.checksums,
            "samples": digest_of(tensors_of(windows)),
            "seed": self.request.seed,
            "device": self.request.device,
            "precision": self.planned.precision,
        }

    def streams(
        self,
        windows: Windows,
        folder: Path,
        *,
        entries: Sequence[Entry] | None = None,
        saved: Saved | None = None,
        ranks: Ranks = ALONE,
    ) -> Streams:
        """The two streams on the calibration samples.

        Args:
            windows: of the plan.
            folder: where hidden states spill to.
            entries: what will ask for statistics; None is all of the plan.
            saved: hidden states of an interrupted run.
            ranks: that share the windows.
        """
        costs = self.planned.costs
        fit, held_out = windows.split(seed=self.request.seed)
        asking = self.planned.plan.entries if entries is None else entries
        return Streams(
            self.source,
            fit,
            held_out,
            Resources(
                folder=folder,
                stream_bytes=costs.stream_bytes,
                keep_runs=costs.keep_runs,
                panels=costs.panels,
                device=self.request.device,
                precision=self.planned.precision,
            ),
            original_fit=any(entry.needs & {"drift", "residual"} for entry in asking),
            saved=saved,
            ranks=ranks,
        )


def tensors_of(windows: Windows) -> dict[str, Tensor]:
    """By name; without padding there is no mask."""
    return {"tokens": windows.tokens, **({} if windows.mask is None else {"mask": windows.mask})}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors, their names and their shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
