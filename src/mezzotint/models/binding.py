"""Parameters of a model made from the tensors of a checkpoint, and back.

transformers renames, stacks, splits and transposes tensors when it loads a model, so names in files are not names of
parameters. Which tensors make which parameter is asked of its own conversion mapping, in both directions.
"""

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers import base as quantizers

from mezzotint.errors import ModelError
from mezzotint.models.checkpoint import Checkpoint, TensorInfo
from mezzotint.models.rewriting import Rewriting

SHOWN = 4  # names in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """Parameters and the tensors they are made of.

    Attributes:
        key: name that transformers gives the group: the first of the parameters.
        parameters: everything that the group makes.
        sources: names in the checkpoint, in the order in which they are collected.
        patterns: per source, the pattern of the converter that it met.
        plain: per source, its name after renaming: what the reversed converter calls it.
        converter: None for a tensor that is only renamed.
    """

    key: str
    parameters: tuple[str, ...]
    sources: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    converter: WeightConverter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundCheckpoint:
    """A checkpoint seen through the names of a model's parameters.

    Attributes:
        conversions: by parameter (and persistent buffer).
        aliases: parameters that share another one's tensor, with that one's name.
        copies: further checkpoint tensors with the same bytes as the parameter's.
        unbound: checkpoint tensors that nothing uses.
        rewriting: changes of every parameter that ``parameter`` reads; may be added to at any time.
    """

    checkpoint: Checkpoint
    skeleton: PreTrainedModel
    conversions: Mapping[str, Conversion]
    aliases: Mapping[str, str]
    copies: Mapping[str, tuple[str, ...]]
    unbound: tuple[str, ...]
    rewriting: Rewriting = field(default_factory=Rewriting)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The checkpoint's tensors, by the name they have in the files."""
        return self.checkpoint.tensors

    @property
    def merged(self) -> tuple[str, ...]:
        """Parameters that are made of several weights of the checkpoint, or would be in a quantized folder."""
        groups = {conversion.key: conversion for conversion in self.conversions.values()}.values()
        made = [
            conversion.key
            for conversion in groups
            if len(conversion.sources) > 1 and all(source.endswith(".weight") for source in conversion.sources)
        ]
        # transformers takes such modules apart wherever a folder is quantized (Llama 4's experts)
        apart = [
            f"{path}.{name}"
            for path, module in self.skeleton.named_modules()
            if type(module).__name__ in getattr(quantizers, "MODULES_TO_PATCH_FOR_QUANTIZATION", ())
            for name, _ in module.named_parameters(recurse=False)
        ]
        return (*made, *apart)

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has this parameter or persistent buffer."""
        return self.aliases.get(name, name) in self.conversions

    def sources(self, parameter: str, expert: int | None = None) -> tuple[str, ...]:
        """Names of the checkpoint tensors that a parameter is made of, or those of one expert of a stacked one."""
        owner = self.aliases.get(parameter, parameter)
        conversion = self._conversion(parameter)
        count = len(self.skeleton.get_parameter(owner)) if expert is not None else 0
        if expert is None or len(conversion.sources) == 1:
            return conversion.sources + self.copies.get(owner, ())
        chosen: list[str] = []
        for pattern in dict.fromkeys(conversion.patterns):
            members = [s for s, p in zip(conversion.sources, conversion.patterns, strict=True) if p == pattern]
            # one tensor per expert is collected in the order of experts; anything else holds all of them
            chosen.extend([members[expert]] if len(members) == count else members)
        return tuple(chosen)

    def parameter(self, name: str) -> Tensor:
        """A parameter or persistent buffer in the checkpoint's dtype; reads only the tensors it is made of.

        One that is rewritten is in float32 or wider.
        """
        conversion = self._conversion(name)
        if conversion.converter is None:
            value = self.checkpoint.read(conversion.sources[0])
        else:
            made = _convert(
                self.skeleton, conversion, [functools.partial(self.checkpoint.read, s) for s in conversion.sources]
            )
            value = made[self.aliases.get(name, name)]
        return self.rewriting.apply(name, value)

    def restore(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint tensors that make these parameters: the inverse of ``parameter``.

        Args:
            values: by parameter; what one converter makes from the same tensors must be given together.
        """
        owned: dict[str, Tensor] = {}
        for name, value in values.items():
            owner = self.aliases.get(name, name)
            if owner in owned and not torch.equal(owned[owner], value):
                raise ModelError(
                    f"{name} shares the tensor of {owner} in the checkpoint, but two different values were given. "
                    f"Give one of them."
                )
            owned[owner] = value
        restored: dict[str, Tensor] = {}
        for name, value in owned.items():
            conversion = self._conversion(name)
            if conversion.converter is None:
                restored.update(dict.fromkeys((*conversion.sources, *self.copies.get(name, ())), value))
            elif conversion.sources[0] not in restored:
                restored.update(self._revert(conversion, owned))
        return restored

    def _conversion(self, name: str) -> Conversion:
        owner = self.aliases.get(name, name)
        if owner not in self.conversions:
            raise ModelError(f"parameter {name!r} is not in the checkpoint {str(self.checkpoint.folder)!r}.")
        return self.conversions[owner]

    def _revert(self, conversion: Conversion, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = [name for name in conversion.parameters if name not in values]
        if missing:
            raise ModelError(
                f"{', '.join(missing[:SHOWN])} and {conversion.key} are made of the same checkpoint tensors "
                f"({', '.join(conversion.sources[:SHOWN])}). Give their values together."
            )
        assert conversion.converter is not None
        reverse: Any = conversion.converter.reverse_transform()
        key = ""
        for name in conversion.parameters:
            key, pattern = reverse.rename_source_key(name)
            assert pattern is not None, f"{name} was made by a converter that does not know it"
            reverse.add_tensor(key, name, pattern, values[name])
        made = reverse.convert(key, model=self.skeleton, config=self.skeleton.config)
        prefix = f"{self.skeleton.base_model_prefix}."
        names = dict(zip(conversion.plain, conversion.sources, strict=True))
        restored: dict[str, Tensor] = {}
        for plain, value in made.items():
            # the base model's prefix is added after conversion when the checkpoint lacks it, and the other way round
            spellings = (plain, plain.removeprefix(prefix), prefix + plain)
            found = next((names[s] for s in spellings if s in names), None)
            if found is None:
                raise ModelError(
                    f"{conversion.key} cannot be written back: transformers names a part {plain!r}, "
                    f"the checkpoint has {', '.join(conversion.sources[:SHOWN])}. Report this model."
                )
            restored[found] = _one(value).contiguous()
        return restored


def bind(checkpoint: Checkpoint, skeleton: PreTrainedModel) -> BoundCheckpoint:
    """Connect the tensors of ``checkpoint`` to the parameters and persistent buffers of ``skeleton``.

    Where config.json ties two parameters whose tensors are both in the files and differ, they are untied in the
    skeleton, as transformers does.

    Raises:
        ModelError: a parameter has no tensor, or one of another shape.
    """
    wanted = dict(skeleton.state_dict())
    conversions: dict[str, Conversion] = {}
    groups, unbound = _collect(checkpoint, skeleton, wanted)
    for group in groups:
        shapes = _shapes(checkpoint, skeleton, group)
        complete = replace(group, parameters=tuple(shapes))
        for name, shape in shapes.items():
            if name in wanted and shape != tuple(wanted[name].shape):
                raise ModelError(
                    f"{name} has shape {shape} in the checkpoint ({', '.join(group.sources[:SHOWN])}) and "
                    f"{tuple(wanted[name].shape)} by config.json. Use the config.json that belongs to the weights."
                )
            conversions[name] = complete
    aliases, copies = _ties(checkpoint, skeleton, conversions)
    _check_complete(checkpoint, skeleton, conversions, aliases)
    return BoundCheckpoint(
        checkpoint=checkpoint,
        skeleton=skeleton,
        conversions=conversions,
        aliases=aliases,
        copies=copies,
        unbound=tuple(unbound),
    )


def _collect(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, wanted: dict[str, Tensor]
) -> tuple[list[Conversion], list[str]]:
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = skeleton.base_model_prefix
    members: dict[str, list[tuple[str, str | None]]] = {}
    unbound: list[str] = []
    # converters rely on this order: expert 10 comes after expert 9
    for source in sorted(checkpoint.tensors, key=dot_natural_key):
        key, pattern = rename_source_key(source, renamings, converters, prefix, wanted)
        if key not in wanted and source in wanted:
            key, pattern = rename_source_key(source, [], [], prefix, wanted)
        if key in wanted:
            members.setdefault(key, []).append((source, pattern))
        else:
            unbound.append(source)
    groups = []
    for key, found in members.items():
        sources = tuple(source for source, _ in found)
        if found[0][1] is None:
            if len(sources) > 1:
                raise ModelError(f"{key} has several tensors: {', '.join(sources[:SHOWN])}. Remove all but one.")
            groups.append(Conversion(key=key, parameters=(key,), sources=sources))
            continue
        patterns = tuple(pattern or "" for _, pattern in found)
        plain = tuple(apply_renamings(source, renamings) for source in sources)
        converter = by_pattern[patterns[0]]
        groups.append(
            Conversion(key=key, parameters=(), sources=sources, patterns=patterns, plain=plain, converter=converter)
        )
    return groups, unbound


def _convert(
    skeleton: PreTrainedModel, conversion: Conversion, values: Sequence[Tensor | Callable[[], Tensor]]
) -> dict[str, Tensor]:
    assert conversion.converter is not None
    # a converter collects tensors in itself
    converter = copy.deepcopy(conversion.converter)
    for source, pattern, value in zip(conversion.sources, conversion.patterns, values, strict=True):
        converter.add_tensor(conversion.key, source, pattern, value)  # type: ignore[arg-type]
    try:
        made = converter.convert(conversion.key, model=skeleton, config=skeleton.config)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise ModelError(
            f"{conversion.key} cannot be made of {', '.join(conversion.sources[:SHOWN])} "
            f"({type(error).__name__}: {error}). Use the config.json that belongs to the weights."
        ) from error
    return {name: _one(value) for name, value in made.items()}


def _shapes(checkpoint: Checkpoint, skeleton: PreTrainedModel, group: Conversion) -> dict[str, tuple[int, ...]]:
    """Shapes of what a group makes, found by converting tensors without data."""
    infos = [checkpoint.tensors[source] for source in group.sources]
    if group.converter is None:
        return {group.key: infos[0].shape}
    made = _convert(skeleton, group, [torch.empty(i.shape, dtype=i.dtype, device="meta") for i in infos])
    return {name: tuple(value.shape) for name, value in made.items()}


def _one(value: Tensor | list[Tensor]) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _ties(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, conversions: Mapping[str, Conversion]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    aliases: dict[str, str] = {}
    copies: dict[str, tuple[str, ...]] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in (group for group in names.values() if len(group) > 1):
        there = [name for name in shared if name in conversions]
        for name in there[1:]:
            mine, other = conversions[there[0]].sources, conversions[name].sources
            if len(mine) == len(other) == 1 and checkpoint.same_bytes(mine[0], other[0]):
                aliases[name] = there[0]
                copies[there[0]] = (*copies.get(there[0], ()), *other)
            else:
                _untie(skeleton, name)
        if there:
            aliases.update({name: there[0] for name in shared if name not in conversions})
    return aliases, copies


def _untie(skeleton: PreTrainedModel, name: str) -> None:
    path, _, attribute = name.rpartition(".")
    module = skeleton.get_submodule(path)
    own = nn.Parameter(torch.empty_like(skeleton.get_parameter(name)), requires_grad=False)
    setattr(module, attribute, own)
    skeleton.all_tied_weights_keys.pop(name, None)


def _check_complete(
    checkpoint: Checkpoint,
    skeleton: PreTrainedModel,
    conversions: Mapping[str, Conversion],
    aliases: Mapping[str, str],
) -> None:
    patterns = skeleton._keys_to_ignore_on_load_missing or ()  # noqa: SLF001 (transformers has no public name for it)
    ignorable = [re.compile(pattern) for pattern in patterns]
    missing = [
        name
        for name, _ in skeleton.named_parameters(remove_duplicate=False)
        if name not in conversions and name not in aliases and not any(p.search(name) for p in ignorable)
    ]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise ModelError(
            f"{len(missing)} parameters have no tensor in {str(checkpoint.folder)!r}: {shown}. "
            "Use the config.json that belongs to the weights, or download all of them."
        )
