"""The packed format: exact inverses, the library's own packer, the rules, and the configuration."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle import apply_quantization_config
from compressed_tensors.utils.match import match_name
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from formats.llama import UNIFORM, entry_of, grids_of, make_llama, map_of, nearest, plan_of
from formats.uniform_weights import uniform_weights
from grids.toy_vector import ToyVectorGrid
from mezzotint.core.contracts import QuantizedWeight
from mezzotint.core.structure import Matrix, ModelMap
from mezzotint.errors import FormatError
from mezzotint.formats.compressed_tensors import CompressedTensors
from mezzotint.formats.targets import compact
from mezzotint.grids.uniform import UniformGrid

FORM = CompressedTensors()
GOLDEN = Path(__file__).parent / "golden"


def matrix_of(shape: tuple[int, int], **changes: object) -> Matrix:
    name = "model.layers.0.mlp.up_proj"
    matrix = Matrix(name=name, parameter=f"{name}.weight", sources=(f"{name}.weight",), shape=shape, fusion="0.up")
    return replace(matrix, **changes)


ROWS = st.integers(1, 70)
GROUPED = st.tuples(ROWS, st.integers(1, 4), st.sampled_from([1, 4, 32, 40])).map(lambda f: (f[0], f[1] * f[2], f[2]))
WEIGHTS = uniform_weights(
    st.integers(2, 8),
    st.one_of(GROUPED, st.tuples(ROWS, st.integers(1, 130), st.none())),
    ("float16", "bfloat16", "float32"),
)


def assert_same_weight(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert found.shape == expected.shape
    assert found.grid.grid == expected.grid.grid
    torch.testing.assert_close(found.code, expected.code, rtol=0, atol=0)
    torch.testing.assert_close(dict(found.grid.parameters), dict(expected.grid.parameters), rtol=0, atol=0)


@given(weight=WEIGHTS)
def test_read_inverts_write(weight: QuantizedWeight):
    matrix, grid = matrix_of(weight.shape), weight.grid.grid
    tensors = FORM.tensors(matrix, weight, grid.storage_dtype)
    assert_same_weight(FORM.weight(matrix, tensors, grid), weight)


@given(weight=WEIGHTS)
def test_specs_tell_the_tensors(weight: QuantizedWeight):
    matrix, grid = matrix_of(weight.shape), weight.grid.grid
    tensors = FORM.tensors(matrix, weight, grid.storage_dtype)
    specs = FORM.specs(matrix, grid, grid.storage_dtype)
    assert {s.name: (s.dtype, s.shape) for s in specs} == {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@given(weight=WEIGHTS)
def test_the_library_packs_the_same_words(weight: QuantizedWeight):
    matrix, grid = matrix_of(weight.shape), weight.grid.grid
    tensors = FORM.tensors(matrix, weight, grid.storage_dtype)
    half = 2 ** (grid.bits - 1)
    signed = (weight.code.int() - half).to(torch.int8)
    packed = tensors[f"{matrix.name}.weight_packed"]
    torch.testing.assert_close(packed, pack_to_int32(signed, grid.bits), rtol=0, atol=0)
    torch.testing.assert_close(unpack_from_int32(packed, grid.bits, weight.shape), signed, rtol=0, atol=0)
    if not grid.symmetric:
        zero_point = (weight.grid.zero_point - half).to(torch.int8)
        packed = tensors[f"{matrix.name}.weight_zero_point"]
        torch.testing.assert_close(packed, pack_to_int32(zero_point, grid.bits, packed_dim=0), rtol=0, atol=0)
        unpacked = unpack_from_int32(packed, grid.bits, zero_point.shape, packed_dim=0)
        torch.testing.assert_close(unpacked, zero_point, rtol=0, atol=0)


@given(weight=WEIGHTS)
def test_the_library_decodes_the_same_values(weight: QuantizedWeight):
    matrix, grid = matrix_of(weight.shape), weight.grid.grid
    strategy = {"strategy": "channel"} if grid.group_size is None else {"strategy": "group"}
    arguments = QuantizationArgs(num_bits=grid.bits, symmetric=grid.symmetric, group_size=grid.group_size, **strategy)
    state = {n.rpartition(".")[2]: t for n, t in FORM.tensors(matrix, weight, grid.storage_dtype).items()}
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    decoded = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    torch.testing.assert_close(decoded, weight.dense(grid.storage_dtype), rtol=0, atol=0)


# ---- rules ----------------------------------------------------------------------------------------------------------


def rule_of(grid: UniformGrid, matrix: Matrix) -> str | None:
    refusal = FORM.refuses(entry_of(grid, matrix), matrix)
    return None if refusal is None else refusal.rule


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, None),
        ({"linear": False}, "linear-only"),
        ({"transposed": True, "linear": False}, "linear-only"),
        ({"expert": 3, "linear": False}, "linear-only"),
        ({"sources": ("a.weight", "b.weight")}, "linear-only"),
        ({"tied_to": "model.embed_tokens.weight"}, "tied"),
    ],
)
def test_kinds_of_matrices(changes: dict[str, object], rule: str | None):
    assert rule_of(UNIFORM, matrix_of((8, 64), **changes)) == rule


@pytest.mark.parametrize(
    ("width", "group_size", "nearest"),
    [(172, 32, 172 // 4), (576, 128, 64), (64, 128, 64), (96, 128, 32), (97, 32, None), (100, 64, 50)],
)
def test_ragged_groups_are_refused_with_a_grid_that_fits(width: int, group_size: int, nearest: int | None):
    grid, matrix = replace(UNIFORM, group_size=group_size, bits=3), matrix_of((8, width))
    refusal = FORM.refuses(entry_of(grid, matrix), matrix)
    assert refusal is not None
    assert refusal.rule == "ragged-group"
    assert f"{group_size} does not divide the width {width}" in str(refusal)
    if nearest is not None and nearest <= group_size:
        assert refusal.nearest == replace(grid, group_size=nearest)
    assert isinstance(refusal.nearest, UniformGrid)
    assert rule_of(refusal.nearest, matrix) is None


def test_per_channel_has_no_ragged_group():
    assert rule_of(replace(UNIFORM, group_size=None), matrix_of((8, 97))) is None


def test_one_scale_for_a_matrix_is_refused_with_a_grid_that_fits():
    grid, matrix = replace(UNIFORM, scale_per="matrix"), matrix_of((8, 64))
    refusal = FORM.refuses(entry_of(grid, matrix), matrix)
    assert refusal is not None
    assert refusal.rule == "matrix-scale"
    assert refusal.nearest == replace(grid, scale_per="row")
    assert rule_of(refusal.nearest, matrix) is None


def test_only_uniform_grids():
    matrix = matrix_of((8, 64))
    refusal = FORM.refuses(replace(entry_of(UNIFORM, matrix), grid=ToyVectorGrid()), matrix)
    assert refusal is not None
    assert refusal.rule == "uniform-only"
    assert isinstance(refusal.nearest, UniformGrid)


@pytest.mark.parametrize(
    ("scale_dtype", "checkpoint", "accepted"),
    [
        ("bfloat16", torch.bfloat16, True),
        ("auto", torch.bfloat16, True),
        ("auto", torch.float16, True),
        ("float16", torch.float32, True),
        ("bfloat16", torch.float32, True),
        ("float16", torch.bfloat16, False),
        ("float32", torch.bfloat16, False),
        ("bfloat16", torch.float16, False),
    ],
)
def test_dtype_of_scales(scale_dtype: str, checkpoint: torch.dtype, accepted: bool):
    grid = replace(UNIFORM, scale_dtype=scale_dtype)
    if accepted:
        assert (
            FORM.specs(matrix_of((8, 64)), grid, checkpoint)[1].dtype == grid.resolve((8, 64), checkpoint).storage_dtype
        )
        return
    with pytest.raises(FormatError, match=r"grid.scale_dtype=auto.*\[scale-dtype\]"):
        FORM.specs(matrix_of((8, 64)), grid, checkpoint)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_the_packing_of_older_versions_is_told_apart(bits: int):
    """Whole codes in each word, the rest of it empty: what versions before 0.18 wrote and read."""
    grid = replace(UNIFORM, bits=bits, group_size=32)
    weight = nearest(torch.randn(8, 64), grid)
    tensors = dict(FORM.tensors(matrix_of((8, 64)), weight, torch.float32))
    name = next(name for name in tensors if name.endswith("weight_packed"))
    inside = 32 // bits
    code = torch.nn.functional.pad(weight.code.long(), (0, -64 % inside)).view(8, -1, inside)
    words = (code << torch.arange(0, inside * bits, bits)).sum(-1)
    tensors[name] = words.to(torch.int32)
    with pytest.raises(FormatError, match=rf"{name} has {words.shape[1]} words .* before 0\.18\. Make"):
        FORM.weight(matrix_of((8, 64)), tensors, grid)
    tensors[name] = words.to(torch.int32)[:, :2]
    with pytest.raises(FormatError, match=rf"{name} has 2 words .* of another width"):
        FORM.weight(matrix_of((8, 64)), tensors, grid)


def test_weight_of_another_shape_is_an_error():
    tensors = FORM.tensors(matrix_of((8, 64)), nearest(torch.randn(8, 64), UNIFORM), torch.float32)
    with pytest.raises(FormatError, match=r"stored with shape \(8, 64\); the model has \(8, 32\)"):
        FORM.weight(matrix_of((8, 32)), tensors, UNIFORM)


# ---- plans and configuration ----------------------------------------------------------------------------------------

MODEL = map_of(make_llama())


def config_of(grids: dict[str, UniformGrid], model: ModelMap = MODEL) -> dict[str, object]:
    config = FORM.config(plan_of(grids, model, FORM), model)
    assert json.loads(json.dumps(config)) == config
    return dict(config)


def assert_matches(config: dict[str, object], grids: dict[str, UniformGrid]) -> None:
    """compressed-tensors itself gives every module of the model the scheme of the plan, and no other module one."""
    model = make_llama()
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        grid = grids.get(name)
        assert (scheme is None) == (grid is None), name
        if grid is not None:
            found = scheme.weights
            assert (found.num_bits, found.symmetric, found.group_size) == (grid.bits, grid.symmetric, grid.group_size)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"": {"symmetric": False}},
        {"": {"group_size": None}},
        {"down_proj": {"bits": 8}},
        {"layers.1.": {"bits": 2, "group_size": 64}},
        {"layers.0.self_attn.o_proj": {"bits": 3}, "mlp.down_proj": {"bits": 5}, "layers.1.mlp": {"bits": 6}},
    ],
)
@pytest.mark.parametrize("dropped", ["nothing", "o_proj", "layers.0.", "layers.1.mlp.down_proj"])
def test_configuration_says_what_the_plan_says(changes: dict[str, dict[str, object]], dropped: str):
    grids = {name: grid for name, grid in grids_of(MODEL, changes).items() if dropped not in name}
    assert_matches(config_of(grids), grids)


def test_one_scheme_is_what_everyone_expects():
    config = config_of(grids_of(MODEL, {}))
    assert config["ignore"] == ["lm_head"]
    assert "dequantize" not in config
    assert config["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    }


def test_only_one_asymmetric_scheme_is_decoded_at_load():
    assert config_of(grids_of(MODEL, {"": {"symmetric": False}}))["dequantize"] is True
    assert "dequantize" not in config_of(grids_of(MODEL, {"down_proj": {"bits": 8}}))


def test_mixed_targets_are_short_where_that_is_exact():
    config = config_of(grids_of(MODEL, {"mlp.down_proj": {"bits": 8}, "layers.1.self_attn.o_proj": {"bits": 8}}))
    assert config["config_groups"]["group_1"]["targets"] == [
        r"re:.*\.mlp\.down_proj$",
        "model.layers.1.self_attn.o_proj",
    ]
    assert "model.layers.0.self_attn.o_proj" in config["config_groups"]["group_0"]["targets"]


def test_quantized_head_is_named_besides():
    grids = dict.fromkeys(MODEL.matrices, UNIFORM)
    config = config_of(grids)
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert config["ignore"] == []
    assert_matches(config, grids)


def test_linears_outside_the_map_are_ignored():
    plan = plan_of(grids_of(MODEL, {}), MODEL, FORM)
    config = FORM.config(plan, MODEL, further=["vision.layers.0.mlp.down_proj", "project_in"])
    assert config["ignore"] == ["lm_head", "vision.layers.0.mlp.down_proj", "project_in"]


def test_experts_routers_and_renamed_modules_are_ignored_under_every_name():
    block = "model.layers.0"
    experts = {
        f"{block}.mlp.experts.down_proj[{e}]": Matrix(
            name=f"{block}.mlp.experts.down_proj[{e}]",
            parameter=f"{block}.mlp.experts.down_proj",
            sources=(f"{block}.block_sparse_moe.experts.{e}.w2.weight",),
            shape=(64, 192),
            expert=e,
            linear=False,
            fusion="0.experts",
        )
        for e in range(2)
    }
    model = replace(
        MODEL, matrices=MODEL.matrices | experts, unmapped={f"{block}.mlp.gate.weight": "router", "x.bias": "other"}
    )
    assert config_of(grids_of(MODEL, {}), model)["ignore"] == [
        "lm_head",
        r"re:.*\.mlp\.experts(\..*)?$",
        r"re:.*\.block_sparse_moe\.experts(\..*)?$",
        r"re:.*\.mlp\.gate$",
        "x",
    ]


@given(data=st.data())
def test_compact_targets_match_exactly(data: st.DataObject):
    parts = ["mlp.up", "mlp.up.inner", "attn.q", "attn.experts"]
    known = [f"{stem}.{i}.{part}" for stem in ("model.layers", "tower") for i in range(3) for part in parts] + ["head"]
    wanted = data.draw(st.lists(st.sampled_from(known), unique=True))
    targets = compact(wanted, known)
    assert {name for name in known if any(match_name(name, target) for target in targets)} == set(wanted)


# ---- golden files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda path: path.stem)
def test_golden_files_read_and_write_the_same(path: Path):
    stored = load_file(path)
    expected = {n.removeprefix("expected."): stored.pop(n) for n in list(stored) if n.startswith("expected.")}
    settings = json.loads(path.with_suffix(".json").read_text())
    grid = UniformGrid(**settings["grid"])
    matrix = matrix_of(tuple(settings["shape"]))
    weight = FORM.weight(matrix, stored, grid)
    torch.testing.assert_close(weight.code, expected["code"], rtol=0, atol=0)
    torch.testing.assert_close(weight.dense(), expected["value"], rtol=0, atol=0)
    torch.testing.assert_close(FORM.tensors(matrix, weight, grid.storage_dtype), stored, rtol=0, atol=0)


def test_golden_files_are_there():
    assert len(list(GOLDEN.glob("*.safetensors"))) == 4
