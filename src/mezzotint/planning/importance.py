"""Statistics from an importance matrix of llama.cpp, instead of calibration text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mezzotint.core.contracts import Matrix
from mezzotint.core.plans import Entry
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError, FormatError
from mezzotint.formats.gguf import model as gguf_model
from mezzotint.formats.gguf.imatrix import Squares, read_imatrix
from mezzotint.models import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """Mean squares of the inputs of a model's matrices; nothing is known of their products.

    Attributes:
        name: of the file.
        checksum: of the file.
        squares: by matrix, of those that ask for them.
    """

    name: str
    checksum: int
    squares: Mapping[str, Squares]

    def statistics(self, matrix: Matrix, device: str) -> Statistics | None:
        """Those of a matrix's inputs, which are taken for uncorrelated; None where nothing asks for them."""
        if matrix.name not in self.squares:
            return None
        sums, tokens = self.squares[matrix.name]
        return Statistics.uncorrelated(sums.to(device), tokens)


def open_importance(source: Source, entries: Sequence[Entry], path: Path) -> Importance:
    """Read an importance matrix for these entries.

    Args:
        source: the model.
        entries: of its plan.
        path: of the file.

    Raises:
        ConfigError: a stage needs more than mean squares, or none needs them.
        FormatError: the file is damaged, or has nothing, or another number of inputs, for a matrix.
    """
    for entry in entries:
        _check_stages(entry, path)
    weighted = [source.map.matrices[entry.matrix] for entry in entries if entry.needs]
    if not weighted:
        raise ConfigError(
            f"--imatrix is {path.name}, and nothing here is weighted by it. Use --set grid.range=weighted, or leave it "
            "out."
        )
    found = read_imatrix(path)
    try:
        architecture = gguf_model.architecture_of(source.config.to_dict())
    except FormatError as error:
        error.add_note("An importance matrix has the names of a GGUF file.")
        raise
    names = gguf_model.tensor_names(architecture, source.config.to_dict(), [m.sources[0] for m in weighted])
    squares = {}
    for matrix in weighted:
        name = names.get(matrix.sources[0], "")
        if name not in found.squares:
            raise FormatError(
                f"importance matrix {path.name} has nothing for {matrix.name} ({name}). Keep that matrix, set "
                "grid.range=error for it in a rule, or make the file again (heads: llama-imatrix --process-output)."
            )
        inputs = len(found.squares[name].sums)
        if inputs != matrix.shape[1]:
            raise FormatError(
                f"importance matrix {path.name} has {inputs} inputs for {matrix.name} ({name}), which has "
                f"{matrix.shape[1]}. The file was made for another model. Give the file of this model."
            )
        squares[matrix.name] = found.squares[name]
    return Importance(name=path.name, checksum=found.checksum, squares=squares)


def _check_stages(entry: Entry, path: Path) -> None:
    """Refuse what the diagonal of the Hessian is not enough for."""
    stages = {
        "target": entry.target,
        "transform": entry.transform,
        "rounding": entry.rounding,
        "submodules": entry.submodules,
        "compensation": entry.compensation,
    }
    wanting = [f"{stage} {value.kind!r}" for stage, value in stages.items() if value is not None and value.needs]
    if entry.curvature is not None:
        wanting.append(f"curvature {entry.curvature.kind!r}")
    if entry.refinement is not None:
        wanting.append(f"refinement {entry.refinement.kind!r}")
    if entry.basis is not None and entry.grid.needs:
        wanting.append(f"range 'weighted' in the basis of transform {entry.basis.kind!r}")
    if wanting:
        raise ConfigError(
            f"{entry.matrix}: {wanting[0]} needs the products of all inputs, and an importance matrix ({path.name}) "
            "has their mean squares alone. Use --recipe rtn, or calibration text in its place."
        )
