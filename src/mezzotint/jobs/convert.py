"""From one packed format to another: the same codes and scales, or a refusal that says why not."""

import json
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.blockwise.source import open_packed
from mezzotint.core.contracts import Matrix, QuantizedWeight
from mezzotint.core.plans import Entry, Format, PackedWeight, Plan, TensorSpec
from mezzotint.errors import ConfigError, FormatError, MezzotintError, ModelError, WriteError
from mezzotint.formats.engine_rules import ANY, engines
from mezzotint.formats.gguf.format import FILE
from mezzotint.formats.regrid import INTEGERS, as_integers
from mezzotint.jobs.ending import Ending, names_of_tensors
from mezzotint.models import Source
from mezzotint.planning.format import stored_bits
from mezzotint.planning.plan import matrices_in_order
from mezzotint.recipes.request import check_engine
from mezzotint.registry import FORMATS, ROUNDINGS, TARGETS
from mezzotint.report.report import REPORT_NAME, read_report
from mezzotint.storage.folder import OutputFolder
from mezzotint.storage.shards import ShardWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class _Conversion:
    """What is converted, checked.

    Attributes:
        packed: weights of the source by matrix.
        dtype: of the model's dense tensors.
    """

    source: Source
    packed: Mapping[str, PackedWeight]
    form: Format
    plan: Plan
    specs: tuple[TensorSpec, ...]
    dtype: torch.dtype


def convert(
    folder: Path,
    out: Path,
    form: str,
    *,
    engine: str | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    step: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Write a quantized folder in another format: codes, scales and zero points stay what they are, bit for bit.

    Dense folders hold the values that the codes stand for, rounded to the model's dtype. Everything happens in
    ``out.partial``, which gets its name by one rename.

    Args:
        folder: that was quantized.
        out: folder to make; it must not exist, or be empty.
        form: name of the format.
        engine: that will run the result; None asks for what most load.
        resume: take the place of an interrupted conversion of the same folder, from its start.
        trust_remote_code: run Python code from the folder.
        step: told of matrices done.

    Returns:
        ``out``, ``from``, ``format``, ``seconds``, ``output_bytes``, ``matrices``.

    Raises:
        ConfigError: an unknown format or engine, or nothing to convert.
        FormatError: the format cannot hold a matrix, or the engine cannot load it; a tensor is damaged.
        ModelError: a file that goes along, or the report, cannot be read.
        OutputError: the place is taken, or the disk is full.
        WriteError: the disk failed; where the result is complete, it stays, and ``resume`` moves it to its place.
    """
    started = time.perf_counter()
    check_engine(engine, form)
    made = _planned(folder, form, engine, trust_remote_code=trust_remote_code)
    place = OutputFolder(out, resume=resume)
    ending = Ending(made.source.folder, trusted=trust_remote_code)
    before, config = _format_of(folder), _config(made, ending)
    ending.rehearse(config, None)
    _check_report(folder, made, ending, before=before)
    identity = {"folder": str(folder.absolute()), "files": ending.stamps(), "format": form, "engine": engine}
    place.begin("convert", names_of_tensors(form), identity, needed=made.plan.bytes * made.form.copies)
    result = place.complete
    if result is None:
        try:
            place.clear()
            size = _write(made, place, config, ending, step)
            report = _report(folder, made, before=before, size=size, out=out.name)
            if report is not None:
                ending.write_report(place.partial, report)
        except BaseException as error:
            place.discard()  # nothing in it is worth keeping: it takes seconds to make
            if isinstance(error, OSError) and not isinstance(error, MezzotintError):
                raise WriteError(str(error)) from error
            raise
        result = {
            "out": str(out),
            "from": before,
            "format": form,
            "seconds": time.perf_counter() - started,
            "output_bytes": size,
            "matrices": len(made.plan.entries),
            **({"warnings": ending.warnings} if ending.warnings else {}),
        }
    place.finish(result)
    return dict(result)


def _planned(folder: Path, name: str, engine: str | None, *, trust_remote_code: bool) -> _Conversion:
    """Everything that can be decided from headers."""
    source, packed = open_packed(folder, trust_remote_code=trust_remote_code)
    if not packed and (name != "dense" or not source.checkpoint.checkpoint.derived):
        raise ConfigError(
            f"{str(folder)!r} holds no packed weights, so there is nothing to convert. Quantize it: mezzotint quantize."
        )
    form: Format = FORMATS[name]()
    loading = engines()[engine or ANY]
    dtype = _dtype(source, packed)
    owners = _matrices(source, packed)
    if form.name in INTEGERS and any(weight.grid.kind == "gguf" for weight in owners.values()):
        owners = {matrix: as_integers(matrix, weight) for matrix, weight in owners.items()}
        dtype = torch.float16  # that of the scales: other checkpoints' engines would round them
    entries = []
    for block, matrix in matrices_in_order(source):
        if matrix.name not in owners:
            continue
        found = owners[matrix.name]
        entry = Entry(
            matrix=matrix.name,
            block=None if block is None else block.index,
            target=TARGETS["weight"](),
            transform=found.transform,
            grid=found.grid,
            rounding=ROUNDINGS["nearest"](),
            refinement=None,
            bits=found.grid.stored_bits(matrix.shape),  # the rest depends on the format
            because=f"converted from {folder.name}",
        )
        refusal = form.refuses(entry, matrix) or loading.refuses(
            name, entry, matrix, head=matrix.name == source.map.head
        )
        if refusal is not None:
            raise FormatError(f"{matrix.name} cannot be converted to {name} without loss: {refusal}")
        entries.append(replace(entry, bits=stored_bits(form, matrix, entry.grid, entry.basis)))
    form.check_source(source.folder, source.config.to_dict(), list(source.checkpoint.tensors))
    specs = _specs(source, form, entries, dtype)
    plan = Plan(
        entries=tuple(entries),
        kept={},
        format=name,
        engine=engine,
        bytes=sum(spec.nbytes for spec in specs),
        peak_memory_bytes=0,
        fingerprint="",
    )
    for refusal in (*form.refuses_plan(plan, source.map), *loading.refuses_plan(plan, source.map)):
        raise FormatError(f"{folder.name} cannot be converted to {name}: {refusal}")
    return _Conversion(source=source, packed=owners, form=form, plan=plan, specs=specs, dtype=dtype)


def _dtype(source: Source, packed: Mapping[str, PackedWeight]) -> torch.dtype:
    """Of the model's dense tensors: what its configuration says, or else what its scales have."""
    told = getattr(source.config, "dtype", None)
    if told is None:
        return next((weight.dtype for weight in packed.values()), torch.float32)
    return told if isinstance(told, torch.dtype) else getattr(torch, str(told).removeprefix("torch."))


def _matrices(source: Source, packed: Mapping[str, PackedWeight]) -> dict[str, PackedWeight]:
    """Packed weights by the canonical name of their matrix."""
    owners = {
        matrix.sources[0]: matrix
        for matrix in source.map.matrices.values()
        if len(matrix.sources) == 1 and matrix.expert is None and matrix.tied_to is None
    }
    for name in packed:
        if name not in owners:
            raise FormatError(f"{name} is packed, and no matrix of the model is stored so; it cannot be converted.")
    return {owners[name].name: weight for name, weight in packed.items()}


def _specs(source: Source, form: Format, entries: list[Entry], dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    """The tensors of the result, in the order of the source's."""
    packed: dict[str, tuple[TensorSpec, ...]] = {}
    for entry in entries:
        matrix = source.map.matrices[entry.matrix]
        packed[matrix.sources[0]] = form.specs(matrix, entry.grid, dtype, entry.transform)
    derived = source.checkpoint.checkpoint.derived
    specs: list[TensorSpec] = []
    for name, info in source.checkpoint.tensors.items():
        plain = TensorSpec(name, dtype if name in derived else info.dtype, tuple(info.shape))
        specs.extend(packed.get(name, (plain,)))
    return tuple(specs)


def _config(made: _Conversion, ending: Ending) -> dict[str, Any]:
    """The source's config.json, for the format."""
    config = ending.config()
    config.pop("quantization_config", None)
    if made.dtype != _dtype(made.source, made.packed):
        config.pop("torch_dtype", None)
        config["dtype"] = str(made.dtype).removeprefix("torch.")
    quantization = made.form.config(made.plan, made.source.map)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    return config


def _write(
    made: _Conversion,
    place: OutputFolder,
    config: Mapping[str, Any],
    ending: Ending,
    step: Callable[[int, int], None],
) -> int:
    """Fill the unfinished folder; gives the bytes of its tensors."""
    source, plan, form, folder = made.source, made.plan, made.form, place.partial
    with ShardWriter(folder, made.specs) as writer:
        for done, entry in enumerate(plan.entries):
            matrix = source.map.matrices[entry.matrix]
            weight = made.packed[entry.matrix].weight()
            tensors = form.tensors(matrix, weight, made.dtype)
            if form.name != "dense":
                _compare(form, matrix, entry, weight, tensors)
            for name, value in tensors.items():
                writer.put(name, value)
            step(done + 1, len(plan.entries))
        by_name = {spec.name: spec for spec in made.specs}
        for name in writer.missing:
            info = source.checkpoint.tensors[name]
            if name in source.checkpoint.checkpoint.derived:
                writer.put(name, source.checkpoint.checkpoint.read(name).to(by_name[name].dtype))
            else:
                writer.copy(name, info.path, info.offset)
    place.announce(ending.names)
    ending.write_config(folder, config)
    return form.finish(folder, source.config.to_dict(), plan, source.map)


def _compare(
    form: Format, matrix: Matrix, entry: Entry, weight: QuantizedWeight, tensors: Mapping[str, Tensor]
) -> None:
    """Read back what will be written: a conversion that changes a code is no conversion."""
    again = form.weight(matrix, tensors, entry.grid, entry.transform)
    same = torch.equal(again.code, weight.code) and again.grid.parameters.keys() == weight.grid.parameters.keys()
    for name, value in weight.grid.parameters.items():
        same = same and torch.equal(again.grid.parameters[name], value)
    assert same, f"{matrix.name}: {form.name} gives back other codes or parameters"


def _format_of(folder: Path) -> str:
    """The format of a folder, as its configuration tells."""
    if folder.suffix == ".gguf" or (folder / FILE).is_file():
        return "gguf"
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return "gptq-v2" if found.get("checkpoint_format") == "gptq_v2" else found["quant_method"]


def _check_report(folder: Path, made: _Conversion, ending: Ending, *, before: str) -> None:
    """Render report and card once: a report that somebody has edited may lack what they are made of.

    Raises:
        ModelError: they cannot be made of it.
    """
    try:
        report = _report(folder, made, before=before, size=0, out="")
        ending.rehearse({}, report)
    except (LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{str(folder / REPORT_NAME)!r} is not a report of mezzotint ({type(error).__name__}: {error}). Remove it "
            "to convert without a report, or quantize again."
        ) from error


def _report(folder: Path, made: _Conversion, *, before: str, size: int, out: str) -> dict[str, Any] | None:
    """The source's report with what the conversion changed; None where the source has none."""
    if not (folder / REPORT_NAME).is_file():
        return None
    report = read_report(folder)
    shapes = [made.source.map.matrices[entry.matrix].shape for entry in made.plan.entries]
    weights = sum(rows * columns for rows, columns in shapes)
    stored = sum(entry.bits.total for entry in made.plan.entries)
    bits = {"bits_per_weight": stored / weights} if weights else {}
    engine = [] if made.plan.engine is None else ["--for", made.plan.engine]
    words = ["mezzotint", "convert", folder.name, "--out", out, "--format", made.plan.format, *engine]
    changed = {"format": made.plan.format, "engine": made.plan.engine, "bytes": made.plan.bytes, **bits}
    return {
        **report,
        **bits,
        "plan": {**report["plan"], **changed},
        "output_bytes": size,
        "command": f"{report['command']}\n{shlex.join(words)}",
        "converted_from": before,
    }
