"""Time of one token on this machine: the sum of measured times of all matrices, and a constant for the rest."""

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mezzotint.core.contracts import Grid, Transform
from mezzotint.engines.packed import QuantizedLinear
from mezzotint.formats.native import Scheme
from mezzotint.models import Source
from mezzotint.models.skeleton import quiet
from mezzotint.process.machine import cache_folder, processor_name

_REPEATS = 5
_LARGEST = 2**29  # bytes of copies; what is larger than any cache comes from memory
_BITS = 4  # that a weight is taken to have when it is guessed how much of a model lies in a cache
_TOKENS = 24
_PROMPT = 8


class Latency:
    """Seconds of one token through packed matrices, as the engine runs them.

    A token goes through all matrices of a model one after the other, so a matrix is measured among copies of itself
    that together are as large as the packed model: weights come from the cache or from the memory as they will then.

    What was measured once is kept in a file, by shape, grid, size of the model, processor, threads and versions.

    Args:
        weights: number of weights in all matrices.
        cache: the file; None is ``mezzotint/latency.json`` in the user's cache folder.
    """

    def __init__(self, weights: int, cache: Path | None = None) -> None:
        size = min(_LARGEST, weights * _BITS // 8)
        self._size = 1 << (size - 1).bit_length()
        self._path = cache or cache_folder() / "latency.json"
        self._known: dict[str, float] = {}
        if self._path.is_file():
            try:
                self._known = json.loads(self._path.read_text(encoding="utf-8"))
            except ValueError:
                self._known = {}  # a damaged file is measured again and replaced

    def seconds(self, shape: tuple[int, int], grid: Grid, transform: Transform | None) -> float:
        """Of one token through a matrix ``[out, in]``."""
        scheme = Scheme(shape=shape, grid=grid, transform=transform)
        return self._kept(f"{self._size} {shape} {grid!r} {transform!r}", lambda: self._measure(scheme))

    def constant(self, source: Source, schemes: Mapping[str, Scheme]) -> float:
        """Of one token through everything else: generation with packed matrices, less the time that these take.

        What a matrix takes in a model and not among its like, another program between two and code that is fetched
        again, is part of it.

        Args:
            source: the original.
            schemes: of the matrices that count by themselves; any ones that are likely.
        """
        packed = {name: scheme for name, scheme in schemes.items() if isinstance(_module(source, name), nn.Linear)}
        text = json.dumps(source.config.to_dict(), sort_keys=True, default=str)
        whole = self._kept(f"{text} {sorted(packed.items())!r}", lambda: _generation(source, packed))
        parts = sum(self.seconds(scheme.shape, scheme.grid, scheme.transform) for scheme in packed.values())
        return max(0.0, whole - parts)

    def _kept(self, key: str, measure: Callable[[], float]) -> float:
        versions = [version(name) for name in ("mezzotint", "torch", "transformers")]
        name = json.dumps([processor_name(), torch.get_num_threads(), *versions, key])
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
        nbytes = sum(math.prod(shape) * dtype.itemsize for dtype, shape in scheme.specs().values())
        copies = [_stand_in(scheme) for _ in range(1 + self._size // nbytes)]
        x = torch.ones(1, 1, scheme.shape[1], dtype=torch.bfloat16)
        found = []
        for _ in range(_REPEATS + 1):
            started = time.perf_counter()
            for linear in copies:
                linear(x)
            found.append((time.perf_counter() - started) / len(copies))
        return statistics.median(found[1:])


def _path(source: Source, name: str) -> str:
    """The module that multiplies with a matrix; a table that is the head as well is one there."""
    structure = source.map
    if name == structure.embedding and structure.head is not None:
        name = structure.head
    return structure.matrices[name].parameter.rpartition(".")[0]


def _module(source: Source, name: str) -> nn.Module:
    return source.skeleton.get_submodule(_path(source, name))


def _stand_in(scheme: Scheme, *, bias: bool = False) -> QuantizedLinear:
    """A packed linear of any codes, all of which stand for zero."""
    made = QuantizedLinear(scheme, bias=bias, dtype=torch.bfloat16)
    for value in made.stored.values():  # written, because untouched zeros are one page of memory for all
        value.zero_() if value.is_floating_point() else value.random_()
    return made


def _generation(source: Source, schemes: Mapping[str, Scheme]) -> float:
    """Seconds a token of a greedy generation in bfloat16, all weights zero, with packed matrices."""
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(source.config, dtype=torch.bfloat16)
    buffers = {name: buffer for name, buffer in source.skeleton.named_buffers() if buffer.device.type != "meta"}
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name]) if name in buffers else buffer.zero_()
    for name, scheme in schemes.items():
        bias = getattr(_module(source, name), "bias", None)
        model.set_submodule(_path(source, name), _stand_in(scheme, bias=bias is not None))
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
