"""Which linears of a block make a submodule, and which blocks have none."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mezzotint.core.contracts import Block, Matrix, ModelMap
from mezzotint.core.plans import Entry, StepDown
from mezzotint.errors import ConfigError
from mezzotint.models import Source
from mezzotint.models.inner import attention_unseen, underivable
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


def settings_of(block: Block, entries: Mapping[str, Entry]) -> Lpcd | None:
    """The settings that the matrices of a block share."""
    own = (entries[name] for group in block.groups for name in group.matrices if name in entries)
    return next((entry.submodules for entry in own if isinstance(entry.submodules, Lpcd)), None)


def active_parts(block: Block, settings: Lpcd, entries: Mapping[str, Entry], model: ModelMap) -> Iterator[Part]:
    """Parts of which every member is quantized in this block."""
    found = places(block, model)
    for part in settings.parts:
        if all(kind in found and found[kind].matrix.name in entries for kind in MEMBERS[part]):
            yield part


def with_possible_parts(source: Source, entries: Sequence[Entry]) -> list[Entry]:
    """The entries, each block with the submodules that it has; what is left out is said.

    Raises:
        ConfigError: the settings differ between matrices.
    """
    asked = next((entry.submodules for entry in entries if isinstance(entry.submodules, Lpcd)), None)
    if asked is None:
        return list(entries)
    if any(entry.submodules != asked for entry in entries if entry.block is not None):
        raise ConfigError(
            "a rule changes 'submodules', which are settings of whole blocks. Set them for all matrices, and leave "
            "some out of a part with {match: ..., keep: true}."
        )
    lacking = _lacking_by_block(source, asked)
    return [entry if entry.block is None else _with_parts(entry, asked, lacking[entry.block]) for entry in entries]


def _with_parts(entry: Entry, asked: Lpcd, lacking: Mapping[Part, str]) -> Entry:
    parts = tuple(part for part in asked.parts if part not in lacking)
    steps = tuple(StepDown(f"submodules without {part}", why) for part, why in lacking.items())
    own = replace(asked, parts=parts) if parts else None
    return replace(entry, submodules=own, steps_down=(*entry.steps_down, *steps))


def _lacking_by_block(source: Source, asked: Lpcd) -> list[dict[Part, str]]:
    """Parts that a block does not have, with why, for every block."""
    found = [places(block, source.map) for block in source.map.blocks]
    attention = {block.path: own["q"].around for block, own in zip(source.map.blocks, found, strict=True) if "q" in own}
    hidden: Mapping[str, str] = {}
    if {"qk", "vo"} & set(asked.parts) and attention:
        hidden = attention_unseen(source.skeleton, attention)
    result = []
    for block, own in zip(source.map.blocks, found, strict=True):
        lacking: dict[Part, str] = {}
        for part in asked.parts:
            why = _lacking(part, own, block)
            if why is None and part != "updown":
                why = hidden.get(block.path)
            elif why is None and own["up"].around != block.path:
                why = underivable(source.skeleton.get_submodule(own["up"].around))
            if why is not None:
                lacking[part] = why
        result.append(lacking)
    return result


def _lacking(part: Part, found: Mapping[str, Place], block: Block) -> str | None:
    missing = [kind for kind in (*MEMBERS[part], *AROUND[part]) if kind not in found]
    if missing:
        if any(role.kind == missing[0] for role in block.roles):
            experts = " (experts)" if any(group.experts for group in block.groups) else ""
            return f"several matrices have the role {missing[0]!r}{experts}"
        return f"no matrix is known to have the role {missing[0]!r}"
    if part == "qk" and not block.groups[found["q"].group].parameters[0].startswith(f"{found['q'].around}."):
        return "another matrix reads the same inputs before attention does"
    if part == "updown" and found["up"].around != found["down"].around:
        return "up and down lie in different modules"
    return None
