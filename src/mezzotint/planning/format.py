"""Chooses the output format from the request and the kinds of matrices."""

from collections.abc import Sequence

import torch

from mezzotint.core.contracts import Bits, Grid, Matrix, Transform
from mezzotint.core.plans import Entry, Format, Plan, Refusal
from mezzotint.errors import FormatError
from mezzotint.formats.dense import Dense
from mezzotint.formats.gguf.format import Gguf
from mezzotint.formats.native import Native
from mezzotint.grids.uniform import UniformGrid
from mezzotint.models import Source
from mezzotint.planning.layout import users_of_sources, written_alone
from mezzotint.recipes.request import Request
from mezzotint.registry import FORMATS


class Unloadable(FormatError):  # noqa: N818 (caught where another choice is tried)
    """A plan that no engine would load, whose entries are right each by itself.

    Args:
        form: name of the format.
        because: why it was chosen.
        refusal: the rule that is broken.
    """

    def __init__(self, form: str, because: str, refusal: Refusal) -> None:
        super().__init__(f"format {form!r} ({because}) cannot hold this plan: {refusal}")
        self.refusal = refusal


def chosen_format(
    source: Source, entries: Sequence[Entry], request: Request, instead: tuple[str, str] | None = None
) -> tuple[Format, str]:
    """The format, and why.

    Args:
        source: the original.
        entries: what will be done.
        request: what is asked for.
        instead: a format in the place of what would be chosen, and why.

    Raises:
        Unloadable: engines do not load the matrices together.
        FormatError: it cannot hold an entry.
    """
    users = users_of_sources(source)
    name, because = instead or _wanted_format(entries, request)
    matrices = [source.map.matrices[entry.matrix] for entry in entries]
    holds = "nn.Linear and nn.Embedding" if name == Native.name else "nn.Linear"
    kinds = [m.linear or (m.lookup and name == Native.name) for m in matrices]
    odd = next((m for m, held in zip(matrices, kinds, strict=True) if not (held and written_alone(m, users))), None)
    if odd is not None and name != "dense":
        if request.wanted_format is not None:
            raise FormatError(
                f"{because} writes {name}, which holds weights of {holds} only, and {odd.name} is another kind of "
                "module. Use --for dense, keep it, or leave --for out."
            )
        name, because = "dense", f"{odd.name} is not the weight of {holds} alone, and packed formats hold nothing else"
    form: Format = FORMATS[name]()
    form.check_source(source.folder, source.config.to_dict(), list(source.checkpoint.tensors))
    for entry, matrix in zip(entries, matrices, strict=True):
        refusal = form.refuses(entry, matrix) or request.loading.refuses(
            name, entry, matrix, head=matrix.name == source.map.head
        )
        if refusal is not None:
            raise FormatError(f"format {name!r} ({because}) cannot hold {matrix.name}: {refusal}")
    plan = Plan(
        entries=tuple(entries),
        kept={},
        format=name,
        engine=request.engine,
        bytes=0,
        peak_memory_bytes=0,
        fingerprint="",
    )
    refusals = (*form.refuses_plan(plan, source.map), *request.loading.refuses_plan(plan, source.map))
    if refusals:
        raise Unloadable(name, because, refusals[0])
    return form, because


def _wanted_format(entries: Sequence[Entry], request: Request) -> tuple[str, str]:
    wanted = request.wanted_format
    if wanted is not None:
        return wanted, f"--format {wanted}" if request.engine is None else f"--for {request.engine}"
    own = next((e for e in entries if not _usual(e.grid) or e.basis is not None), None)
    if own is None:
        return "compressed-tensors", "what most engines load"
    if own.basis is None and all(e.grid.kind == "gguf" for e in entries):
        return "gguf", "all grids are GGUF block types"
    kind = f"{own.grid.kind!r}" if own.basis is not None or own.grid.kind != "uniform" else "'uniform' of one scale"
    basis = "" if own.basis is None else f" in the basis {own.basis.kind!r}"
    return "mezzotint", f"{own.matrix} has the grid {kind}{basis}, which only mezzotint's own format holds"


def _usual(grid: Grid) -> bool:
    """Whether most engines have kernels for it."""
    return isinstance(grid, UniformGrid) and grid.scale_per != "matrix"


def stored_bits(form: Format, matrix: Matrix, grid: Grid, transform: Transform | None) -> Bits:
    """Exact bits of a matrix in a file of that format; what is written dense counts as in our own.

    Args:
        form: of the output.
        matrix: whose shape and name count.
        grid: without any ``auto``.
        transform: whose basis is stored beside, or None.
    """
    if isinstance(form, Gguf):  # nothing beside the blocks comes into the file
        return grid.stored_bits(matrix.shape)
    packed = Native() if isinstance(form, Dense) else form
    total = 8 * sum(spec.nbytes for spec in packed.specs(matrix, grid, torch.float32, transform))
    code = grid.stored_bits(matrix.shape).code
    return Bits(code=code, side=total - code)
