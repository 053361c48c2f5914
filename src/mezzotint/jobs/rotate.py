"""Rotating a model folder into another one that computes the same (QuaRot, arXiv 2404.00456; SpinQuant, 2405.16406)."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.blockwise.bypass import Bypass, Passage, surroundings
from mezzotint.blockwise.source import open_original
from mezzotint.core.plans import TensorSpec
from mezzotint.errors import ConfigError, MezzotintError, ModelError, WriteError, unknown
from mezzotint.jobs.ending import Ending
from mezzotint.models import Source, dematerialize, materialize
from mezzotint.models.rotations import refuses_stream, rotate_heads, rotate_stream
from mezzotint.storage.folder import WEIGHTS, OutputFolder
from mezzotint.storage.shards import ShardWriter
from mezzotint.storage.stores import Budget, Shelf
from mezzotint.transforms.rotation import rotation

KINDS = ("hadamard", "random", "none")
DTYPES: Mapping[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# What norms that compute in float32 leave of a float64 pass through all blocks; something forgotten changes everything.
_SAME = 1e-4
_TRIED = (2, 24)  # windows of random tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotations:
    """What to rotate.

    Attributes:
        residual: the residual stream (R1): ``hadamard``, ``random`` or ``none``.
        heads: the values of heads (R2), one rotation a block, by the same choices.
        untie: a head that is the embedding may become a matrix of its own.
        dtype: of the rotated tensors; None is the checkpoint's.
        seed: of the rotations.
    """

    residual: str = "hadamard"
    heads: str = "hadamard"
    untie: bool = False
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for what, value in (("--residual", self.residual), ("--heads", self.heads)):
            if value not in KINDS:
                raise ConfigError(unknown(what, value, KINDS))
        if self.residual == self.heads == "none":
            raise ConfigError(
                "--residual and --heads are both none, so there is nothing to rotate. Set one of them to "
                "hadamard or random."
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(unknown("--dtype", self.dtype, DTYPES))


def rotate(
    model: Path,
    out: Path,
    rotations: Rotations,
    *,
    resume: bool = False,
    trust_remote_code: bool = False,
    step: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Write a folder whose model computes what ``model`` computes, from rotated weights.

    Before anything is written, both models run on random tokens block by block in float64, and must agree.

    Args:
        model: folder of the original.
        out: folder to make; it must not exist, or be empty.
        rotations: see there.
        resume: take the place of an interrupted rotation of the same model, from its start.
        trust_remote_code: run Python code from the folder.
        step: told of blocks done.

    Returns:
        ``out``, ``seconds``, ``output_bytes`` and ``difference``, the largest difference of logits over the largest
        logit.

    Raises:
        ModelError: the model cannot be rotated exactly; the message says where, and what can be done.
        OutputError: the place is taken, or the disk is full.
        WriteError: the disk failed; where the result is complete, it stays, and ``resume`` moves it to its place.
    """
    started = time.perf_counter()
    plain, turned = (open_original(model, trust_remote_code=trust_remote_code) for _ in range(2))
    stream = _add_rotations(turned, rotations)
    place, ending = OutputFolder(out, resume=resume), Ending(plain.folder, trusted=trust_remote_code)
    specs, untied = _specs(turned, rotations)
    config = _config(ending, untied is not None, rotations.dtype)
    ending.rehearse(config, None)
    identity = {"model": str(plain.folder.absolute()), "files": ending.stamps(), **asdict(rotations)}
    size = sum(spec.nbytes for spec in specs)
    place.begin("rotate", WEIGHTS, identity, needed=size)
    result = place.complete
    if result is None:
        try:
            place.clear()
            with torch.no_grad():
                difference = _compared(plain, turned, stream, step)
            _write(turned, rotations, place.partial, specs, untied)
            place.announce(ending.names)
            ending.write_config(place.partial, config)
        except BaseException as error:
            place.discard()
            if isinstance(error, OSError) and not isinstance(error, MezzotintError):
                raise WriteError(str(error)) from error
            raise
        result = {
            "out": str(out),
            "seconds": time.perf_counter() - started,
            "output_bytes": size,
            "difference": difference,
            **({"warnings": ending.warnings} if ending.warnings else {}),
        }
    place.finish(result)
    return dict(result)


def _add_rotations(source: Source, rotations: Rotations) -> Tensor | None:
    """Changes of every parameter; gives the rotation of the stream."""
    name, stream = source.folder.name, None
    if rotations.residual != "none":
        why = refuses_stream(source, untie=rotations.untie)
        if why is not None:
            raise ModelError(f"the residual stream of {name!r} cannot be rotated: {why}.")
        norms = [group.norm for block in source.map.blocks for group in block.groups] + [source.map.final_norm]
        keeps_mean = any(edge is not None and edge.has_mean for edge in norms)
        width = source.map.matrices[source.map.embedding].shape[1]
        stream = rotation(width, rotations.seed, rotations.residual, keeps_mean=keeps_mean)  # type: ignore[arg-type]
        rotate_stream(source, stream)
    if rotations.heads != "none":
        for block in source.map.blocks:
            seed = rotations.seed + 1 + block.index
            why = rotate_heads(source, block, lambda n, seed=seed: rotation(n, seed, rotations.heads))  # type: ignore[arg-type]
            if why is not None:
                raise ModelError(f"the heads of {block.path} cannot be rotated: {why}. Leave them with --heads none.")
    return stream


def _compared(plain: Source, turned: Source, stream: Tensor | None, step: Callable[[int, int], None]) -> float:
    """Run both models side by side; gives the relative difference of their logits.

    Raises:
        ModelError: they part; says where.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = plain.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, _TRIED, generator=generator)
    back = (lambda hidden: hidden) if stream is None else (lambda hidden: hidden @ stream.t())
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}

    def check(where: str, expected: Tensor, found: Tensor) -> float:
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference < _SAME:
            raise ModelError(
                f"{plain.folder.name!r} cannot be rotated: {where} computes something else afterwards (by "
                f"{difference:.2g} of its largest value), so it is not made of norms, linears and sums only. "
                "Try --residual none or --heads none."
            )
        return difference

    with surroundings(plain, head=True, **wide) as first, surroundings(turned, head=True, **wide) as second:
        (expected, calls), (found, others) = (bypass.record(tokens, None) for bypass in (first, second))
        shelf = Shelf(Budget(None), Path())
        ways = Passage(calls, shelf), Passage(others, shelf)
        check("the embedding", expected, back(found))
        for block in plain.map.blocks:
            outputs = []
            for source, hidden, passage in ((plain, expected, ways[0]), (turned, found, ways[1])):
                module = source.skeleton.get_submodule(block.path)
                materialize(module, block.path, source.checkpoint, **wide)
                outputs.append(passage.through(module, block.index, hidden))
                dematerialize(module)
            expected, found = outputs
            check(block.path, expected, back(found))
            step(block.index + 1, len(plain.map.blocks))
        positions = torch.arange(_TRIED[1])
        return check("the head", *(_logits(b, tokens, h, positions) for b, h in ((first, expected), (second, found))))


def _logits(bypass: Bypass, tokens: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
    return bypass.logits(tokens, hidden, positions)


def _specs(turned: Source, rotations: Rotations) -> tuple[list[TensorSpec], str | None]:
    """All tensors of the rotated model, and the head if it becomes one that the original has not."""
    checkpoint, head = turned.checkpoint, turned.map.matrices.get(turned.map.head or "")
    untied = head.parameter if rotations.residual != "none" and head is not None and head.tied_to else None
    dtype = None if rotations.dtype is None else DTYPES[rotations.dtype]
    conversions = {conversion.key: conversion for conversion in checkpoint.conversions.values()}
    owners = {name: c.key for c in conversions.values() for p in c.parameters for name in checkpoint.sources(p)}
    specs = []
    for name, info in checkpoint.tensors.items():
        recast = dtype is not None and info.dtype.is_floating_point and name in owners
        specs.append(TensorSpec(name, dtype if recast and dtype else info.dtype, tuple(info.shape)))
    by_name = {spec.name: spec for spec in specs}
    if untied is not None and untied not in by_name:
        embedding = by_name[checkpoint.sources(turned.map.matrices[turned.map.embedding].parameter)[0]]
        by_name[untied] = embedding._replace(name=untied)
    return list(by_name.values()), untied


def _write(turned: Source, rotations: Rotations, folder: Path, specs: list[TensorSpec], untied: str | None) -> None:
    """All tensors."""
    checkpoint, by_name = turned.checkpoint, {spec.name: spec for spec in specs}
    conversions = {conversion.key: conversion for conversion in checkpoint.conversions.values()}
    changed = {c.key: any(p in checkpoint.rewriting for p in c.parameters) for c in conversions.values()}
    with ShardWriter(folder, specs) as writer:

        def put(name: str, value: Tensor) -> None:
            writer.put(name, value.to(by_name[name].dtype).contiguous())

        if untied is not None:
            put(untied, checkpoint.parameter(untied))
        for conversion in conversions.values():
            if changed[conversion.key] or rotations.dtype is not None:
                values = {p: checkpoint.parameter(p) for p in conversion.parameters}
                for name, value in checkpoint.restore(values).items():
                    if name != untied:
                        put(name, value)
        for name in writer.missing:
            info = checkpoint.tensors[name]
            writer.copy(name, info.path, info.offset)


def _config(ending: Ending, untied: bool, dtype: str | None) -> dict[str, Any]:
    """The original's config.json, with what changed."""
    config = ending.config()
    inner = [config, *(part for part in config.values() if isinstance(part, dict) and "tie_word_embeddings" in part)]
    if untied:
        for part in inner:
            part["tie_word_embeddings"] = False
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    return config
