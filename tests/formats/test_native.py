"""Our own format: every grid in every basis comes back as it was, and nothing else is taken for it."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.llama import CONFIG, entry_of, make_llama, map_of, plan_of
from mezzotint.core.contracts import Aim, Grid, QuantizedWeight, Transform
from mezzotint.core.plans import Format
from mezzotint.core.statistics import padded
from mezzotint.core.structure import Matrix
from mezzotint.errors import FormatError
from mezzotint.formats.decoded import packed_weights
from mezzotint.formats.native import CHECKSUM, Native, read_schemes
from mezzotint.grids.gguf.grid import GgufGrid
from mezzotint.grids.lookup import LookupGrid
from mezzotint.grids.trellis import TrellisGrid
from mezzotint.grids.uniform import UniformGrid
from mezzotint.grids.vector import VectorGrid
from mezzotint.registry import GRIDS
from mezzotint.transforms.hadamard import Hadamard
from mezzotint.transforms.incoherence import Quip
from reference import native_reader

FORM = Native()
NAME = "model.layers.0.mlp.up_proj"
CASES: dict[str, tuple[Grid, tuple[int, int]]] = {
    "uniform ragged": (UniformGrid(bits=3, group_size=32, range="minmax", scale_dtype="bfloat16"), (37, 50)),
    "uniform symmetric": (UniformGrid(bits=8, group_size=None, range="minmax", symmetric=True), (16, 32)),
    "uniform of a matrix": (UniformGrid(bits=3, range="minmax", scale_per="matrix"), (24, 42)),
    "lookup": (LookupGrid(bits=5, group_size=16, range="rms", scale_dtype="float16"), (33, 40)),
    "lookup nf4": (LookupGrid(table="nf4", group_size=None, range="absmax"), (8, 24)),
    "lookup of a matrix": (LookupGrid(bits=2, table="even", range="rms", scale_per="matrix"), (24, 42)),
    "vector": (VectorGrid(bits=3.5, group_size=8, range="rms", scale_dtype="float16"), (9, 64)),
    "trellis": (TrellisGrid(bits=2.25, window=4), (40, 50)),
    "trellis rows": (TrellisGrid(bits=4.125, window=4, scale_per="row"), (33, 32)),
    "gguf": (GgufGrid(type="Q4_K", range="error"), (9, 512)),
}
every_case = pytest.mark.parametrize("case", CASES)
every_basis = pytest.mark.parametrize(
    "transform", [None, Hadamard(), Hadamard(block=4, sides="input"), Quip(), Quip(matrices="hadamard")]
)


def matrix_of(shape: tuple[int, int], **changes: Any) -> Matrix:
    matrix = Matrix(name=NAME, parameter=f"{NAME}.weight", sources=(f"{NAME}.weight",), shape=shape, fusion="0.up")
    return replace(matrix, **changes)


def quantized(grid: Grid, transform: Transform | None, weight: Tensor) -> QuantizedWeight:
    """Rounded to nearest, as the pipeline does it."""
    shape = (weight.shape[0], weight.shape[1])
    basis = None
    if transform is not None:
        (basis,) = transform.fit([Aim(matrix=weight)], None, None, torch.Generator().manual_seed(1))
        weight = basis.weight(weight)
    if grid.pads:
        weight, _ = padded(weight, None, grid.multiple)
    fitted = grid.fit(weight, None)
    return QuantizedWeight(shape=shape, code=fitted.encode(weight), grid=fitted, basis=basis)


def example(case: str, transform: Transform | None = None) -> tuple[Matrix, QuantizedWeight]:
    grid, shape = CASES[case]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    return matrix_of(shape), quantized(grid.resolve(shape, torch.float32), transform, weight)


def stored(case: str = "trellis", transform: Transform | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``quantization_config`` and tensors of one module."""
    matrix, weight = example(case, transform)
    entry = replace(entry_of(weight.grid.grid, matrix), transform=transform)
    model = map_of(make_llama())
    plan = replace(plan_of({}, model, FORM), entries=(entry,))
    config = FORM.config(plan, replace(model, matrices={NAME: matrix}))
    return json.loads(json.dumps(config)), FORM.tensors(matrix, weight, torch.float32)


@pytest.mark.parametrize("case", ["uniform ragged", "uniform of a matrix", "lookup", "lookup of a matrix", "trellis"])
@pytest.mark.parametrize("transform", [Quip(), Quip(matrices="hadamard")])
def test_the_independent_reader_in_the_basis_of_quip(case: str, transform: Quip):
    config, tensors = stored(case, transform)
    inside = {name.removeprefix(f"{NAME}.weight_"): value for name, value in tensors.items()}
    values = {name: v.double().numpy() if v.is_floating_point() else v.numpy() for name, v in inside.items()}
    values["packed"] = values["packed"].view("uint32")
    (scheme,) = config["schemes"]
    expected = native_reader.decode(scheme, values)
    _, weight = example(case, transform)
    # in float32: sums of up to 50 products, twice
    torch.testing.assert_close(weight.dense().double().numpy(), expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_meets_the_protocol():
    assert isinstance(FORM, Format)


def test_every_grid_is_tried():
    assert {grid.kind for grid, _ in CASES.values()} == set(GRIDS)


@every_case
@every_basis
def test_round_trip(case: str, transform: Transform | None):
    matrix, weight = example(case, transform)
    tensors = FORM.tensors(matrix, weight, torch.float32)
    specs = FORM.specs(matrix, weight.grid.grid, torch.float32, transform)
    assert [(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()] == list(specs)
    assert all(value.is_contiguous() for value in tensors.values())
    again = FORM.weight(matrix, tensors, weight.grid.grid, transform)
    torch.testing.assert_close(again.code, weight.code, rtol=0, atol=0)
    torch.testing.assert_close(again.dense(), weight.dense(), rtol=0, atol=0)
    assert again.bits() == weight.bits()
    torch.testing.assert_close(FORM.tensors(matrix, again, torch.float32), tensors, rtol=0, atol=0)


@every_case
def test_what_is_stored_is_as_large_as_it_says(case: str):
    """But for the checksum."""
    matrix, weight = example(case, Hadamard())
    specs = {s.name.rpartition(".")[2]: s for s in FORM.specs(matrix, weight.grid.grid, torch.float32, Hadamard())}
    spare = 8 * specs[CHECKSUM].nbytes
    assert 8 * sum(s.nbytes for s in specs.values()) == weight.bits().total + spare
    assert weight.bits().code == -(-int(8 * weight.grid.grid.bits) * matrix.shape[0] * matrix.shape[1] // 8)


@every_case
@every_basis
def test_a_reader_needs_the_config_only(case: str, transform: Transform | None):
    _, weight = example(case, transform)
    config, tensors = stored(case, transform)
    ((name, found),) = packed_weights(config, tensors, tensors.__getitem__).items()
    assert name == f"{NAME}.weight"
    assert set(found.parts) == set(tensors)
    assert found.shape == weight.shape
    torch.testing.assert_close(found.dense(), weight.dense(), rtol=0, atol=0)


def test_modules_of_one_kind_share_a_scheme():
    model = map_of(make_llama())
    grids = {name: TrellisGrid(bits=2 + ("mlp" in name)) for name in model.matrices if name != "lm_head"}
    config = FORM.config(plan_of(grids, model, FORM), model)
    schemes = read_schemes(json.loads(json.dumps(config)))
    assert {name: scheme.grid for name, scheme in schemes.items()} == grids
    assert all(schemes[name].shape == model.matrices[name].shape for name in grids)
    shapes = {(model.matrices[name].shape, "mlp" in name) for name in grids}
    assert len(config["schemes"]) == len(shapes) < len(grids) == 7 * CONFIG.num_hidden_layers


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [None, Hadamard()])
@every_case
def test_every_flipped_bit_is_noticed(case: str, transform: Transform | None):
    config, tensors = stored(case, transform)
    generator = torch.Generator().manual_seed(3)
    for name, value in tensors.items():
        place = int(torch.randint(value.numel() * value.element_size(), (1,), generator=generator))
        damaged = value.clone()
        damaged.view(-1).view(torch.uint8)[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        with pytest.raises(FormatError, match=rf"{NAME} is damaged.*checksum.*download"):
            read({**tensors, name: damaged}, config)


def read(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for weight in packed_weights(config, tensors, tensors.__getitem__).values():
        weight.dense()


def test_missing_and_misshapen_tensors():
    config, tensors = stored()
    for name in tensors:
        with pytest.raises(FormatError, match="missing"):
            read({other: value for other, value in tensors.items() if other != name}, config)
    scale = f"{NAME}.weight_scale"
    for wrong in (tensors[scale].half(), torch.zeros(2)):
        with pytest.raises(FormatError, match=rf"{scale} is .* config.json says torch.float32 of \(1,\)"):
            read({**tensors, scale: wrong}, config)
    with pytest.raises(FormatError, match=r"x.y is packed, but quantization_config does not name it"):
        read({**tensors, f"x.y.{CHECKSUM}": torch.tensor([0])}, config)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("format_version",), 1, r"format_version 1; this version reads 2.*update mezzotint"),
        (("schemes",), None, "cannot be read"),
        (("modules",), {NAME: 5}, r"cannot be read .*range.*update"),
        (("schemes", 0, "grid", "kind"), "trelis", r"unknown grid 'trelis'. Did you mean 'trellis'.*update"),
        (("schemes", 0, "grid", "bits"), 9.0, r"grid.bits is 9.0.*update"),
        (("schemes", 0, "grid", "colour"), 1, r"unknown setting 'grid.colour'.*update"),
        (("schemes", 0, "transform"), {"kind": "fourier"}, "unknown transform 'fourier'"),
        (("schemes", 0, "grid", "states"), 13, r"cannot be read .*states"),
        (("schemes", 0, "shape"), [3], r"cannot be read .*update"),
    ],
)
def test_a_config_of_another_version_is_refused(where: tuple[Any, ...], value: Any, message: str):
    config, tensors = stored()
    changed = copy.deepcopy(config)
    inside = changed
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    with pytest.raises(FormatError, match=message):
        read(tensors, changed)
    del inside[where[-1]]
    if where[-1] not in ("transform", "colour", "bits", "states"):  # settings have defaults
        with pytest.raises(FormatError, match=r"misses|None|cannot"):
            read(tensors, changed)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"linear": False}, "linear-only"),
        ({"transposed": True}, "linear-only"),
        ({"expert": 1}, "linear-only"),
        ({"sources": (f"{NAME}.weight", "b.weight")}, "linear-only"),
        ({"sources": (f"{NAME}.packed",)}, "linear-only"),
        ({"tied_to": "model.embed_tokens.weight"}, "tied"),
        ({"linear": False, "lookup": True}, None),
        ({}, None),
    ],
)
def test_refusals(changes: dict[str, Any], rule: str | None):
    matrix = matrix_of((40, 50), **changes)
    refusal = FORM.refuses(entry_of(TrellisGrid(), matrix), matrix)
    assert (refusal and refusal.rule) == rule
    if rule == "linear-only":
        assert "--for dense" in str(refusal)


def test_rows_that_are_looked_up_are_not_mixed():
    matrix = matrix_of((40, 50), linear=False, lookup=True)
    entry = entry_of(TrellisGrid(), matrix)
    for sides, rule in (("input", None), ("both", "mixed-rows")):
        refusal = FORM.refuses(replace(entry, transform=Hadamard(sides=sides)), matrix)
        assert (refusal and refusal.rule) == rule
