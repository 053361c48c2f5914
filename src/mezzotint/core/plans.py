"""Plans and files: what will be done to each matrix, and how results become named tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.contracts import Bits, Grid, QuantizedWeight, Refinement, Rounding, Target, Transform
from mezzotint.core.curvature import Fisher
from mezzotint.core.structure import Matrix, ModelMap


@runtime_checkable
class Submodules(Protocol):
    """Settings of what optimises several linears of a block together, after each has been quantized."""

    kind: ClassVar[str]
    needs: ClassVar[frozenset[str]]


@runtime_checkable
class Compensation(Protocol):
    """Settings of a low-rank change that is stored beside a quantized matrix."""

    kind: ClassVar[str]
    needs: ClassVar[frozenset[str]]


class StepDown(NamedTuple):
    """What a matrix gets instead of what the recipe says, and why that cannot serve it."""

    what: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What will be done to one matrix, and why."""

    matrix: str
    block: int | None
    target: Target
    transform: Transform | None
    grid: Grid
    rounding: Rounding
    refinement: Refinement | None
    bits: Bits
    because: str
    submodules: Submodules | None = None
    compensation: Compensation | None = None
    curvature: Fisher | None = None
    steps_down: tuple[StepDown, ...] = ()

    @property
    def basis(self) -> Transform | None:
        """The transform whose basis the codes are in; None too where it is folded into the model beforehand."""
        return self.transform if self.transform is not None and self.transform.run_time else None

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that this entry must have."""
        transform = frozenset[str]() if self.transform is None else self.transform.needs
        refinement = frozenset[str]() if self.refinement is None else frozenset({"gram"})
        beside = [stage.needs for stage in (self.submodules, self.compensation) if stage is not None]
        own = self.target.needs | self.rounding.needs | self.grid.needs | transform | refinement
        return own.union(*beside)

    @property
    def judges(self) -> frozenset[str]:
        """Statistics of the held-out windows: those that decide something, and what the report measures errors in."""
        decides = self.refinement is not None or self.submodules is not None or self.target.decides
        return self.needs if decides else self.needs & {"gram"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that is decided before any weight is read.

    Attributes:
        entries: matrices that are quantized, in running order.
        kept: matrices that stay as they are, with the reason.
        bytes: of the output's tensors.
        fingerprint: of everything that determines the result; a run resumes only under the same one.
    """

    entries: tuple[Entry, ...]
    kept: Mapping[str, str]
    format: str
    engine: str | None
    bytes: int
    peak_memory_bytes: int
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a format cannot hold an entry.

    Attributes:
        rule: short name of the rule, e.g. ``ragged-group``.
        nearest: the closest grid that it can hold, if there is one.
    """

    rule: str
    what: str
    value: str
    limit: str
    remedy: str
    nearest: Grid | None = None

    def __str__(self) -> str:
        return f"{self.what}: {self.value}; {self.limit}. {self.remedy} [{self.rule}]"


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor that will be written: what a file's header needs."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        count = 1
        for n in self.shape:
            count *= n
        return count * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """One weight of a packed folder.

    Attributes:
        parts: names of the tensors that store it; the first holds the codes.
        dtype: what dense values are rounded to by engines: that of the scales in stock formats.
        grid: that it is on.
        transform: whose basis the codes are in, or None.
        weight: reads the parts, and checks them.
    """

    parts: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, int]
    grid: Grid
    transform: Transform | None
    weight: Callable[[], QuantizedWeight]

    def dense(self) -> Float[Tensor, "out in"]:
        """Its values, unrounded, in float32."""
        return self.weight().dense()


@runtime_checkable
class Format(Protocol):
    """Named tensors of quantized matrices, both ways, and the rules of the engines that read them.

    Attributes:
        copies: how often the output lies on the disk while it is finished.
    """

    name: ClassVar[str]
    copies: ClassVar[int]

    def refuses(self, entry: Entry, matrix: Matrix) -> Refusal | None:
        """The first rule that this entry breaks, or None."""
        ...

    def refuses_plan(self, plan: Plan, model: ModelMap) -> tuple[Refusal, ...]:
        """Rules about several matrices at once: fused classes, mixes."""
        ...

    def specs(
        self, matrix: Matrix, grid: Grid, dtype: torch.dtype, transform: Transform | None = None
    ) -> tuple[TensorSpec, ...]:
        """What ``tensors`` will give, known without weights; ``dtype`` is the checkpoint's."""
        ...

    def tensors(self, matrix: Matrix, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that store the matrix."""
        ...

    def weight(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], grid: Grid, transform: Transform | None = None
    ) -> QuantizedWeight:
        """The inverse of ``tensors``."""
        ...

    def config(self, plan: Plan, model: ModelMap) -> Mapping[str, object] | None:
        """The ``quantization_config`` of config.json, or None."""
        ...

    def packed(
        self, quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
    ) -> Mapping[str, PackedWeight] | None:
        """Every packed weight of a folder, by the name its dense weight would have; None of a folder of another format.

        ``quantization`` is the ``quantization_config`` of config.json; of ``tensors`` by name ``dtype`` and ``shape``
        are looked at; ``read`` gives one by name.
        """
        ...

    def check_source(self, folder: Path, config: Mapping[str, object], names: list[str]) -> None:
        """Raise a FormatError for a model that no engine of this format would run.

        ``config`` is that of transformers as a dictionary, ``names`` are those of the checkpoint's tensors.
        """
        ...

    def finish(self, folder: Path, config: Mapping[str, object], plan: Plan, model: ModelMap) -> int:
        """Turn the finished folder into what engines load; gives the bytes of its tensors."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPlan:
    """Calibration as it will be run."""

    source: str
    samples: int
    seqlen: int

    @property
    def tokens(self) -> int:
        """In all windows, held-out ones included."""
        return self.samples * self.seqlen
