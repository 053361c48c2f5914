"""The format of our own: every grid in every basis, packed; docs/format.md has it byte by byte."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter
from torch import Tensor

from mezzotint.core.contracts import Basis, Grid, Matrix, ModelMap, QuantizedWeight, Transform
from mezzotint.core.plans import Entry, PackedWeight, Plan, Refusal, TensorSpec
from mezzotint.errors import FormatError, unknown
from mezzotint.formats.schemes import check_present
from mezzotint.formats.targets import module_of, refuses_tied
from mezzotint.registry import GRIDS, TRANSFORMS, Registry
from mezzotint.transforms.hadamard import Hadamard

METHOD = "mezzotint"
VERSION = 2
CHECKSUM = "weight_checksum"
_BASIS = "weight_basis_"
_UPDATE = "It was made by a later version, or is damaged: update mezzotint, or quantize the model again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one matrix is stored.

    Attributes:
        shape: ``(out, in)`` without padding.
        grid: without any ``auto``.
        transform: whose basis the codes are in, or None.
    """

    shape: tuple[int, int]
    grid: Grid
    transform: Transform | None

    def specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor, by its name in the module."""
        found = {f"weight_{name}": spec for name, spec in self.grid.specs(self.shape).items()}
        if self.transform is not None:
            found |= {_BASIS + name: spec for name, spec in self.transform.specs(self.shape).items()}
        return {**found, CHECKSUM: (torch.int64, (1,))}

    def restore(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The matrix from its tensors, by their names in the module; on their device, unchecked."""
        parts = {name.removeprefix("weight_"): value for name, value in tensors.items()}
        code, fitted = self.grid.restore(self.shape, parts)
        return QuantizedWeight(shape=self.shape, code=code, grid=fitted, basis=self.basis(parts))

    def basis(self, parts: Mapping[str, Tensor]) -> Basis | None:
        """The basis that the codes are in, from the tensors by their names less ``weight_``."""
        if self.transform is None:
            return None
        stored = {name: parts["basis_" + name] for name in self.transform.specs(self.shape)}
        return self.transform.restore(self.shape, stored)

    def verify(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Check that tensors are those that were written.

        Args:
            module: name, for messages.
            tensors: by their names in the module.

        Raises:
            FormatError: one is missing, or of another dtype or shape, or the checksum differs.
        """
        for name, (dtype, shape) in self.specs().items():
            if name not in tensors:
                raise FormatError(f"{module}.{name} is missing; the folder is damaged. Make or download it again.")
            found = tensors[name]
            if (found.dtype, tuple(found.shape)) != (dtype, shape):
                raise FormatError(
                    f"{module}.{name} is {found.dtype} of shape {tuple(found.shape)}; config.json says {dtype} of "
                    f"{shape}. Make or download the folder again."
                )
        stored, computed = int(tensors[CHECKSUM]), checksum({n: tensors[n] for n in self.specs()})
        if stored != computed:
            raise FormatError(
                f"{module} is damaged: its tensors have checksum {computed:08x}, not {stored & (2**64 - 1):08x} as "
                "when they were written. Make or download the folder again."
            )

    def settings(self) -> dict[str, Any]:
        """As config.json holds it."""
        transform = None if self.transform is None else _settings(self.transform)
        return {"shape": list(self.shape), "grid": _settings(self.grid), "transform": transform}


class Native:
    """Every grid in every basis, for ``nn.Linear`` and the token embedding; read by `mezzotint.engines` alone yet.

    Tensors per module: ``weight_NAME`` for every tensor of `Grid.specs`, ``weight_basis_NAME`` for every one of
    `Transform.specs`, and ``weight_checksum`` int64 ``[1]``, the CRC-32 of the others. Grids and transforms say
    themselves how they are stored: a new one needs no line here.
    """

    name: ClassVar[str] = METHOD
    copies: ClassVar[int] = 1

    def refuses(self, entry: Entry, matrix: Matrix) -> Refusal | None:
        """The first rule that this entry breaks, or None.

        Rules: ``linear-only``, ``tied``, ``mixed-rows``.
        """
        return _refuses_kind(matrix) or refuses_tied(matrix) or _refuses_mixing(entry, matrix)

    def refuses_plan(self, plan: Plan, model: ModelMap) -> tuple[Refusal, ...]:
        """Nothing: every matrix is on its own."""
        return ()

    def specs(
        self, matrix: Matrix, grid: Grid, dtype: torch.dtype, transform: Transform | None = None
    ) -> tuple[TensorSpec, ...]:
        """What `tensors` will give."""
        scheme = Scheme(shape=matrix.shape, grid=grid.resolve(matrix.shape, dtype), transform=transform)
        return tuple(TensorSpec(f"{_module(matrix)}.{name}", *spec) for name, spec in scheme.specs().items())

    def tensors(self, matrix: Matrix, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack one matrix."""
        stored = {f"weight_{name}": value for name, value in weight.grid.store(weight.code, matrix.shape).items()}
        if weight.basis is not None:
            stored |= {_BASIS + name: value for name, value in weight.basis.stored.items()}
        stored = {name: value.cpu().contiguous() for name, value in stored.items()}
        stored[CHECKSUM] = torch.tensor([checksum(stored)])
        return {f"{_module(matrix)}.{name}": value for name, value in stored.items()}

    def weight(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], grid: Grid, transform: Transform | None = None
    ) -> QuantizedWeight:
        """The inverse of `tensors`.

        Raises:
            FormatError: the tensors are not those that were written.
        """
        module = _module(matrix)
        inside = {name.removeprefix(module + "."): value for name, value in tensors.items()}
        scheme = Scheme(shape=matrix.shape, grid=grid, transform=transform)
        scheme.verify(module, inside)
        return scheme.restore(inside)

    def config(self, plan: Plan, model: ModelMap) -> Mapping[str, object]:
        """The ``quantization_config``: the distinct schemes, and the number of its scheme for every module."""
        schemes: dict[str, int] = {}
        modules: dict[str, int] = {}
        for entry in plan.entries:
            matrix = model.matrices[entry.matrix]
            scheme = Scheme(shape=matrix.shape, grid=entry.grid, transform=entry.basis)
            written = json.dumps(scheme.settings())
            modules[_module(matrix)] = schemes.setdefault(written, len(schemes))
        return {
            "quant_method": METHOD,
            "format_version": VERSION,
            "schemes": [json.loads(written) for written in schemes],
            "modules": modules,
        }

    def packed(
        self, quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
    ) -> Mapping[str, PackedWeight] | None:
        """The modules that ``quantization_config`` names.

        Raises:
            FormatError: another version, a packed weight that is not named, or a part that is missing.
        """
        if quantization.get("quant_method") != METHOD:
            return None
        schemes = read_schemes(quantization)
        for name in tensors:
            module = name.removesuffix("." + CHECKSUM)
            if module != name and module not in schemes:
                raise FormatError(
                    f"{module} is packed, but quantization_config does not name it; the folder is broken."
                )
        return {f"{module}.weight": _packed(module, scheme, tensors, read) for module, scheme in schemes.items()}

    def check_source(self, folder: Path, config: Mapping[str, object], names: list[str]) -> None:
        """Nothing: every model is read."""

    def finish(self, folder: Path, config: Mapping[str, object], plan: Plan, model: ModelMap) -> int:
        """Nothing is left to do; the size of the tensors."""
        return plan.bytes


def _packed(module: str, scheme: Scheme, tensors: Mapping[str, Any], read: Callable[[str], Tensor]) -> PackedWeight:
    parts = tuple(f"{module}.{part}" for part in scheme.specs())
    check_present(parts, tensors)

    def weight() -> QuantizedWeight:
        stored = {part: read(f"{module}.{part}") for part in scheme.specs()}
        scheme.verify(module, stored)
        return scheme.restore(stored)

    return PackedWeight(
        parts=parts,
        dtype=torch.float32,
        shape=scheme.shape,
        grid=scheme.grid,
        transform=scheme.transform,
        weight=weight,
    )


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of all tensors in the order of their names; what is called `CHECKSUM` is left out.

    Example:
        >>> hex(checksum({"b": torch.tensor([2], dtype=torch.uint8), "a": torch.tensor([1], dtype=torch.uint8)}))
        '0xb6cc4292'
    """
    crc = 0
    for name in sorted(tensors.keys() - {CHECKSUM}):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        crc = zlib.crc32(flat.numpy().data, crc)
    return crc


def read_schemes(quantization: Mapping[str, Any]) -> dict[str, Scheme]:
    """The scheme of every packed module, from the ``quantization_config`` of config.json.

    Raises:
        FormatError: an unknown version, grid, transform or setting, or a part that is missing.
    """
    version = quantization.get("format_version")
    if version != VERSION:
        raise FormatError(
            f"quantization_config has format_version {version!r}; this version reads {VERSION}. {_UPDATE}"
        )
    try:
        schemes = [
            Scheme(
                shape=TypeAdapter(tuple[int, int]).validate_python(tuple(found["shape"])),
                grid=_stage("grid", found["grid"], GRIDS),
                transform=None if found["transform"] is None else _stage("transform", found["transform"], TRANSFORMS),
            )
            for found in quantization["schemes"]
        ]
        return {str(module): schemes[number] for module, number in quantization["modules"].items()}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        what = f"misses {error}" if isinstance(error, KeyError) else f"cannot be read ({' '.join(str(error).split())})"
        raise FormatError(f"quantization_config {what}. {_UPDATE}") from error


def _stage(what: str, settings: Mapping[str, Any], registry: Registry) -> Any:
    values = dict(settings)
    kind = values.pop("kind")
    if kind not in registry:
        raise FormatError(f"quantization_config: {unknown(what, str(kind), registry)} {_UPDATE}")
    cls = registry[kind]
    known = {field.name for field in dataclasses.fields(cls)} - {"kind"}
    for name in values.keys() - known:
        raise FormatError(f"quantization_config: {unknown('setting', f'{what}.{name}', known)} {_UPDATE}")
    return TypeAdapter(cls).validate_python(values)


def _settings(stage: Any) -> dict[str, Any]:
    return {"kind": stage.kind, **dataclasses.asdict(stage)}


def _refuses_kind(matrix: Matrix) -> Refusal | None:
    whole = (
        (matrix.linear or matrix.lookup)
        and not matrix.transposed
        and matrix.expert is None
        and len(matrix.sources) == 1
    )
    if not whole or not matrix.sources[0].endswith(".weight"):
        return Refusal(
            rule="linear-only",
            what=matrix.name,
            value="not the weight of an nn.Linear or nn.Embedding that is stored alone",
            limit="the engine replaces these only",
            remedy="Keep it, or use --for dense.",
        )
    return None


def _refuses_mixing(entry: Entry, matrix: Matrix) -> Refusal | None:
    transform = entry.transform
    if not matrix.lookup or transform is None or (isinstance(transform, Hadamard) and transform.sides == "input"):
        return None
    return Refusal(
        rule="mixed-rows",
        what=f"transform of {matrix.name}",
        value=transform.kind,
        limit="rows that are looked up must not be mixed with others",
        remedy="Use transform.kind=hadamard with transform.sides=input, or none.",
    )


def _module(matrix: Matrix) -> str:
    return module_of(matrix.sources[0])
