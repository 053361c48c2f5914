"""Which tensors the output holds, and where each comes from: known before any weight is read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mezzotint.core.contracts import Matrix
from mezzotint.core.plans import Entry, Format, TensorSpec
from mezzotint.models import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The tensors of the output.

    Attributes:
        specs: all of them, in the checkpoint's order.
        copied: checkpoint tensors whose bytes are copied unchanged.
        assembled: parameters that share checkpoint tensors or are split over several (stacked experts): each set is
            converted back together, dense.
    """

    specs: tuple[TensorSpec, ...]
    copied: tuple[str, ...]
    assembled: tuple[frozenset[str], ...]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(spec.nbytes for spec in self.specs)

    def assembly_of(self, parameter: str) -> frozenset[str] | None:
        """The set of parameters that this one is written with, or None if it is written alone."""
        return next((members for members in self.assembled if parameter in members), None)


def users_of_sources(source: Source) -> Mapping[str, frozenset[str]]:
    """Parameters that are made from each checkpoint tensor; tied ones count as one."""
    users: dict[str, set[str]] = {}
    for parameter, _ in source.skeleton.named_parameters():
        for name in source.checkpoint.sources(parameter):
            users.setdefault(name, set()).add(parameter)
    return {name: frozenset(parameters) for name, parameters in users.items()}


def written_alone(matrix: Matrix, users: Mapping[str, frozenset[str]]) -> bool:
    """Whether the matrix is exactly one checkpoint tensor that nothing else is made from."""
    return matrix.expert is None and len(matrix.sources) == 1 and len(users[matrix.sources[0]]) == 1


def make_layout(source: Source, entries: Iterable[Entry], form: Format) -> Layout:
    """The output's tensors for these entries in that format."""
    users = users_of_sources(source)
    tensors = source.checkpoint.tensors
    direct: dict[str, tuple[TensorSpec, ...]] = {}
    shared: set[str] = set()
    for entry in entries:
        matrix = source.map.matrices[entry.matrix]
        if written_alone(matrix, users):
            name = matrix.sources[0]
            direct[name] = form.specs(matrix, entry.grid, tensors[name].dtype, entry.basis)
        else:
            shared.add(matrix.parameter)
    assembled = _closures(shared, source, users)
    remade = {name for members in assembled for parameter in members for name in source.checkpoint.sources(parameter)}
    specs: list[TensorSpec] = []
    copied: list[str] = []
    for name, info in tensors.items():
        if name in direct:
            specs.extend(direct[name])
            continue
        specs.append(TensorSpec(name, info.dtype, tuple(info.shape)))
        if name not in remade:
            copied.append(name)
    return Layout(specs=tuple(specs), copied=tuple(copied), assembled=assembled)


def _closures(
    parameters: Iterable[str], source: Source, users: Mapping[str, frozenset[str]]
) -> tuple[frozenset[str], ...]:
    """Sets of parameters connected by checkpoint tensors they share."""
    found: list[frozenset[str]] = []
    for start in sorted(parameters):
        if any(start in members for members in found):
            continue
        members, frontier = {start}, [start]
        while frontier:
            for name in source.checkpoint.sources(frontier.pop()):
                new = users[name] - members
                members |= new
                frontier.extend(new)
        found.append(frozenset(members))
    return tuple(found)
