"""The output's tensors, written as they come."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.core.contracts import Matrix, QuantizedWeight
from mezzotint.models import Source
from mezzotint.planning.planned import Planned
from mezzotint.storage.shards import ShardWriter
from mezzotint.storage.stores import check_finite

_CHECKED_BYTES = 2**30  # larger tensors are copied without a look, for the memory that a look would take


class Elsewhere:
    """The output on ranks that write nothing."""

    def put(self, matrix: Matrix, weight: QuantizedWeight) -> None:
        """The first rank has the matrix too."""

    def rewrite(self, parameters: Sequence[str]) -> None:
        """And these parameters."""

    def checkpoint(self) -> None:
        """There is no journal here."""

    def complete(self) -> None:
        """There is nothing to copy."""

    def close(self) -> None:
        """There are no files."""


class Output:
    """Writes quantized matrices and copies everything else.

    Args:
        source: the original.
        planned: says which tensors there are.
        folder: of the unfinished output.
        resume: continue what another process wrote there.
        journal_bytes: up to where its journal counts, see `checkpoint`.
    """

    def __init__(
        self,
        source: Source,
        planned: Planned,
        folder: Path,
        *,
        resume: bool = False,
        journal_bytes: int | None = None,
    ) -> None:
        self._source = source
        self._planned = planned
        self._writer = ShardWriter(folder, planned.layout.specs, resume=resume, journal_bytes=journal_bytes)
        self._quantized = {entry.matrix for entry in planned.plan.entries}
        self._waiting: dict[frozenset[str], dict[str, Tensor]] = {}
        self._missing: dict[frozenset[str], set[str]] = {}

    def put(self, matrix: Matrix, weight: QuantizedWeight) -> None:
        """Write one matrix, or keep it until the parameters it is written with are complete."""
        assembly = self._planned.layout.assembly_of(matrix.parameter)
        dtype = self._source.checkpoint.tensors[matrix.sources[0]].dtype
        if assembly is None:
            for name, value in self._planned.form.tensors(matrix, weight, dtype).items():
                self._writer.put(name, value)
            return
        values = self._waiting.setdefault(assembly, {})
        missing = self._missing.setdefault(assembly, self._matrices_of(assembly))
        if matrix.parameter not in values:
            # read in full first: experts and rows that are kept stay as they are
            values[matrix.parameter] = self._source.checkpoint.parameter(matrix.parameter).clone()
        matrix.view(values[matrix.parameter]).copy_(weight.dense(dtype))
        missing.discard(matrix.name)
        if not missing:
            self._assemble(assembly)

    def rewrite(self, parameters: Sequence[str]) -> None:
        """Write parameters that were changed, and that no matrix replaces, as the checkpoint gives them now."""
        # what is there already was written by the process before, from the same scales
        copied = set(self._planned.layout.copied).intersection(self._writer.missing)
        for parameter in parameters:
            if copied.isdisjoint(self._source.checkpoint.sources(parameter)):
                continue
            for name, value in self._source.checkpoint.restore(
                {parameter: self._source.checkpoint.parameter(parameter)}
            ).items():
                self._writer.put(name, value.to(self._source.checkpoint.tensors[name].dtype).contiguous())

    def complete(self) -> None:
        """Copy every tensor that nothing has replaced, byte for byte; check that everything is there, and sync."""
        missing, checkpoint = set(self._writer.missing), self._source.checkpoint
        # a bound may be infinite
        buffers = (name for name, _ in self._source.skeleton.named_buffers() if checkpoint.holds(name))
        unchecked = {name for buffer in buffers for name in checkpoint.sources(buffer)}
        for name in (name for name in self._planned.layout.copied if name in missing):
            info = self._source.checkpoint.tensors[name]
            if info.dtype.is_floating_point and info.nbytes <= _CHECKED_BYTES and name not in unchecked:
                check_finite(name, self._source.checkpoint.checkpoint.read(name))
            self._writer.copy(name, Path(info.path), info.offset)
        self._writer.close()

    def checkpoint(self) -> int | None:
        """Record durably what is written, and give the journal's length; None while matrices wait for others."""
        return None if self._waiting else self._writer.checkpoint()

    def close(self) -> None:
        """Close the files as they are, finished or not."""
        self._writer.release()

    def _matrices_of(self, assembly: frozenset[str]) -> set[str]:
        matrices = self._source.map.matrices.values()
        return {m.name for m in matrices if m.parameter in assembly and m.name in self._quantized}

    def _assemble(self, assembly: frozenset[str]) -> None:
        values = self._waiting.pop(assembly)
        for parameter in assembly - values.keys():
            values[parameter] = self._source.checkpoint.parameter(parameter)
        for name, value in self._source.checkpoint.restore(values).items():
            dtype: torch.dtype = self._source.checkpoint.tensors[name].dtype
            self._writer.put(name, value.to(dtype).contiguous())
