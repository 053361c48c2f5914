"""Files of version 2 stay readable, by us and by a reader that knows docs/format.md only."""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from formats.make_native_golden import CASES, GOLDEN, module_of
from mezzotint.core.structure import Matrix
from mezzotint.formats.decoded import packed_weights
from mezzotint.formats.native import Native, read_schemes
from mezzotint.grids.lookup import gaussian_levels, nf4_levels
from reference import native_reader

every_file = pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda path: path.stem)


def assert_close(actual: np.ndarray, expected: np.ndarray, error: float) -> None:
    assert np.abs(actual - expected).max() <= error * np.abs(expected).max()


@every_file
def test_the_independent_reader(path: Path):
    config = json.loads(path.with_suffix(".json").read_text())
    expected = load_file(path)["expected.value"].numpy()
    (value,) = native_reader.decode_folder(path, config).values()
    assert_close(value, expected, 1e-12)


@every_file
def test_golden_files_read_and_write_the_same(path: Path):
    config = json.loads(path.with_suffix(".json").read_text())
    stored = load_file(path)
    expected = stored.pop("expected.value").numpy()
    ((name, weight),) = packed_weights(config, stored, stored.__getitem__).items()
    module = module_of(path.stem)
    assert name == f"{module}.weight"
    assert_close(weight.dense().numpy(), expected, 1e-6)  # a few float32 roundings, of sums of up to 8 for Hadamard
    scheme = read_schemes(config)[module]
    matrix = Matrix(name=module, parameter=name, sources=(name,), shape=scheme.shape, fusion="")
    again = Native().weight(matrix, stored, scheme.grid, scheme.transform)
    torch.testing.assert_close(Native().tensors(matrix, again, torch.float32), stored, rtol=0, atol=0)
    settings, written = scheme.settings(), config["schemes"][0]
    assert settings["shape"] == written["shape"]
    for stage in (
        "grid",
        "transform",
    ):  # a later version may say more: settings that have come since, at their defaults
        assert (settings[stage] or {}).items() >= (written[stage] or {}).items()
    assert read_schemes({**config, "schemes": [settings]})[module] == scheme


def test_golden_files_are_there():
    assert {path.stem for path in GOLDEN.glob("*.safetensors")} == set(CASES)
    assert len(CASES) == 6


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_are_those_of_the_document(bits: int):
    np.testing.assert_allclose(native_reader.gaussian(2**bits), gaussian_levels(2**bits).numpy(), atol=1e-9)
    np.testing.assert_allclose(native_reader.nf4(), nf4_levels()[0].numpy(), atol=1e-9)


def test_the_examples_of_the_document():
    found = doctest.testfile(str(Path(__file__).parents[2] / "docs" / "format.md"), module_relative=False)
    assert found.failed == 0
    assert found.attempted >= 10
