"""EXL3: exact inverses, ExLlamaV3's reading of what is written, the rules, and what is damaged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from formats.llama import entry_of
from formats.make_exl3_golden import CASES, GOLDEN, MODULE, ROWS
from formats.test_compressed_tensors import assert_same_weight, matrix_of
from mezzotint.core.aims import Aim
from mezzotint.core.contracts import QuantizedWeight
from mezzotint.core.structure import Block, Matrix, ModelMap
from mezzotint.errors import FormatError
from mezzotint.formats.decoded import packed_weights
from mezzotint.formats.exl3 import TRANSFORM, Exl3, holds, read_grid
from mezzotint.grids.trellis import TrellisGrid
from mezzotint.grids.uniform import UniformGrid
from mezzotint.transforms.hadamard import Hadamard
from reference import exl3

FORM = Exl3()
CONFIG = {"quant_method": "exl3"}
# fma(1024 + b, k, c) with k and c rounded to float16 lies .0035 below to .0002 above (b - 510) / 147.7, and is rounded
# to float16, by 2^-10 at most below 4
HALF = 0.0045


def quantized(shape: tuple[int, int], bits: int, seed: int) -> QuantizedWeight:
    """A random matrix in the basis, with random codes: what the format must hold."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(shape, generator=generator)
    (basis,) = TRANSFORM.fit([Aim(matrix=target, corrected=False)], None, None, generator)
    fitted = TrellisGrid(bits=bits, states=16).fit(basis.weight(target), None)
    code = torch.randint(-(2**31), 2**31, fitted.new_code().shape, generator=generator).to(torch.int32)
    return QuantizedWeight(shape=shape, code=code, grid=fitted, basis=basis)


def assert_near(weight: QuantizedWeight, theirs: np.ndarray, svh: np.ndarray, scale: float) -> None:
    """Hadamard matrices keep the sum of squares: the mean error without the scales of outputs is that in the basis."""
    error = (theirs - weight.dense().double().numpy()) / svh[:, None].astype(np.float64)
    assert np.sqrt(np.square(error).mean()) < HALF * scale


@given(
    bits=st.integers(1, 6),
    rows=st.integers(1, 2),
    columns=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_read_inverts_write(bits: int, rows: int, columns: int, seed: int):
    weight = quantized((128 * rows, 128 * columns), bits, seed)
    matrix, grid = matrix_of(weight.shape), weight.grid.grid
    tensors = FORM.tensors(matrix, weight, torch.bfloat16)
    specs = FORM.specs(matrix, grid, torch.bfloat16, TRANSFORM)
    assert {s.name: (s.dtype, s.shape) for s in specs} == {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    again = FORM.weight(matrix, tensors, grid, TRANSFORM)
    assert_same_weight(again, weight)
    torch.testing.assert_close(dict(again.basis.stored), dict(weight.basis.stored), rtol=0, atol=0)
    ((name, packed),) = packed_weights(CONFIG, tensors, tensors.__getitem__).items()
    assert (name, packed.shape, packed.transform) == (f"{matrix.name}.weight", weight.shape, TRANSFORM)
    assert_same_weight(packed.weight(), weight)


@pytest.mark.parametrize("bits", range(1, 7))
def test_exllamav3_reads_the_same_values(bits: int):
    """In the basis within its half precision; and where it multiplies as we do, the same matrix."""
    weight = quantized((128, 256), bits, bits)
    parts = {
        n.rpartition(".")[2]: t.numpy() for n, t in FORM.tensors(matrix_of((128, 256)), weight, torch.float32).items()
    }
    inner = exl3.inner(parts["trellis"]).astype(np.float64)
    scale = float(weight.grid.scale)
    ours = weight.grid.decode(weight.code).double().numpy().T / scale
    assert np.abs(inner - ours).max() < HALF
    assert np.abs(inner - ours).max() > HALF / 4  # it does round
    assert_near(weight, exl3.weight(parts["trellis"], parts["suh"], parts["svh"]), parts["svh"], scale)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda path: path.stem)
def test_golden_files_read_and_write_the_same(path: Path):
    stored = load_file(path)
    rows = stored.pop("expected.rows")
    theirs = exl3.weight(*_arrays(stored))
    np.testing.assert_allclose(theirs[:ROWS], rows.numpy(), rtol=0, atol=1e-12)
    ((_, packed),) = packed_weights(CONFIG, stored, stored.__getitem__).items()
    assert packed.shape == CASES[path.stem][:2]
    weight = packed.weight()
    assert FORM.tensors(matrix_of(packed.shape), weight, torch.float32).keys() == stored.keys()
    torch.testing.assert_close(FORM.tensors(matrix_of(packed.shape), weight, torch.float32), stored, rtol=0, atol=0)
    assert_near(weight, theirs, stored[f"{MODULE}.svh"].numpy(), 1.0625)


def test_golden_files_are_there():
    assert {path.stem for path in GOLDEN.glob("*.safetensors")} == set(CASES)


def _arrays(stored: dict[str, Tensor]) -> list[np.ndarray]:
    return [stored[f"{MODULE}.{part}"].numpy() for part in ("trellis", "suh", "svh")]


# ---- rules ----------------------------------------------------------------------------------------------------------

GOOD = TrellisGrid(bits=3, states=16)


@pytest.mark.parametrize(
    ("grid", "transform", "shape", "rule"),
    [
        (GOOD, TRANSFORM, (128, 256), None),
        (replace(GOOD, window=8), TRANSFORM, (128, 256), None),
        (GOOD, TRANSFORM, (128, 192), "exl3-width"),
        (GOOD, TRANSFORM, (96, 128), "exl3-width"),
        (replace(GOOD, bits=3.25), TRANSFORM, (128, 128), "exl3-code"),
        (replace(GOOD, states=12), TRANSFORM, (128, 128), "exl3-code"),
        (replace(GOOD, scale_per="row"), TRANSFORM, (128, 128), "exl3-code"),
        (UniformGrid(bits=8, group_size=32, scale_dtype="float16"), TRANSFORM, (128, 128), "exl3-code"),
        (GOOD, None, (128, 128), "exl3-basis"),
        (GOOD, Hadamard(sides="input"), (128, 128), "exl3-basis"),
        (GOOD, Hadamard(block=64), (128, 128), "exl3-basis"),
    ],
)
def test_rules(grid: TrellisGrid, transform: Hadamard | None, shape: tuple[int, int], rule: str | None):
    matrix = matrix_of(shape)
    refusal = FORM.refuses(replace(entry_of(grid, matrix), transform=transform), matrix)
    assert (None if refusal is None else refusal.rule) == rule
    assert holds(grid) == (rule != "exl3-code")
    if rule == "exl3-code":
        assert FORM.refuses(replace(entry_of(refusal.nearest, matrix), transform=TRANSFORM), matrix) is None


def test_what_is_no_linear_alone_is_refused():
    tied = matrix_of((128, 128), tied_to="model.embed_tokens")
    assert FORM.refuses(entry_of(GOOD, tied), tied).rule == "tied"


def test_the_configuration_has_mean_bits():
    shapes = {"model.layers.0.a": (128, 128, 2), "model.layers.0.b": (128, 384, 4), "lm_head": (256, 128, 6)}
    matrices, entries = {}, []
    for name, (rows, columns, bits) in shapes.items():
        matrices[name] = Matrix(
            name=name, parameter=f"{name}.weight", sources=(f"{name}.weight",), shape=(rows, columns), fusion=name
        )
        entries.append(replace(entry_of(replace(GOOD, bits=bits), matrices[name]), block=None, transform=TRANSFORM))
    model = ModelMap(
        blocks=(Block(index=0, path="model.layers.0", groups=(), roles=(), kind="full_attention"),),
        matrices=matrices,
        embedding="model.embed_tokens",
        head="lm_head",
        final_norm=None,
        parallel_residual=False,
    )
    from formats.llama import plan_of

    plan = replace(plan_of({}, model, FORM), entries=tuple(entries))
    assert FORM.config(plan, model) == {"quant_method": "exl3", "bits": 3.5, "head_bits": 6, "codebook": "mul1"}
    assert FORM.config(replace(plan, entries=tuple(entries[:2])), model)["head_bits"] == 16


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("suh", None, "suh is missing"),
        ("mul1", None, "mul1 is missing.*another code"),
        ("svh", torch.ones(64, dtype=torch.float16), "svh is .* of shape .64,.; it should be .*128"),
        ("mul1", torch.tensor(1, dtype=torch.int32), "mul1 is 1; only the code"),
        ("suh", torch.arange(1, 129, dtype=torch.float16), "inputs of different scales"),
        ("trellis", torch.zeros(8, 8, 56, dtype=torch.int16), "3.5 bits a weight; 1 to 6"),
        ("trellis", torch.zeros(8, 8, 112, dtype=torch.int16), "7 bits a weight"),
    ],
)
def test_what_cannot_be_read(part: str, value: Tensor | None, message: str):
    tensors = FORM.tensors(matrix_of((128, 128)), quantized((128, 128), 2, 0), torch.float32)
    name = f"{MODULE}.{part}"
    changed = {n: t for n, t in tensors.items() if n != name} | ({} if value is None else {name: value})

    def read() -> None:
        for packed in packed_weights(CONFIG, changed, changed.__getitem__).values():
            packed.weight()

    with pytest.raises(FormatError, match=message):
        read()


def test_a_scale_that_float16_does_not_hold_is_refused():
    weight = quantized((128, 128), 2, 0)
    odd = replace(weight, grid=replace(weight.grid, scale=weight.grid.scale * (1 + 2**-12)))
    with pytest.raises(FormatError, match="float16 cannot hold"):
        FORM.tensors(matrix_of((128, 128)), odd, torch.float32)


def test_rates_that_are_read():
    assert [read_grid("m", 16 * bits).bits for bits in range(1, 7)] == [1, 2, 3, 4, 5, 6]
