"""Files of every format of tensors that are cut short or have other bytes are refused, with the name of the tensor."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mezzotint.blockwise.source import open_source
from mezzotint.errors import FormatError, ModelError
from runs import TINY_LLAMA, quantized

MODULE = "model.layers.2.mlp.down_proj"
KEPT = ("*.self_attn.*", "*.gate_proj", "*.up_proj", "*.[01].mlp.*")  # everything else
TRELLIS = {"grid.kind": "trellis", "grid.bits": 2.0, "grid.states": 12, "transform.kind": "hadamard"}


class Case(NamedTuple):
    form: str
    settings: dict[str, Any]
    parts: tuple[str, ...]


CASES = [
    Case(
        "compressed-tensors",
        {"grid.symmetric": False},
        ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    ),
    Case("gptq", {"grid.symmetric": True}, ("qweight", "scales", "qzeros", "g_idx")),
    Case("gptq-v2", {}, ("qweight", "scales", "qzeros", "g_idx")),
    Case("exl3", {}, ("trellis", "suh", "svh", "mul1")),
    Case(
        "mezzotint",
        TRELLIS,
        (
            "weight_packed",
            "weight_scale",
            "weight_basis_input_sign",
            "weight_basis_output_scale",
            "weight_checksum",
        ),
    ),
    Case("dense", {}, ("weight",)),
]
every_part = pytest.mark.parametrize(
    ("case", "part"),
    [pytest.param(case, part, id=f"{case.form}-{part}") for case in CASES for part in case.parts],
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every format with one quantized matrix; not to be changed."""
    place = tmp_path_factory.mktemp("made")
    for case in CASES:
        settings = {"grid.bits": 4, **case.settings} if case.form != "exl3" else case.settings
        quantized(TINY_LLAMA, place / case.form, "rtn", format=case.form, settings=settings, keep=KEPT)
    return {case.form: place / case.form for case in CASES}


def copied(folder: Path, target: Path) -> tuple[Path, bytearray, dict[str, Any], int]:
    """A copy of a folder: its one file, what is in it, its header, and where the tensors begin."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    return path, data, json.loads(data[8:start]), start


def test_every_part_is_looked_at(made: dict[str, Path], tmp_path: Path):
    for case in CASES:
        _, _, header, _ = copied(made[case.form], tmp_path / case.form)
        assert {name for name in header if name.startswith(MODULE)} == {f"{MODULE}.{part}" for part in case.parts}


@every_part
def test_other_bytes(case: Case, part: str, made: dict[str, Path], tmp_path: Path):
    path, data, header, start = copied(made[case.form], tmp_path / "copy")
    begin, end = header[f"{MODULE}.{part}"]["data_offsets"]
    data[start + (begin + end) // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(FormatError, match=rf"{re.escape(MODULE)}(\.{part})? is damaged"):
        open_source(path.parent).checkpoint.parameter(f"{MODULE}.weight")


@every_part
def test_cut_files(case: Case, part: str, made: dict[str, Path], tmp_path: Path):
    path, data, header, start = copied(made[case.form], tmp_path / "copy")
    begin, end = header[f"{MODULE}.{part}"]["data_offsets"]
    path.write_bytes(data[: start + (begin + end) // 2])
    with pytest.raises(ModelError, match=rf"is truncated.*ends in tensor '{re.escape(MODULE)}\.{part}'"):
        open_source(path.parent)
