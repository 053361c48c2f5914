"""What is decided before any weight is read: entries, reasons, format, sizes, calibration, fingerprint."""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mezzotint import Recipe
from mezzotint.calibration import auto_samples
from mezzotint.errors import ConfigError, FormatError
from mezzotint.recipes.recipe import Rule
from mezzotint.testing.models import TINY
from runs import TEXT, TINY_LLAMA, opened, plan_of, quantized, tensors_of

Folder = Callable[[str], Path]
EVERYTHING = Recipe(rules=(Rule(match="*", keep=False),))


def with_rules(*rules: dict[str, Any], **stages: Any) -> Recipe:
    return Recipe(**stages, rules=tuple(Rule(**rule) for rule in rules))


@pytest.mark.parametrize("name", list(TINY))
def test_every_matrix_is_planned_or_kept_with_a_reason(name: str, tiny_folder: Folder) -> None:
    source = opened(tiny_folder(name))
    planned = plan_of(tiny_folder(name))
    entries = [entry.matrix for entry in planned.plan.entries]
    assert len(set(entries)) == len(entries)
    assert set(entries) | planned.plan.kept.keys() == source.map.matrices.keys() | source.map.unmapped.keys()
    assert set(entries).isdisjoint(planned.plan.kept)
    assert all(planned.plan.kept.values())
    order = [matrix for block in source.map.blocks for group in block.groups for matrix in group.matrices]
    assert entries == [name for name in order if name in set(entries)]
    for entry in planned.plan.entries:
        assert planned.shapes[entry.matrix] == source.map.matrices[entry.matrix].shape
        assert entry.block is not None
        assert fnmatchcase(entry.matrix, f"{source.map.blocks[entry.block].path}.*")


def test_reasons(tiny_folder: Folder) -> None:
    embedding = {"model.embed_tokens": "token embedding: kept unless embeddings.kind gives it a grid"}
    assert plan_of(TINY_LLAMA).plan.kept == {
        "lm_head": "output head: kept unless a rule {match: ..., keep: false} asks for it",
        **embedding,
    }
    assert plan_of(tiny_folder("qwen2"), EVERYTHING).plan.kept == {
        "lm_head": "shares storage with model.embed_tokens.weight",
        **embedding,
    }
    kept = plan_of(TINY_LLAMA, keep=["*.0.*", "*.o_proj"]).plan.kept
    assert kept.pop("lm_head").startswith("output head")
    assert kept.pop("model.embed_tokens").startswith("token embedding")
    assert set(kept.values()) == {"kept by a rule"}
    assert len(kept) == 7 + 2
    routers = {n: why for n, why in plan_of(tiny_folder("mixtral")).plan.kept.items() if "gate" in n}
    assert len(routers) == 2
    assert all("router" in why for why in routers.values())


def test_because_names_the_rule() -> None:
    recipe = with_rules({"match": "*.2.mlp.*", "set": {"grid.symmetric": True}}, grid={"kind": "uniform"})
    because = {e.matrix: e.because for e in plan_of(TINY_LLAMA, recipe, engine="dense").plan.entries}
    assert because.pop("model.layers.2.mlp.up_proj") == "rule '*.2.mlp.*'"
    assert because["model.layers.1.mlp.up_proj"] == "recipe 'custom'"


@pytest.mark.parametrize(("name", "size"), [("tiny_llama", 128), ("llama", 32), ("gpt_neox", 64)])
def test_auto_group_size_is_one_for_all(name: str, size: int, tiny_folder: Folder) -> None:
    planned = plan_of(TINY_LLAMA if name == "tiny_llama" else tiny_folder(name))
    widths = {shape[1] for shape in planned.shapes.values()}
    assert {entry.grid.group_size for entry in planned.plan.entries} == {size}
    assert all(width % size == 0 for width in widths)
    assert size == 128 or any(width % (2 * size) for width in widths)


def test_auto_group_size_looks_at_what_is_quantized_only(tiny_folder: Folder) -> None:
    planned = plan_of(tiny_folder("llama"), keep=["*.down_proj"])  # the only width that 64 does not divide
    assert {entry.grid.group_size for entry in planned.plan.entries} == {64}


def test_packed_formats_refuse_ragged_groups(tiny_folder: Folder) -> None:
    settings = {"grid.group_size": 64}
    with pytest.raises(
        FormatError, match=r"grid.group_size of .*0.mlp.down_proj: 64 does not divide the width 96.* 32"
    ):
        plan_of(tiny_folder("llama"), settings=settings)
    ragged = plan_of(tiny_folder("llama"), settings=settings, engine="dense")
    bits = next(e.bits for e in ragged.plan.entries if e.matrix.endswith("down_proj"))
    assert bits == (64 * 96 * 4, 64 * 2 * (16 + 4) + 64)  # two groups a row, a bf16 scale and a zero point each


def test_fused_matrices_share_a_scheme() -> None:
    for rule in ({"match": "*.k_proj", "set": {"grid.bits": 8}}, {"match": "*.k_proj", "keep": True}):
        recipe = with_rules(rule, grid={"kind": "uniform", "symmetric": True})
        with pytest.raises(FormatError, match=r"0.qkv.*q_proj.*4 bits.*k_proj.*\[fused-scheme\]"):
            plan_of(TINY_LLAMA, recipe)
        assert plan_of(TINY_LLAMA, recipe, engine="dense").plan.format == "dense"


def test_mixed_files_are_symmetric_for_transformers() -> None:
    rule = {"match": "*.mlp.*", "set": {"grid.bits": 8}}
    mixed = with_rules(rule, grid={"kind": "uniform"})
    asked = with_rules(rule, grid={"kind": "uniform", "symmetric": False})
    for engine in (None, "transformers"):
        planned = plan_of(TINY_LLAMA, mixed, engine=engine)
        assert planned.plan.format == "compressed-tensors"
        assert all(entry.grid.symmetric for entry in planned.plan.entries)
        ((step, names),) = planned.steps_down.items()
        assert step.what == "grid.symmetric=true"
        assert "zero points only where one scheme serves all" in step.why
        assert len(names) == len(planned.plan.entries)
        with pytest.raises(FormatError, match=r"transformers.*symmetric=true.*\[mixed-asymmetric\]"):
            plan_of(TINY_LLAMA, asked, engine=engine)
    symmetric = with_rules(rule, grid={"kind": "uniform", "symmetric": True})
    assert not plan_of(TINY_LLAMA, symmetric).steps_down


def test_the_format_follows_the_modules(tiny_folder: Folder) -> None:
    for name in ("gpt2", "mixtral", "gpt_oss"):
        assert plan_of(tiny_folder(name)).plan.format == "dense"
        with pytest.raises(FormatError, match=r"nn.Linear only.*Use --for dense"):
            plan_of(tiny_folder(name), engine="vllm")
    with pytest.raises(FormatError, match="dense-experts"):
        plan_of(tiny_folder("mixtral"), keep=["*.experts.*"])
    assert plan_of(tiny_folder("mixtral"), keep=["*.experts.*"], engine="vllm").plan.format == "compressed-tensors"
    assert plan_of(TINY_LLAMA, engine="dense").plan.format == "dense"


@pytest.mark.parametrize(
    ("settings", "because"),
    [
        ({"grid.kind": "trellis"}, "q_proj has the grid 'trellis', which only"),
        ({"grid.kind": "lookup"}, "q_proj has the grid 'lookup', which only"),
        ({"transform.kind": "hadamard"}, "q_proj has the grid 'uniform' in the basis 'hadamard', which only"),
    ],
)
def test_what_stock_engines_do_not_know_is_stored_in_our_own_format(settings: dict[str, Any], because: str) -> None:
    planned = plan_of(TINY_LLAMA, settings=settings)
    assert planned.plan.format == "mezzotint"
    assert because in planned.because
    assert plan_of(TINY_LLAMA, settings=settings, engine="dense").plan.format == "dense"
    with pytest.raises(FormatError, match=r"--for vllm.*Use .*, or --for dense"):
        plan_of(TINY_LLAMA, settings=settings, engine="vllm")


def test_our_own_format_holds_uniform_grids_too(tiny_folder: Folder) -> None:
    planned = plan_of(tiny_folder("llama"), engine="mezzotint", settings={"grid.group_size": 64})
    assert (planned.plan.format, planned.because) == ("mezzotint", "--for mezzotint")
    with pytest.raises(FormatError, match=r"nn.Linear and nn.Embedding only.*Use --for dense"):
        plan_of(tiny_folder("gpt2"), engine="mezzotint")
    assert plan_of(tiny_folder("gpt2"), settings={"grid.kind": "lookup"}).plan.format == "dense"


@pytest.mark.parametrize("rounding", ["gptaq", "qronos"])
def test_corrections_are_not_counted_twice(rounding: str) -> None:
    with pytest.raises(ConfigError, match=r"corrected twice. Use target.kind=weight"):
        plan_of(TINY_LLAMA, settings={"rounding.kind": rounding, "target.kind": "qep"})
    plan_of(TINY_LLAMA, settings={"rounding.kind": rounding})
    # what corrects nothing may stand beside it
    plan_of(TINY_LLAMA, settings={"rounding.kind": rounding, "target.kind": "qep", "target.alpha": 0})


@pytest.mark.parametrize("rounding", ["gptaq", "qronos"])
def test_corrections_are_not_taken_back(rounding: str) -> None:
    with pytest.raises(ConfigError, match=rf"undo the drift correction of rounding '{rounding}'.*refinement.kind=none"):
        plan_of(TINY_LLAMA, settings={"rounding.kind": rounding, "refinement.kind": "descent"})


def test_nothing_left() -> None:
    with pytest.raises(ConfigError, match="nothing to quantize: all 23 matrices are kept"):
        plan_of(TINY_LLAMA, keep=["*"])


def test_unmatched_patterns() -> None:
    with pytest.raises(ConfigError, match=r"pattern '\*.mpl.\*' matches none of the 23 matrices"):
        plan_of(TINY_LLAMA, keep=["*.mpl.*"])


def file_bytes(folder: Path) -> int:
    """Of all tensors: files without their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        total += path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    return total


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny_llama", {"bits": 3}),
        ("tiny_llama", {"bits": 2, "settings": {"grid.group_size": None}}),
        ("tiny_llama", {"bits": 5, "settings": {"grid.symmetric": True, "grid.group_size": 32}}),
        ("tiny_llama", {"keep": ["*.0.*"], "settings": {"grid.range": "minmax"}}),
        ("qwen2", {}),
        ("phi3", {"bits": 7}),
        ("mixtral", {}),
        ("gpt2", {}),
    ],
)
def test_sizes_are_those_of_the_files(name: str, options: dict[str, Any], tiny_folder: Folder, tmp_path: Path) -> None:
    model = TINY_LLAMA if name == "tiny_llama" else tiny_folder(name)
    planned = plan_of(model, "rtn", **{**options, "bits": float(options.get("bits", 4))})
    report = quantized(model, tmp_path / "out", "rtn", **options)
    assert file_bytes(tmp_path / "out") == planned.plan.bytes == report["output_bytes"]
    if planned.form.name == "dense":
        return
    tensors = tensors_of(tmp_path / "out")
    stored = {
        part: [t for n, t in tensors.items() if n.endswith(part)] for part in ("_packed", "_scale", "_point", "_shape")
    }
    codes = sum(t.nbytes for t in stored["_packed"]) * 8
    side = sum(t.nbytes for t in stored["_scale"] + stored["_point"] + stored["_shape"]) * 8
    # every width and height here is a multiple of 32 codes, so that nothing is padded
    assert planned.bits_per_weight_without_side_data == codes / planned.weights
    assert planned.bits_per_weight == (codes + side) / planned.weights == report["bits_per_weight"]
    assert planned.weights == sum(shape[0] * shape[1] for shape in planned.shapes.values())


@pytest.mark.parametrize(("name", "kind"), [("llama", "trellis"), ("qwen2", "uniform"), ("gemma2", "vector")])
def test_the_embedding_has_a_grid_of_its_own(name: str, kind: str, tiny_folder: Folder, tmp_path: Path) -> None:
    settings = {"embeddings.kind": kind, "embeddings.bits": 4}
    planned = plan_of(tiny_folder(name), "gptq", settings=settings)
    first = planned.plan.entries[0]
    assert (first.matrix, first.block, first.grid.kind) == ("model.embed_tokens", None, kind)
    assert first.needs == frozenset()  # whatever the recipe asks for elsewhere
    assert planned.plan.format == "mezzotint"
    quantized(tiny_folder(name), tmp_path / "out", "gptq", settings=settings)
    assert file_bytes(tmp_path / "out") == planned.plan.bytes
    sizes: dict[str, int] = {}
    for tensor, value in tensors_of(tmp_path / "out").items():
        module, _, part = tensor.rpartition(".")
        sizes[module] = sizes.get(module, 0) + 8 * value.nbytes * (part != "bias")
    entries = planned.plan.entries
    assert {e.matrix: e.bits.total for e in entries} == {e.matrix: sizes[e.matrix] for e in entries}
    kept = plan_of(tiny_folder(name), "gptq", settings=settings, keep=["*embed_tokens"]).plan
    assert kept.kept["model.embed_tokens"] == "kept by a rule"


def test_who_cannot_hold_a_packed_embedding(tiny_folder: Folder) -> None:
    settings = {"embeddings.kind": "uniform"}
    with pytest.raises(FormatError, match=r"model.embed_tokens is another kind of module. Use --for dense, keep it"):
        plan_of(tiny_folder("llama"), "rtn", settings=settings, engine="vllm")
    with pytest.raises(ConfigError, match=r"embeddings.bits' has no effect, because embeddings.kind is none"):
        plan_of(tiny_folder("llama"), "rtn", settings={"embeddings.bits": 3})
    assert plan_of(tiny_folder("llama"), "rtn", settings=settings, engine="dense").plan.format == "dense"


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("a plan reads headers only")

    monkeypatch.setattr("mezzotint.models.checkpoint._fill", read)
    assert plan_of(TINY_LLAMA, calibration=tmp_path / "not-looked-at.txt").plan.entries


def test_calibration_sizes() -> None:
    assert plan_of(TINY_LLAMA, "rtn").calibration is None
    chosen = plan_of(TINY_LLAMA, calibration="self", samples=None, seqlen=None).calibration
    assert chosen is not None
    assert (chosen.samples, chosen.seqlen, chosen.tokens) == (16, 256, 4096)
    text = plan_of(TINY_LLAMA, samples=None, seqlen=None).calibration
    assert text is not None
    assert text.seqlen == 512
    with pytest.raises(ConfigError, match="--seqlen is 513, but the model takes at most 512 positions"):
        plan_of(TINY_LLAMA, seqlen=513)


@pytest.mark.parametrize(
    ("recipe", "calibration", "tokens"),
    [("gptq", TEXT, 4), ("qep-gptq", TEXT, 16), ("default", TEXT, 16), ("default", "self", 4)],
)
def test_corrections_get_more_text(recipe: str, calibration: str | Path, tokens: int) -> None:
    """They fit what they should not where there is little; what is sampled first costs too much for more."""
    found = plan_of(TINY_LLAMA, recipe, calibration=calibration, samples=None, seqlen=32)
    widest = max(columns for _, columns in found.shapes.values())
    assert found.calibration is not None
    assert found.calibration.samples == auto_samples(widest, 32, tokens)
    assert 16 < auto_samples(widest, 32, tokens) < 512


def fingerprint(model: Path = TINY_LLAMA, recipe: Any = "gptq", **options: Any) -> str:
    return plan_of(model, recipe, **options).plan.fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3.0},
        {"settings": {"grid.group_size": 64}},
        {"settings": {"rounding.damping": 0.02}},
        {"settings": {"target.kind": "qep"}},
        {"keep": ["*.0.*"]},
        {"engine": "dense"},
        {"engine": "vllm"},
        {"samples": 9},
        {"seqlen": 33},
        {"calibration": "self"},
        {"packing": False},
        {"lines": True},
        {"seed": 1},
    ],
)
def test_fingerprint_changes_with_the_result(options: dict[str, Any]) -> None:
    assert fingerprint(**options) != fingerprint()


def test_fingerprint_changes_with_the_model(tmp_path: Path) -> None:
    other = shutil.copytree(TINY_LLAMA, tmp_path / "other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}), encoding="utf-8")
    assert fingerprint(other) != fingerprint()
    wide = shutil.copytree(TINY_LLAMA, tmp_path / "wide")
    tensors = {name: value.to(torch.float16) for name, value in tensors_of(TINY_LLAMA).items()}
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(wide) != fingerprint()


def test_fingerprint_stays_where_the_result_does(tmp_path: Path) -> None:
    same = fingerprint()
    assert fingerprint() == same
    assert fingerprint(shutil.copytree(TINY_LLAMA, tmp_path / "moved")) == same
    assert fingerprint(memory=2**34) == same
    assert fingerprint(recipe=Recipe(name="mine", summary="told otherwise", grid={"kind": "uniform"})) == same
    assert fingerprint(settings={"grid.group_size": 128, "grid.bits": 4}) == same
    assert fingerprint(recipe="rtn", samples=9, seed=3) == fingerprint(recipe="rtn")
    assert fingerprint(samples=16, seqlen=512) == fingerprint(samples=16, seqlen=None)
