"""The GPTQ layout: exact inverses, packing by the book, the rules, what is damaged, and the configuration."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from formats.llama import UNIFORM, entry_of, grids_of, make_llama, map_of, plan_of, write_folder
from formats.make_gptq_golden import packed_by_the_book
from formats.test_compressed_tensors import assert_same_weight, matrix_of
from formats.uniform_weights import uniform_weights
from mezzotint.blockwise.source import open_source
from mezzotint.core.contracts import QuantizedWeight
from mezzotint.errors import FormatError, ModelError
from mezzotint.formats.gptq import Gptq, GptqV2, read_grid, reader_of
from mezzotint.grids.uniform import FittedUniform, UniformGrid
from mezzotint.storage.checksums import FILE

GOLDEN = Path(__file__).parent / "golden" / "gptq"
HALF = replace(UNIFORM, scale_dtype="float16")


WEIGHTS = uniform_weights(
    st.sampled_from([2, 3, 4, 8]),
    st.tuples(
        st.integers(1, 3).map(lambda n: 32 * n),
        st.integers(1, 3).map(lambda n: 64 * n),
        st.sampled_from([16, 32, 64, None]),
    ),
    ("float16", "bfloat16"),
)


def form_of(weight: QuantizedWeight) -> Gptq:
    return Gptq() if weight.grid.grid.symmetric else GptqV2()


@given(weight=WEIGHTS)
def test_read_inverts_write(weight: QuantizedWeight):
    matrix, grid, form = matrix_of(weight.shape), weight.grid.grid, form_of(weight)
    tensors = form.tensors(matrix, weight, grid.storage_dtype)
    assert_same_weight(form.weight(matrix, tensors, grid), weight)
    specs = form.specs(matrix, grid, grid.storage_dtype)
    assert {s.name: (s.dtype, s.shape) for s in specs} == {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@given(weight=WEIGHTS)
def test_words_are_those_of_the_book(weight: QuantizedWeight):
    matrix, grid, form = matrix_of(weight.shape), weight.grid.grid, form_of(weight)
    tensors = form.tensors(matrix, weight, torch.float32)
    zero_point = weight.grid.zero_point.numpy().astype(np.int64)
    expected = packed_by_the_book(weight.code.numpy(), zero_point, grid.bits, grid.group_size, version=form.version)
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[f"{matrix.name}.{name}"].numpy(), value, err_msg=name)


# ---- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "changes", "shape", "rule"),
    [
        (Gptq(), {}, (32, 64), None),
        (Gptq(), {"bits": 5}, (32, 64), "gptq-bits"),
        (Gptq(), {"bits": 6}, (32, 64), "gptq-bits"),
        (Gptq(), {"group_size": 24}, (32, 64), "ragged-group"),
        (Gptq(), {"group_size": None}, (32, 48), "gptq-words"),
        (Gptq(), {}, (40, 64), "gptq-words"),
        (Gptq(), {"symmetric": False}, (32, 64), "zero-point-less-one"),
        (GptqV2(), {"symmetric": False}, (32, 64), None),
    ],
)
def test_rules(form: Gptq, changes: dict[str, object], shape: tuple[int, int], rule: str | None):
    matrix = matrix_of(shape)
    refusal = form.refuses(entry_of(replace(HALF, **changes), matrix), matrix)
    assert (None if refusal is None else refusal.rule) == rule
    if refusal is not None and refusal.nearest is not None:
        assert form.refuses(entry_of(refusal.nearest, matrix), matrix) is None


@pytest.mark.parametrize(
    ("scale_dtype", "checkpoint", "rule"),
    [
        ("auto", torch.bfloat16, None),
        ("auto", torch.float16, None),
        ("float16", torch.float32, None),
        ("auto", torch.float32, "half-scales"),
        ("float16", torch.bfloat16, "scale-dtype"),
    ],
)
def test_dtype_of_scales(scale_dtype: str, checkpoint: torch.dtype, rule: str | None):
    grid, matrix = replace(HALF, scale_dtype=scale_dtype), matrix_of((32, 64))
    if rule is None:
        assert {s.dtype for s in Gptq().specs(matrix, grid, checkpoint)} <= {torch.int32, torch.float16, torch.bfloat16}
        return
    with pytest.raises(FormatError, match=rf"\[{rule}\]"):
        Gptq().specs(matrix, grid, checkpoint)


# ---- configuration --------------------------------------------------------------------------------------------------

MODEL = map_of(make_llama())
FUSED = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}


def config_of(grids: dict[str, UniformGrid]) -> dict[str, object]:
    plan = plan_of(grids, MODEL, Gptq())
    assert Gptq().refuses_plan(plan, MODEL) == ()
    config = dict(Gptq().config(plan, MODEL))
    assert json.loads(json.dumps(config)) == config
    return config


def found_by(config: dict, name: str) -> dict[str, object] | None:
    """What vLLM, SGLang and GPTQModel take for a module: the first rule that matches its name from the start."""
    for pattern, rule in config.get("dynamic", {}).items():
        if re.match(pattern[2:], name):
            return None if pattern.startswith("-:") else {**config, **rule}
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"": {"group_size": None}},
        {"down_proj": {"bits": 8}},
        {"layers.1.": {"bits": 2, "group_size": 64}},
        {"0.self_attn.q": {"bits": 8}, "0.self_attn.k": {"bits": 8}, "0.self_attn.v": {"bits": 8}},
        {"gate_proj": {"bits": 3}, "up_proj": {"bits": 3}, "layers.1.self_attn.o_proj": {"bits": 8}},
    ],
)
@pytest.mark.parametrize("dropped", ["nothing", "o_proj", "layers.0.", "layers.1.mlp.down_proj"])
def test_rules_hold_for_own_and_for_fused_names(changes: dict[str, dict[str, object]], dropped: str):
    grids = {name: grid for name, grid in grids_of(MODEL, changes, HALF).items() if dropped not in name}
    config = config_of(grids)
    names = {name: name for name in MODEL.matrices if name != "lm_head"}
    for name in list(names):
        stem, _, last = name.rpartition(".")
        names |= {f"{stem}.{fused}": f"{stem}.{member}" for fused, member in FUSED.items() if last == member}
    assert len(names) == 2 * (7 + 2)
    for name, member in names.items():
        found, grid = found_by(config, name), grids.get(member)
        assert (found is None) == (grid is None), name
        if grid is not None and found is not None:
            size = -1 if grid.group_size is None else grid.group_size
            assert (found["bits"], found["group_size"], found["sym"]) == (grid.bits, size, grid.symmetric)
            assert read_grid(config, member, torch.float16) == replace(grid, range="minmax")
    listed = config.get("modules_in_block_to_quantize")
    assert (listed is None) == (dropped == "nothing")
    if listed is not None:
        assert set(listed[0]) == set(grids)


def test_a_fused_class_without_a_known_name_cannot_have_a_scheme_of_its_own():
    stem = "model.layers.0.self_attn"
    names = {f"{stem}.q_proj": f"{stem}.query", f"{stem}.k_proj": f"{stem}.key", f"{stem}.v_proj": f"{stem}.value"}
    matrices = {}
    for name, matrix in MODEL.matrices.items():
        new = names.get(name, name)
        matrices[new] = replace(matrix, name=new, parameter=f"{new}.weight", sources=(f"{new}.weight",))
    model = replace(MODEL, matrices=matrices)
    assert Gptq().refuses_plan(plan_of(grids_of(model, {}, HALF), model, Gptq()), model) == ()
    odd = grids_of(model, {part: {"bits": 8} for part in ("query", "key", "value")}, HALF)
    (refusal,) = Gptq().refuses_plan(plan_of(odd, model, Gptq()), model)
    assert refusal.rule == "fused-name"


def test_the_version_is_in_the_configuration():
    assert isinstance(reader_of({"checkpoint_format": "gptq"}), Gptq)
    assert reader_of({"checkpoint_format": "gptq_v2"}).version == 2
    with pytest.raises(FormatError, match="checkpoint_format 'marlin'"):
        reader_of({"checkpoint_format": "marlin"})


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    grid = replace(UNIFORM, scale_dtype="float16")
    write_folder(make_llama(), lambda m: None if m.name == "lm_head" else grid, Gptq(), tmp_path)
    return tmp_path


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("part", ["qweight", "scales", "qzeros", "g_idx"])
def test_flipped_bits_are_told_with_the_name_of_the_tensor(folder: Path, part: str):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + length])[f"{NAME}.{part}"]["data_offsets"]
    data[8 + length + begin + 5] ^= 0x10
    path.write_bytes(data)
    source = open_source(folder)
    source.checkpoint.parameter("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(FormatError, match=rf"{re.escape(NAME)}\.{part} is damaged: it has checksum"):
        source.checkpoint.parameter(f"{NAME}.weight")
    (folder / FILE).unlink()
    if part in ("qzeros", "g_idx"):  # these can be told from what the configuration says
        with pytest.raises(FormatError, match=rf"{re.escape(NAME)}\.{part}"):
            open_source(folder).checkpoint.parameter(f"{NAME}.weight")


def test_cut_files_are_told_with_the_name_of_the_tensor(folder: Path):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[f"{NAME}.qweight"]["data_offsets"]
    path.write_bytes(data[: 8 + length + (begin + end) // 2])
    with pytest.raises(ModelError, match=rf"is truncated.*ends in tensor '{re.escape(NAME)}.qweight'"):
        open_source(folder)


@pytest.mark.parametrize("part", ["qweight", "scales", "qzeros", "g_idx"])
def test_missing_and_misshapen_tensors_are_named(part: str):
    matrix = matrix_of((32, 64))
    weight = QuantizedWeight(
        shape=(32, 64),
        code=torch.zeros(32, 64, dtype=torch.uint8),
        grid=FittedUniform(grid=HALF, shape=(32, 64), scale=torch.ones(32, 2), zero_point=torch.full((32, 2), 8.0)),
    )
    tensors = Gptq().tensors(matrix, weight, torch.float16)
    name = f"{matrix.name}.{part}"
    with pytest.raises(FormatError, match=f"{name} is missing"):
        Gptq().weight(matrix, {n: t for n, t in tensors.items() if n != name}, HALF)
    with pytest.raises(FormatError, match=f"{name} is torch.* of shape"):
        Gptq().weight(matrix, {**tensors, name: tensors[name][:-1]}, HALF)


# ---- golden files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda path: path.stem)
def test_golden_files_read_and_write_the_same(path: Path):
    stored = load_file(path)
    expected = {n.removeprefix("expected."): stored.pop(n) for n in list(stored) if n.startswith("expected.")}
    settings = json.loads(path.with_suffix(".json").read_text())
    form = reader_of(settings["quantization_config"])
    matrix = matrix_of(tuple(settings["shape"]))
    dtype = stored[f"{matrix.name}.scales"].dtype
    weight = form.weight(matrix, stored, read_grid(settings["quantization_config"], matrix.name, dtype))
    torch.testing.assert_close(weight.code, expected["code"], rtol=0, atol=0)
    torch.testing.assert_close(weight.dense(), expected["value"], rtol=0, atol=0)
    torch.testing.assert_close(form.tensors(matrix, weight, dtype), stored, rtol=0, atol=0)


def test_golden_files_are_there():
    assert len(list(GOLDEN.glob("*.safetensors"))) == 4
