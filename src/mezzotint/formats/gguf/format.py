"""GGUF, the format of llama.cpp: one file that holds the model, its tokenizer and how to run it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from gguf import GGUFWriter, LlamaFileType
from safetensors import safe_open
from torch import Tensor

from mezzotint.core.contracts import Grid, Matrix, ModelMap, QuantizedWeight, Transform
from mezzotint.core.plans import Entry, PackedWeight, Plan, Refusal, TensorSpec
from mezzotint.errors import FormatError
from mezzotint.formats.gguf import model as gguf_model
from mezzotint.formats.gguf import tokens as gguf_tokens
from mezzotint.formats.gguf.file import CHECKSUMS, GgufFile, Outgoing, check_metadata, write_gguf
from mezzotint.formats.native import CHECKSUM, Native
from mezzotint.formats.targets import module_of
from mezzotint.grids.gguf.grid import GgufGrid
from mezzotint.grids.gguf.types import BLOCK_TYPES
from mezzotint.storage.files import replaced
from mezzotint.storage.folder import WEIGHTS
from mezzotint.storage.made import remove_made

FILE = "model.gguf"
NAMES = "mezzotint.names"  # of the tensors in the checkpoint, in the order of the file; empty for what llama.cpp adds
_BLOCKS = ".weight_blocks"
_BY_BITS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
TABLES = ("token_embd.weight", "output.weight")
_HEADER, _HEADER_TENSOR = 4096, 160  # bytes: settings, and both names, shape, place and checksum of a tensor
_QUANTIZATION_VERSION = 2  # of llama.cpp's block layouts


class Gguf:
    """Blocks of GGUF types.

    While a run works, matrices lie in safetensors files as in our own format, with checksums; `finish` makes one file
    of them, ``model.gguf``, which llama.cpp runs and `stored_tensors` reads.

    Norms and biases become float32, as llama.cpp wants them; other kept matrices stay in the checkpoint's dtype, but
    for the embedding and the head, which take the types of llama.cpp's presets (`table_type`).
    """

    name: ClassVar[str] = "gguf"
    copies: ClassVar[int] = 2

    def __init__(self) -> None:
        self._native = Native()

    def refuses(self, entry: Entry, matrix: Matrix) -> Refusal | None:
        """The first rule that this entry breaks, or None.

        Rules: those of our own format; ``gguf-only``, ``no-transform``.
        """
        refusal = self._native.refuses(entry, matrix)
        if refusal is not None:
            return refusal
        if not isinstance(entry.grid, GgufGrid):
            bits = min(_BY_BITS, key=lambda b: abs(b - entry.grid.bits))
            nearest = _BY_BITS[bits]
            return Refusal(
                rule="gguf-only",
                what=f"grid of {matrix.name}",
                value=entry.grid.kind,
                limit="GGUF files hold GGUF's own block types only",
                remedy=f"Use --set grid.kind=gguf --set grid.type={nearest}.",
                nearest=GgufGrid(type=nearest),  # type: ignore[arg-type]
            )
        if entry.basis is not None:
            return Refusal(
                rule="no-transform",
                what=f"transform of {matrix.name}",
                value=entry.basis.kind,
                limit="llama.cpp multiplies by the stored matrix as it is",
                remedy="Use transform.kind=none.",
                nearest=entry.grid,
            )
        return None

    def refuses_plan(self, plan: Plan, model: ModelMap) -> tuple[Refusal, ...]:
        """Nothing: every tensor has a type of its own."""
        return ()

    def packed(
        self, quantization: Mapping[str, Any], tensors: Mapping[str, Any], read: Callable[[str], Tensor]
    ) -> Mapping[str, PackedWeight] | None:
        """None: a GGUF file is read by `dense_tensors`."""
        return None

    def check_source(self, folder: Path, config: Mapping[str, object], names: list[str]) -> None:
        """Refuse a model that llama.cpp would not run, or not run alike.

        Raises:
            FormatError: its architecture, a tensor or its tokenizer has no counterpart, or its metadata cannot be
                written.
        """
        architecture = gguf_model.architecture_of(config)
        gguf_model.tensor_names(architecture, config, names)
        gguf_tokens.tokenizer_kind(gguf_tokens.read_tokenizer(folder))
        writer = GGUFWriter(None, architecture.name)  # what `finish` will write, which is too late to find faults in
        try:
            gguf_model.describe_model(writer, architecture, config)
        except KeyError as error:
            raise FormatError(f"the model's config.json says nothing of {error}, which GGUF metadata has.") from error
        gguf_tokens.describe_tokenizer(writer, folder, cast(int, config["vocab_size"]))
        check_metadata(writer)

    def specs(
        self, matrix: Matrix, grid: Grid, dtype: torch.dtype, transform: Transform | None = None
    ) -> tuple[TensorSpec, ...]:
        """What `tensors` will give."""
        return self._native.specs(matrix, grid, dtype, transform)

    def tensors(self, matrix: Matrix, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """The blocks, and their checksum."""
        return self._native.tensors(matrix, weight, dtype)

    def weight(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], grid: Grid, transform: Transform | None = None
    ) -> QuantizedWeight:
        """The inverse of `tensors`.

        Raises:
            FormatError: the tensors are not those that were written.
        """
        return self._native.weight(matrix, tensors, grid, transform)

    def config(self, plan: Plan, model: ModelMap) -> Mapping[str, object] | None:
        """None: the file says itself how it is stored."""
        return None

    def finish(self, folder: Path, config: Mapping[str, object], plan: Plan, model: ModelMap) -> int:
        """Make ``model.gguf`` of the safetensors files in the folder, and remove these; gives its size.

        Raises:
            FormatError: a tensor is damaged.
        """
        grids = {model.matrices[entry.matrix].sources[0]: entry.grid for entry in plan.entries}
        if not (folder / FILE).exists():  # else a run was killed while it removed them
            with replaced(folder / FILE) as temporary:
                export(folder, temporary, config, grids)
        remove_made(folder, WEIGHTS)
        return (folder / FILE).stat().st_size


def export(
    folder: Path,
    target: Path,
    config: Mapping[str, object],
    grids: Mapping[str, Grid],
    *,
    tables: bool = True,
) -> None:
    """Write the tensors of a folder's safetensors files as one GGUF file.

    Args:
        folder: with tokenizer; some matrices may be stored as `Gguf.tensors` gives them.
        target: is overwritten.
        config: of the model, as a dictionary.
        grids: of the matrices that are stored so, by the name of the tensor in the original checkpoint.
        tables: give a kept embedding and head the type of `table_grid`; otherwise they stay in their dtype.

    Raises:
        FormatError: a tensor is damaged, or something has no counterpart in llama.cpp.
    """
    architecture = gguf_model.architecture_of(config)
    held = {name: path for path in sorted(folder.glob("*.safetensors")) for name in _names(path)}
    packed = {name.removesuffix(_BLOCKS) + ".weight" for name in held if name.endswith(_BLOCKS)}
    kept = [name for name in held if module_of(name) + ".weight" not in packed or name.endswith(".bias")]
    names = gguf_model.tensor_names(architecture, config, [*packed, *kept])
    row_order = partial(gguf_model.row_order, architecture, config)
    outgoing = [_packed(held, name, new, grids[name], row_order) for name, new in names.items() if name in packed]
    types = [t.type for t in outgoing]
    for name, new in names.items():
        if name not in packed:
            tied = "output.weight" not in names.values()
            grid = table_grid(new, _shape(held[name], name), types, tied=tied) if tables and new in TABLES else None
            order = row_order(name, _shape(held[name], name)[0])
            outgoing.append(_kept(held[name], name, new, architecture, order, grid=grid))
    outgoing += [
        Outgoing(name, "F32", tuple(value.shape), partial(torch.clone, value))
        for name, value in gguf_model.extra_tensors(config).items()
    ]
    outgoing.sort(key=lambda tensor: _place(tensor.name))
    original = {new: name for name, new in names.items()}
    rows = next(t.shape[0] for t in outgoing if t.name == TABLES[0])
    types = types or [t.type for t in outgoing if len(t.shape) > 1]

    def describe(writer: GGUFWriter) -> None:
        writer.add_array(NAMES, [original.get(t.name, "") for t in outgoing])
        writer.add_file_type(_file_type(types))
        writer.add_quantization_version(_QUANTIZATION_VERSION)
        gguf_model.describe_model(writer, architecture, config)
        gguf_tokens.describe_tokenizer(writer, folder, rows)

    write_gguf(target, architecture.name, describe, outgoing)


def kept_bytes(folder: Path, config: Mapping[str, object], specs: Sequence[TensorSpec]) -> int:
    """What `export` will make of everything that is not quantized, header included; an upper bound, by little.

    Args:
        folder: with tokenizer.json, than which the vocabulary in the header is shorter.
        config: of the model, as a dictionary.
        specs: of the tensors in the safetensors files.
    """
    beside = (_BLOCKS, "." + CHECKSUM)
    architecture = gguf_model.architecture_of(config)
    kept = {spec.name: spec for spec in specs if not spec.name.endswith(beside)}
    names = gguf_model.tensor_names(architecture, config, list(kept))
    tied = "output.weight" not in names.values()
    total = (folder / "tokenizer.json").stat().st_size + _HEADER + _HEADER_TENSOR * len(specs)
    for name, new in names.items():
        spec = kept[name]
        if len(spec.shape) == 1:
            total += 4 * spec.shape[0]
        elif new in TABLES:  # an embedding takes at most what most matrices have, and these at most Q8_0
            grid = table_grid(new, spec.shape, ["Q8_0"], tied=tied)
            total += grid.stored_bits((spec.shape[0], spec.shape[1])).total // 8
        else:
            total += spec.nbytes
    return total


def _names(path: Path) -> Iterator[str]:
    with safe_open(path, "pt") as file:
        yield from file.keys()


def _shape(path: Path, name: str) -> tuple[int, ...]:
    with safe_open(path, "pt") as file:
        return tuple(file.get_slice(name).get_shape())


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _place(name: str) -> tuple[int, str]:
    """Tables and final norm first, then the blocks in order."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return (numbers[0] + 1, name) if numbers else (0, name)


def _packed(
    held: Mapping[str, Path], name: str, new: str, grid: Grid, row_order: Callable[[str, int], Tensor | None]
) -> Outgoing:
    """A quantized matrix: its blocks, checked, rows in the order of the file."""
    assert isinstance(grid, GgufGrid)
    module = module_of(name)
    rows, row_bytes = _shape(held[f"{module}{_BLOCKS}"], f"{module}{_BLOCKS}")
    shape = rows, row_bytes // grid.block_type.nbytes * grid.block_type.block
    matrix = Matrix(name=name, parameter=name, sources=(name,), shape=shape, fusion="")

    def read() -> Tensor:
        specs = Native().specs(matrix, grid, torch.float32)
        stored = {spec.name: _tensor(held[spec.name], spec.name) for spec in specs}
        Native().weight(matrix, stored, grid)  # checks
        blocks, order = stored[module + _BLOCKS], row_order(name, rows)
        return blocks if order is None else blocks[order]

    return Outgoing(new, grid.type, shape, read)


def _kept(
    path: Path,
    name: str,
    new: str,
    architecture: gguf_model.Architecture,
    order: Tensor | None,
    *,
    grid: GgufGrid | None,
) -> Outgoing:
    """A tensor that is not quantized, or with a grid an embedding or head that is."""
    shape = _shape(path, name)
    shift = architecture.norm_shift if name.endswith("norm.weight") else 0.0

    def read(dtype: torch.dtype | None) -> Tensor:
        value = _tensor(path, name)
        value = value if order is None else value[order]
        return value if dtype is None else value.to(dtype) + shift

    if len(shape) == 1:
        return Outgoing(new, "F32", shape, lambda: read(torch.float32))
    if grid is not None:
        return Outgoing(new, grid.type, shape, lambda: _encoded(read(torch.float32), grid))
    with safe_open(path, "pt") as file:
        kind = file.get_slice(name).get_dtype()  # the names of safetensors are those of GGUF
    return Outgoing(new, kind, shape, lambda: read(None))


def table_grid(name: str, shape: tuple[int, ...], types: Sequence[str], *, tied: bool) -> GgufGrid:
    """The grid of an embedding or head that is not in the plan, as llama.cpp's presets have it.

    A head, and an embedding that is one too, takes Q6_K, or Q8_0 where 256 do not divide the width; another embedding
    the type that most matrices have.

    Args:
        name: in the file.
        shape: of the tensor.
        types: of the matrices in the plan.
        tied: the embedding is the head.
    """
    head = tied or name == "output.weight"
    grid = GgufGrid(type="Q6_K" if head or not types else _most(types), range="error")  # type: ignore[arg-type]
    return grid.resolve((shape[0], shape[1]), torch.float32)


def _encoded(value: Tensor, grid: GgufGrid) -> Tensor:
    fitted = grid.fit(value, None)
    return fitted.store(fitted.encode(value), (value.shape[0], value.shape[1]))["blocks"]


def _most(types: Sequence[str]) -> str:
    return max(sorted(set(types)), key=types.count)


def _file_type(types: Sequence[str]) -> int:
    """llama.cpp's number for files whose blocks mostly have the type that most have here."""
    most = _most(types)
    suffix = {"Q3_K": "_S", "Q4_K": "_S", "Q5_K": "_S"}.get(most, "")
    if most == "F32":
        return int(LlamaFileType.ALL_F32)
    return int(LlamaFileType[f"MOSTLY_{most}{suffix}"])


# ---- reading --------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor of a file, by the name it has in a checkpoint.

    Attributes:
        grid: of blocks; None for plain numbers.
        dense: reads its values, in float32.
        weight: reads its blocks, rows in the checkpoint's order; not for plain numbers.
    """

    place: str
    shape: tuple[int, ...]
    grid: GgufGrid | None
    dense: Callable[[], Tensor]
    weight: Callable[[], QuantizedWeight]


def stored_tensors(path: Path, config: Mapping[str, object]) -> dict[str, Stored]:
    """Every tensor of a file, by the name it has in a checkpoint of the model.

    Args:
        path: of the file.
        config: of the model, as a dictionary.

    Raises:
        FormatError: the file is damaged, of another architecture than the model, or not one of ours.
    """
    file = GgufFile.open(path)
    architecture = gguf_model.architecture_of(config)
    found = file.metadata.get("general.architecture")
    if found != architecture.name:
        raise FormatError(
            f"{path.name} holds a model of architecture {found!r}; config.json says {architecture.name!r}."
        )
    names = file.metadata.get(NAMES)
    if names is None or len(names) != len(file.tensors) or CHECKSUMS not in file.metadata:
        raise FormatError(f"{path.name} was not made by mezzotint, or is damaged: it lacks {NAMES} or {CHECKSUMS}.")
    result = {}
    for new, name in zip(file.tensors, names, strict=True):
        if not name:
            continue
        info = file.tensors[new]
        order = gguf_model.row_order(architecture, config, name, info.shape[0])
        shift = architecture.norm_shift if name.endswith("norm.weight") else 0.0
        grid = GgufGrid(type=info.type) if info.type in BLOCK_TYPES else None  # type: ignore[arg-type]
        weight = partial(_blocks, file, new, order, grid)
        dense = partial(_plain, file, new, order, shift) if grid is None else lambda weight=weight: weight().dense()
        result[name] = Stored(new, info.shape, grid, dense, weight)
    return result


def _plain(file: GgufFile, name: str, order: Tensor | None, shift: float) -> Tensor:
    value = file.read(name).float() - shift
    return value if order is None else value[order.argsort()]


def _blocks(file: GgufFile, name: str, order: Tensor | None, grid: GgufGrid | None) -> QuantizedWeight:
    assert grid is not None, f"{name} has no blocks"
    rows, columns = file.tensors[name].shape
    blocks = file.read(name)
    blocks = blocks if order is None else blocks[order.argsort()]
    code, fitted = grid.restore((rows, columns), {"blocks": blocks})
    return QuantizedWeight(shape=(rows, columns), code=code, grid=fitted)
