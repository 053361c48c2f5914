"""How long one token takes on this machine: measured matrix by matrix and added up, with a constant for the rest."""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mezzotint.core.contracts import Grid, Transform
from mezzotint.engines.packed import QuantizedLinear
from mezzotint.formats.native import Scheme
from mezzotint.models import Source
from mezzotint.models.skeleton import quiet

_REPEATS = 9
_FLUSHED = 96 * 2**20  # bytes that are touched before every measurement, for weights to come from memory
_TOKENS = 24
_PROMPT = 8


class Latency:
    """Seconds of one token through packed matrices, as the engine runs them, with weights that come from memory.

    What was measured once is kept in a file, by shape, grid, processor, threads and versions.

    Args:
        cache: the file; None is ``mezzotint/latency.json`` in the user's cache folder.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._path = cache or _cache_folder() / "latency.json"
        self._known: dict[str, float] = {}
        if self._path.is_file():
            try:
                self._known = json.loads(self._path.read_text(encoding="utf-8"))
            except ValueError:
                self._known = {}  # a damaged file is measured again and replaced
        self._flush = torch.zeros(0)

    def seconds(self, shape: tuple[int, int], grid: Grid, transform: Transform | None) -> float:
        """Of one token through a matrix ``[out, in]``."""
        scheme = Scheme(shape=shape, grid=grid, transform=transform)
        return self._kept(f"{shape} {grid!r} {transform!r}", lambda: self._measure(scheme))

    def constant(self, source: Source, without: Collection[str]) -> float:
        """Of one token through everything else: generation with the model's linears taken out.

        Args:
            source: the original.
            without: matrices that count by themselves.
        """
        text = json.dumps(source.config.to_dict(), sort_keys=True, default=str)
        key = f"{text} {sorted(without)}"
        return self._kept(key, lambda: _generation(source, without))

    def _kept(self, key: str, measure: Callable[[], float]) -> float:
        versions = [version(name) for name in ("mezzotint", "torch", "transformers")]
        name = json.dumps([_processor(), torch.get_num_threads(), *versions, key])
        if name not in self._known:
            self._known[name] = measure()
        return self._known[name]

    def save(self) -> None:
        """Keep what was measured, for the next run; where it cannot be kept, it is measured again."""
        partial: Path | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent)
            partial = Path(name)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self._known, file, indent=1)
            partial.replace(self._path)
        except OSError:
            if partial is not None:
                partial.unlink(missing_ok=True)

    def _measure(self, scheme: Scheme) -> float:
        linear = QuantizedLinear(scheme)
        x = torch.zeros(1, 1, scheme.shape[1], dtype=torch.bfloat16)
        if not len(self._flush):
            self._flush = torch.zeros(_FLUSHED // 4)
        linear(x)
        found = []
        for _ in range(_REPEATS):
            self._flush.add_(1)
            started = time.perf_counter()
            linear(x)
            found.append(time.perf_counter() - started)
        return statistics.median(found)


class _Nothing(nn.Module):
    """In the place of a linear: zeros of the right shape."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros((*x.shape[:-1], self._rows))


def _generation(source: Source, without: Collection[str]) -> float:
    """Seconds a token of a greedy generation in bfloat16, all weights zero, with some linears taken out."""
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(source.config, dtype=torch.bfloat16)
    for name in without:
        matrix = source.map.matrices[name]
        path, _, attribute = matrix.parameter.rpartition(".")
        if attribute == "weight" and isinstance(model.get_submodule(path), nn.Linear):
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, _Nothing(matrix.shape[0]))
    buffers = {name: buffer for name, buffer in source.skeleton.named_buffers() if buffer.device.type != "meta"}
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name]) if name in buffers else buffer.zero_()
    model.eval()
    tokens = torch.zeros(1, _PROMPT, dtype=torch.long)
    options: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(tokens), "eos_token_id": None}
    generate: Any = model.generate
    found = []
    with torch.no_grad(), quiet():
        generate(tokens, max_new_tokens=2, **options)
        for _ in range(3):
            started = time.perf_counter()
            generate(tokens, max_new_tokens=_TOKENS, **options)
            found.append((time.perf_counter() - started) / _TOKENS)
    return statistics.median(found)


def _processor() -> str:
    """Its name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mezzotint"
