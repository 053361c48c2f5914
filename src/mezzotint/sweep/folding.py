"""AWQ's scales of a block's inputs: searched with full-precision weights, and folded before the block is quantized."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mezzotint.blockwise.batches import Batch
from mezzotint.blockwise.stops import GroupInputs, stops
from mezzotint.blockwise.streams import Streams
from mezzotint.core.contracts import Aim, Block, Grid, InputGroup, Matrix
from mezzotint.core.metrics import energies
from mezzotint.core.plans import Entry
from mezzotint.core.statistics import Accumulator, Statistics, padded
from mezzotint.models import Source
from mezzotint.models.folds import Fold, apply_fold, fold_of
from mezzotint.sweep.solve import least_tokens
from mezzotint.sweep.statistics import token_weights
from mezzotint.transforms.awq import Awq, ScaleBasis

_SAME = 1e-3  # an exact fold leaves the roundings of float32, 1e-6 or so; one that is not exact changes much more

Decisions = Mapping[str, float | str]


class _Member(NamedTuple):
    """A matrix whose inputs are scaled, what will be done to it, and its weight in the module."""

    matrix: Matrix
    entry: Entry
    weight: Float[Tensor, "out in"]


class _Part(NamedTuple):
    """Matrices that get the same scales, and where these can go.

    Attributes:
        position: of the input group in the block.
        inspected: path of the module whose output is compared; None where the linears themselves are.
        around: path of the module that holds both ends of a fold whose exactness must be tried.
    """

    members: tuple[_Member, ...]
    position: int
    fold: Fold
    inspected: str | None
    around: str | None

    @property
    def transform(self) -> Awq:
        """That of all members."""
        transform = self.members[0].entry.transform
        assert isinstance(transform, Awq)
        return transform


class Folding:
    """Searches and folds the scales of AWQ.

    Args:
        source: the original; its rewriting is added to.
        entries: what will be done, by matrix.
        rewritten: told of the parameters of a block that changed.
        device: where blocks live.
    """

    def __init__(
        self,
        source: Source,
        entries: Mapping[str, Entry],
        *,
        rewritten: Callable[[Sequence[str]], None],
        device: str,
    ) -> None:
        self._source = source
        self._entries = entries
        self._rewritten = rewritten
        self._device = device
        self._unrounded = {source.map.matrices[name].parameter for name in entries}

    @torch.no_grad()
    def fold(self, block: Block, module: nn.Module, streams: Streams) -> dict[str, Decisions]:
        """Fold what can be folded of a block whose full-precision weights are in memory; changes them.

        The block keeps its function. All searches see the weights as they were: each scales columns of its own, and
        the rows that another one scales meet scales of the grid that take the factor up.

        Returns:
            What was decided, by matrix.
        """
        decided: dict[str, Decisions] = {}
        parts = list(self._parts(block, decided))
        if not parts:
            return decided
        # the windows that are searched on are those of the first rank
        found = list(self._searched(block, module, streams, parts)) if streams.ranks.first else []
        decisions: list[Decisions] = streams.ranks.told([decision for decision, _ in found])
        for part, decision in zip(parts, decisions, strict=True):
            decided |= {member.matrix.name: decision for member in part.members}
        scales = streams.ranks.given({str(i): scale for i, (_, scale) in enumerate(found) if scale is not None})
        self._rewritten(self._apply([(parts[int(i)].fold, scale.to(self._device)) for i, scale in scales.items()]))
        return decided

    def _searched(
        self, block: Block, module: nn.Module, streams: Streams, parts: Sequence[_Part]
    ) -> Iterator[tuple[Decisions, Tensor | None]]:
        """What is decided for each part, and its scales if it gets any."""
        batch = streams.batches[0]
        with streams.products():
            inputs, calls = self._observed(block, module, streams, parts)
        same: dict[tuple[str, ...], bool] = {}
        for part in parts:
            experts = {member.matrix.expert for member in part.members}
            with streams.products():
                by_expert = {expert: self._statistics(part, expert, inputs, batch) for expert in experts}
            refusal = self._refusal(part, by_expert, calls, same)
            if refusal is None:
                basis = self._search(part, by_expert, calls, batch)
                yield {Awq.kind: basis.strength}, basis.scale
            else:
                yield {Awq.kind: f"not scaled: {refusal}"}, None

    def _parts(self, block: Block, decided: dict[str, Decisions]) -> Iterator[_Part]:
        """What is to be scaled; what cannot be goes to ``decided``."""
        for position, group in enumerate(block.groups):
            members = list(self._members(group))
            together: Iterable[list[_Member]] = [members] if members else []
            if group.norm is None:
                together = [[m for m in members if m.matrix.expert == e] for e in {m.matrix.expert: 0 for m in members}]
            for part in together:
                fold = fold_of(self._source.map, block, group, part[0].matrix.expert)
                kept = fold and fold.producer and fold.producer.matrix.name not in self._entries
                if fold is None or kept:
                    why = "what makes its inputs is kept" if kept else "nothing before it can take scales of its inputs"
                    decided |= {m.matrix.name: {Awq.kind: f"not scaled: {why}"} for m in part}
                    continue
                around = None if fold.producer is None else _module_of([part[0].matrix, fold.producer.matrix])
                yield _Part(tuple(part), position, fold, self._inspected(block, part), around)

    def _members(self, group: InputGroup) -> Iterator[_Member]:
        for name in group.matrices:
            entry = self._entries.get(name)
            if entry is not None and isinstance(entry.transform, Awq):
                matrix = self._source.map.matrices[name]
                yield _Member(matrix, entry, matrix.view(self._source.skeleton.get_parameter(matrix.parameter).data))

    def _inspected(self, block: Block, part: Sequence[_Member]) -> str | None:
        """The attention around queries, keys and values, the MLP around gate and up; None for anything else."""
        names = {member.matrix.name for member in part}
        kinds = {role.kind for role in block.roles if role.matrix in names}
        ends = {"o"} if kinds <= {"q", "k", "v"} else {"down"} if kinds <= {"gate", "up"} else set()
        others = [self._source.map.matrices[role.matrix] for role in block.roles if role.kind in ends]
        if not kinds or not others:
            return None
        path = _module_of([*(member.matrix for member in part), *others])
        return path if path.startswith(f"{block.path}.") else None

    # ---- evidence ----------------------------------------------------------------------------------------------------

    def _observed(
        self, block: Block, module: nn.Module, streams: Streams, parts: Sequence[_Part]
    ) -> tuple[dict[int, GroupInputs], dict[str, "_Call"]]:
        """Inputs of groups and calls of modules in the first batch of the quantized stream, which is a fit one."""
        calls: dict[str, _Call] = {}
        tokens = {path: part.transform.tokens for part in parts for path in (part.inspected, part.around) if path}

        def keep(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.setdefault(
                    path,
                    _Call.of(
                        self._source.skeleton.get_submodule(path),
                        args,
                        kwargs,
                        tokens=tokens[path],
                        products=streams.products,
                    ),
                )

            return hook

        handles = [
            self._source.skeleton.get_submodule(path).register_forward_pre_hook(keep(path), with_kwargs=True)
            for path in tokens
        ]
        try:
            with stops(self._source.skeleton, block, parallel=self._source.map.parallel_residual):
                run = streams.quantized_runs(block.index, module)[0]
                inputs = {position: run.reach(position) for position in sorted({part.position for part in parts})}
                run.finish()
        finally:
            for handle in handles:
                handle.remove()
        return inputs, calls

    def _statistics(
        self, part: _Part, expert: int | None, inputs: Mapping[int, GroupInputs], batch: Batch
    ) -> Statistics:
        """Of one member's inputs, or of one expert's."""
        width = part.members[0].matrix.shape[1]
        sums = Accumulator(width, frozenset({"mean_abs"}), device=self._device)
        seen = inputs[part.position].get(expert)
        if seen is not None:
            sums.add(seen.values, weights=token_weights(batch.mask, seen))
        return sums.finish()

    def _refusal(
        self,
        part: _Part,
        statistics: Mapping[int | None, Statistics],
        calls: Mapping[str, "_Call"],
        same: dict[tuple[str, ...], bool],
    ) -> str | None:
        """Why these inputs are not scaled, or None; ``same`` keeps what has been tried (of experts one for all)."""
        tokens, least = sum(s.tokens for s in statistics.values()), least_tokens(part.members[0].matrix)
        if tokens < least:
            return f"only {tokens:.0f} tokens, at least {least} needed"
        if part.fold.exact:
            return None
        ends = tuple(reader.parameter for reader in part.fold.readers)
        if ends not in same:
            same[ends] = self._keeps_the_block(part, calls)
        return None if same[ends] else "a nonlinearity lies between the two matrices, so scales cannot be folded"

    def _keeps_the_block(self, part: _Part, calls: Mapping[str, "_Call"]) -> bool:
        """Whether the module around both ends of a fold computes the same with random scales folded."""
        assert part.around is not None
        call = calls[part.around]
        before = call.output()
        # powers of two: what is left of an exact fold is then less than a rounding
        width = part.members[0].matrix.shape[1]
        exponents = part.fold.tied(torch.randn(width, generator=torch.Generator().manual_seed(0)) * 2).round()
        with self._tried(part.fold, exponents.exp2()):
            change = (call.output() - before).norm() / before.norm().clamp_min(torch.finfo(before.dtype).tiny)
        return float(change) < _SAME

    @contextmanager
    def _tried(self, fold: Fold, scale: Tensor) -> Iterator[None]:
        """The block with a fold that is taken back."""
        rewriting = self._source.checkpoint.rewriting
        with rewriting.kept():
            changed = apply_fold(self._source.checkpoint, fold, scale, self._unrounded)
            parameters = {name: self._source.skeleton.get_parameter(name) for name in changed}
            before = {name: parameter.data for name, parameter in parameters.items()}
            for name, parameter in parameters.items():
                parameter.data = self._read(name).to(parameter)
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = before[name]

    def _apply(self, found: Sequence[tuple[Fold, Tensor]]) -> list[str]:
        """Fold for good; gives the parameters that changed."""
        changed: dict[str, None] = {}
        for fold, scale in found:
            changed |= dict.fromkeys(apply_fold(self._source.checkpoint, fold, scale, self._unrounded))
        for name in changed:
            parameter = self._source.skeleton.get_parameter(name)
            parameter.data.copy_(self._read(name))
        return list(changed)

    def _read(self, parameter: str) -> Tensor:
        return self._source.checkpoint.parameter(parameter)

    # ---- search ------------------------------------------------------------------------------------------------------

    def _search(
        self,
        part: _Part,
        statistics: Mapping[int | None, Statistics],
        calls: Mapping[str, "_Call"],
        batch: Batch,
    ) -> ScaleBasis:
        """The scales with the least loss of nearest rounding, on what the paper inspects."""
        first = next(iter(statistics.values()))
        mean_abs = torch.stack([s.mean_abs for s in statistics.values() if s.mean_abs is not None]).sum(0)
        known = Statistics(tokens=first.tokens, gram=first.gram, mean_abs=part.fold.tied(mean_abs))
        aims = [Aim(matrix=member.weight) for member in part.members]
        call = None if part.inspected is None else calls[part.inspected]
        reference = None if call is None else call.output()
        originals = [member.weight.clone() for member in part.members] if call is not None else []

        def probe(scale: Tensor) -> float:
            values = (_rounded(member, statistics[member.matrix.expert], scale) for member in part.members)
            if call is None or reference is None:
                errors = (
                    (v - m.weight, statistics[m.matrix.expert]) for m, v in zip(part.members, values, strict=True)
                )
                return sum(float(energies(e, s.gram).sum()) for e, s in errors)
            for member, value in zip(part.members, values, strict=True):
                member.weight.copy_(value)
            error = call.output() - reference
            for member, original in zip(part.members, originals, strict=True):
                member.weight.copy_(original)
            if batch.mask is not None and error.dim() == 3:
                error = error[batch.mask[: error.shape[0]].to(error.device)]
            return float(error.square().sum(dtype=torch.float64))

        return part.transform.fit(aims, known, probe, torch.Generator())[0]


@dataclass(frozen=True, slots=True)
class _Call:
    """A module with arguments it was called with, of so many windows as are wanted."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    products: Callable[[], AbstractContextManager[None]]

    @classmethod
    def of(
        cls,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        tokens: int,
        products: Callable[[], AbstractContextManager[None]],
    ) -> "_Call":
        """The call with its first windows (of experts: tokens), at least one and about ``tokens`` tokens.

        All windows stay where an argument has a first axis that may be something else than they are.
        """
        given = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        count, per_row = given[0].shape[0], given[0].shape[1:-1].numel()
        keep = max(1, tokens // per_row)
        if all(leaf.dim() and leaf.shape[0] in (1, count) for leaf in given):
            cut = lambda leaf: leaf[:keep] if isinstance(leaf, Tensor) and leaf.shape[0] == count else leaf  # noqa: E731
            args, kwargs = tree_map(cut, (args, dict(kwargs)))
        return cls(module, args, kwargs, products)

    def output(self) -> Tensor:
        """What the module makes of them now."""
        with self.products():
            output = self.module(*self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


def _module_of(matrices: Sequence[Matrix]) -> str:
    """The smallest module that holds all of them."""
    paths = [matrix.parameter.split(".")[:-1] for matrix in matrices]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _rounded(member: _Member, statistics: Statistics, scale: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """``Q(W diag s) diag(1/s)`` with nearest rounding on the member's grid."""
    basis = ScaleBasis(scale=scale, strength=0.0)
    return basis.inverse(_nearest(member.entry.grid, basis.weight(member.weight), basis.statistics(statistics)))


def _nearest(grid: Grid, weight: Float[Tensor, "out in"], statistics: Statistics) -> Float[Tensor, "out in"]:
    rows, columns = weight.shape
    seen: Statistics | None = statistics
    if grid.pads:
        weight, seen = padded(weight, statistics, grid.multiple)
    assert seen is not None
    fitted = grid.fit(weight, seen.importance if statistics.tokens else torch.ones_like(weight[0]))
    return fitted.decode(fitted.encode(weight))[:rows, :columns]
