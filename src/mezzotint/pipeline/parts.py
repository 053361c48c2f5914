"""Which linears of a block make a submodule, and which blocks have none."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mezzotint.core.contracts import Block, Matrix, ModelMap
from mezzotint.core.files import Entry
from mezzotint.errors import ConfigError
from mezzotint.models import Source
from mezzotint.models.inner import attention_observable
from mezzotint.submodules.batches import Linear
from mezzotint.submodules.lpcd import AROUND, MEMBERS, Lpcd, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the linear of a role lies.

    Attributes:
        rows: of the matrix; None is all of them.
        linear: path of the module that multiplies.
        group: number of its input group.
    """

    matrix: Matrix
    rows: Tensor | None
    linear: str
    group: int

    @property
    def around(self) -> str:
        """Path of the module around the linear."""
        return self.linear.rpartition(".")[0]

    def current(self, skeleton: nn.Module) -> Linear:
        """Its rows as they are in the module now; a view where all rows are its own."""
        bias = None if self.matrix.bias is None else skeleton.get_parameter(self.matrix.bias).data
        return self.of(self.matrix.view(skeleton.get_parameter(self.matrix.parameter).data), bias)

    def of(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Its rows of a whole matrix."""
        if self.rows is None:
            return Linear(weight, bias)
        return Linear(weight[self.rows], None if bias is None else bias[self.rows])

    def into(self, outputs: Tensor) -> Tensor:
        """Outputs of its rows among those of the whole matrix, the others zero."""
        if self.rows is None:
            return outputs
        whole = outputs.new_zeros(*outputs.shape[:-1], self.matrix.shape[0])
        return whole.index_copy(-1, self.rows, outputs)

    def replaced(self, whole: Tensor, weight: Tensor) -> Tensor:
        """A matrix with its rows replaced, as a new tensor."""
        return weight.to(whole) if self.rows is None else whole.index_copy(0, self.rows, weight.to(whole))


def places(block: Block, model: ModelMap, device: torch.device | str = "cpu") -> dict[str, Place]:
    """The linears of a block by their roles; roles that several matrices have are left out."""
    groups = {name: number for number, group in enumerate(block.groups) for name in group.matrices}
    found: dict[str, list[Place]] = {}
    for role in block.roles:
        matrix = model.matrices[role.matrix]
        rows = None if role.rows is None else role.rows().to(device)
        linear = matrix.parameter.rpartition(".")[0]
        found.setdefault(role.kind, []).append(
            Place(matrix=matrix, rows=rows, linear=linear, group=groups[role.matrix])
        )
    return {kind: several[0] for kind, several in found.items() if len(several) == 1}


def settings_of(entries: Iterable[Entry]) -> Lpcd | None:
    """The settings that all matrices of blocks share."""
    return next((entry.submodules for entry in entries if isinstance(entry.submodules, Lpcd)), None)


def active_parts(block: Block, settings: Lpcd, entries: Mapping[str, Entry], model: ModelMap) -> Iterator[Part]:
    """Parts of which every member is quantized in this block."""
    found = places(block, model)
    for part in settings.parts:
        if all(kind in found and found[kind].matrix.name in entries for kind in MEMBERS[part]):
            yield part


def check_parts(source: Source, entries: Sequence[Entry]) -> None:
    """Refuse submodules that a model does not have, before any work.

    Raises:
        ConfigError: the settings differ between matrices, or a block lacks what a part needs; says which and why.
    """
    settings = settings_of(entries)
    if settings is None:
        return
    if any(entry.submodules != settings for entry in entries if entry.block is not None):
        raise ConfigError(
            "a rule changes 'submodules', which are settings of whole blocks. Set them for all matrices, and leave "
            "some out of a part with {match: ..., keep: true}."
        )
    quantized = {entry.matrix for entry in entries}
    attention: dict[str, str] = {}
    for block in source.map.blocks:
        found = places(block, source.map)
        own = {role.matrix for role in block.roles if role.matrix in quantized}
        for part in settings.parts:
            if any(name in quantized for group in block.groups for name in group.matrices):
                reason = _lacking(part, found, block, touched=bool(own))
                if reason is not None:
                    raise _refused(block, part, reason, settings)
        if {"qk", "vo"} & set(settings.parts) and "q" in found:
            attention[block.path] = found["q"].around
    seen = attention_observable(source.skeleton, attention) if attention else set()
    for block in source.map.blocks:
        if block.path in attention and block.path not in seen:
            part = next(part for part in settings.parts if part != "updown")
            reason = "its attention is not called through transformers' interface, so its heads cannot be seen"
            raise _refused(block, part, reason, settings)


def _lacking(part: Part, found: Mapping[str, Place], block: Block, *, touched: bool) -> str | None:
    needed = (*MEMBERS[part], *AROUND[part])
    missing = [kind for kind in needed if kind not in found]
    experts = any(group.experts for group in block.groups)
    if missing:
        several = [kind for kind in missing if any(role.kind == kind for role in block.roles)]
        if several:
            return f"{several[0]!r} is the role of several matrices" + (" (experts)" if experts else "")
        return f"no matrix is known to have the role {missing[0]!r}" + ("" if touched else "; no role is known at all")
    if part == "updown" and found["up"].around != found["down"].around:
        return "up and down lie in different modules"
    return None


def _refused(block: Block, part: str, reason: str, settings: Lpcd) -> ConfigError:
    rest = [other for other in settings.parts if other != part]
    remedy = f"--set submodules.parts=[{','.join(rest)}]" if rest else "--set submodules.kind=none"
    return ConfigError(f"submodule {part!r} of {block.path} cannot be optimised: {reason}. Use {remedy}.")
