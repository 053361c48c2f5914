"""Which rows of a matrix are queries, keys, values, gates and so on.

Names and layouts are data (``roles.toml``), and a model may bring names of its own: ``mezzotint_roles`` of its
configuration, as an attribute of the class or in config.json, maps the ends of names to roles, ``{"attention.query":
"q"}``. Shapes are checked against the configuration, and a matrix that does not fit gets no role.
"""

import functools
import itertools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mezzotint.core.contracts import Matrix, Role
from mezzotint.errors import ModelError, unknown

Kind = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads: of queries, of keys and values, and rows of each."""

    queries: int
    keys: int
    width: int


class Member(NamedTuple):
    """A matrix, the module that holds it, and the module around that."""

    matrix: Matrix
    owner: nn.Module
    parent: nn.Module


def block_roles(config: PreTrainedConfig, members: Sequence[Member], groups: Mapping[str, int]) -> tuple[Role, ...]:
    """Roles of the matrices of one block.

    Args:
        config: of the text model.
        members: in running order.
        groups: number of the input group of each matrix.

    Raises:
        ModelError: ``mezzotint_roles`` of the configuration has a role that there is not.
    """
    roles: list[Role] = []
    names = _names(config)
    for member in members:
        matrix, layout, kind = member.matrix, _fused(config, member.matrix), _whole(names, member.matrix.name)
        if matrix.expert is not None:
            roles.extend(_expert_roles(matrix, member.owner))
        elif layout in ("halves", "interleaved"):
            roles.extend(_gate_up(matrix, interleaved=layout == "interleaved"))
        elif layout is not None:
            roles.extend(_split_heads(matrix, layout, config, _heads(config, member.parent)))
        elif kind is not None:
            roles.append(Role(kind=kind, matrix=matrix.name))
    return _checked_attention(roles, {m.matrix.name: m for m in members}, groups, config)


def fusions(
    path: str, index: int, matrices: Sequence[Matrix], *, groups: Mapping[str, int], found: Sequence[Role]
) -> dict[str, str]:
    """Classes of matrices that engines fuse: q, k and v of one input, gate and up of one input, all experts.

    Args:
        path: of the block.
        index: of the block.
        matrices: of the block.
        groups: number of the input group of each matrix.
        found: roles of the matrices.
    """
    result: dict[str, str] = {}
    taken: dict[str, int] = {}
    kinds: dict[str, set[str]] = {}
    shared: dict[int, set[str]] = {}
    for role in found:
        kinds.setdefault(role.matrix, set()).add(role.kind)
        shared.setdefault(groups[role.matrix], set()).add(role.kind)
    for matrix in matrices:
        own, around = kinds.get(matrix.name, set()), shared.get(groups[matrix.name], set())
        short = matrix.name.removeprefix(f"{path}.")
        name = short
        if own & {"q", "k", "v"} and around >= {"q", "k", "v"}:
            name = "qkv"
        elif own & {"gate", "up"} and around >= {"gate", "up"}:
            name = "gate_up"
        if matrix.expert is not None:
            name = "experts"
        elif taken.setdefault(name, groups[matrix.name]) != groups[matrix.name]:
            # a second pair of gate and up, of shared experts
            name = f"{short.rpartition('.')[0]}.{name}"
        result[matrix.name] = f"{index}.{name}"
    return result


def rows_of_run(start: int, stop: int) -> Int[Tensor, " rows"]:
    """Consecutive rows."""
    return torch.arange(start, stop)


def rows_of_heads(groups: int, first: int, last: int, *, period: int, width: int) -> Int[Tensor, " rows"]:
    """Rows of heads ``first`` to ``last`` (excluded) of each of ``groups`` groups of ``period`` heads."""
    heads = torch.arange(groups * period * width).view(groups, period, width)
    return heads[:, first:last].reshape(-1)  # [groups * (last - first) * width]


def rows_in_turn(start: int, step: int, stop: int) -> Int[Tensor, " rows"]:
    """Every ``step``-th row."""
    return torch.arange(start, stop, step)


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads(resources.files("mezzotint.models").joinpath("roles.toml").read_text(encoding="utf-8"))


def _names(config: PreTrainedConfig) -> Mapping[str, Kind]:
    """Roles by the ends of names: those that are known, and the model's own."""
    names: dict[str, Kind] = dict(_table()["whole"])
    for suffix, kind in getattr(config, "mezzotint_roles", {}).items():
        if kind not in get_args(Kind):
            raise ModelError(
                f"mezzotint_roles of the configuration: {suffix!r}: {unknown('role', kind, get_args(Kind))}"
            )
        names[suffix] = kind
    return names


def _whole(names: Mapping[str, Kind], name: str) -> Kind | None:
    matching = [suffix for suffix in names if f".{name}".endswith(f".{suffix}")]
    return names[max(matching, key=len)] if matching else None


def _fused(config: PreTrainedConfig, matrix: Matrix) -> str | None:
    for entry in _table()["fused"]:
        if f".{matrix.name}".endswith(f".{entry['suffix']}") and config.model_type in entry["model_types"]:
            return entry["layout"]
    return None


def _split_heads(matrix: Matrix, layout: str, config: PreTrainedConfig, heads: Heads | None) -> list[Role]:
    if layout == "falcon":
        layout, heads = _falcon(config, heads)
    if heads is None or matrix.shape[0] != (heads.queries + 2 * heads.keys) * heads.width:
        return []
    width = heads.width
    rows: list[Callable[[], Tensor]]
    if layout == "runs":
        edges = [0, heads.queries * width, (heads.queries + heads.keys) * width, matrix.shape[0]]
        rows = [functools.partial(rows_of_run, a, b) for a, b in itertools.pairwise(edges)]
    else:
        own = heads.queries // heads.keys
        edges = [0, own, own + 1, own + 2]
        rows = [
            functools.partial(rows_of_heads, heads.keys, a, b, period=own + 2, width=width)
            for a, b in itertools.pairwise(edges)
        ]
    kinds: tuple[Kind, ...] = ("q", "k", "v")
    return [
        Role(kind=kind, matrix=matrix.name, rows=index, head_dim=width) for kind, index in zip(kinds, rows, strict=True)
    ]


def _gate_up(matrix: Matrix, *, interleaved: bool) -> list[Role]:
    rows = matrix.shape[0]
    if interleaved:
        gate, up = functools.partial(rows_in_turn, 0, 2, rows), functools.partial(rows_in_turn, 1, 2, rows)
    else:
        gate, up = functools.partial(rows_of_run, 0, rows // 2), functools.partial(rows_of_run, rows // 2, rows)
    return [Role(kind="gate", matrix=matrix.name, rows=gate), Role(kind="up", matrix=matrix.name, rows=up)]


def _expert_roles(matrix: Matrix, module: Any) -> list[Role]:
    attribute = matrix.parameter.rpartition(".")[2]
    if attribute == "gate_up_proj":
        return _gate_up(matrix, interleaved=not module.is_concatenated)
    kind: Kind = "up" if attribute == "up_proj" else "down"
    return [Role(kind=kind, matrix=matrix.name)]


def _heads(config: PreTrainedConfig, attention: nn.Module) -> Heads | None:
    """Heads by the configuration; their width by the attention module where it says so: some models have two widths."""
    queries = _number(config, "num_attention_heads")
    keys = _number(config, "num_key_value_heads") or queries
    width = getattr(attention, "head_dim", None)
    if not isinstance(width, int):
        width = _number(config, "head_dim") or (_number(config, "hidden_size") or 0) // (queries or 1)
    return Heads(queries, keys, width) if queries and keys and width else None


def _number(config: PreTrainedConfig, name: str) -> int | None:
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # it differs from block to block, and the configuration refuses to tell
        return None
    return value if isinstance(value, int) else None


def _falcon(config: Any, heads: Heads | None) -> tuple[str, Heads | None]:
    if heads is None:
        return "runs", None
    if config.new_decoder_architecture:
        return "per_group", Heads(heads.queries, config.num_kv_heads, heads.width)
    if config.multi_query:
        return "runs", Heads(heads.queries, 1, heads.width)
    return "per_head", Heads(heads.queries, heads.queries, heads.width)


def _checked_attention(
    roles: Sequence[Role], members: Mapping[str, Member], groups: Mapping[str, int], config: PreTrainedConfig
) -> tuple[Role, ...]:
    """Give separate q, k and v their heads; take roles back where the parts of attention do not fit together."""
    parts = {kind: [r.matrix for r in roles if r.kind == kind] for kind in ("q", "k", "v")}
    matrices = {name for found in parts.values() for name in found}
    fits = all(len(found) == 1 for found in parts.values())
    heads = None
    if fits and len(matrices) == 3:
        q, k, v = (members[parts[kind][0]] for kind in ("q", "k", "v"))
        heads = _heads(config, q.parent)
        together = len({groups[name] for name in matrices}) == 1
        # keys are not counted: some models have fewer of them in some blocks
        fits = heads is not None and together and q.matrix.shape[0] == heads.queries * heads.width
        fits = fits and k.matrix.shape == v.matrix.shape and q.matrix.shape[0] % k.matrix.shape[0] == 0
    around = members[parts["v"][0]].parent if fits else None
    kept: list[Role] = []
    for role in roles:
        if role.kind in ("q", "k", "v"):
            width = role.head_dim if heads is None else heads.width
            kept.extend([replace(role, head_dim=width)] if fits else [])
        elif role.kind != "o" or members[role.matrix].parent is around:
            kept.append(role)
    return tuple(kept)


assert set(_table()["whole"].values()) <= set(get_args(Kind))
