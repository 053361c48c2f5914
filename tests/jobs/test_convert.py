"""``mezzotint convert``: the same codes and scales in another format, or a refusal that says why not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mezzotint
from mezzotint.blockwise.source import open_packed
from mezzotint.cli.app import app
from mezzotint.errors import ConfigError, FormatError, OutputError
from mezzotint.recipes.recipe import Rule, load_recipe
from mezzotint.storage.folder import OutputFolder
from runs import HELD_OUT, TINY_LLAMA, assert_same_tensors, quantized, tensors_of

UNIFORM = {"grid.bits": 4, "grid.group_size": 64, "rounding.kind": "nearest", "grid.range": "minmax"}


def made(kind: str, folder: Path, settings: dict[str, Any] | None = None, recipe: str = "rtn") -> Path:
    quantized(TINY_LLAMA, folder, recipe, format=kind, settings=UNIFORM if settings is None else settings)
    return folder


def assert_same_codes(actual: Path, expected: Path) -> None:
    """Every packed weight of both has the same codes and parameters, and all other tensors the same bytes."""
    (first, found), (second, wanted) = open_packed(actual), open_packed(expected)
    assert found.keys() == wanted.keys()
    for name, packed in found.items():
        ours, theirs = packed.weight(), wanted[name].weight()
        torch.testing.assert_close(ours.code, theirs.code, rtol=0, atol=0)
        torch.testing.assert_close(dict(ours.grid.parameters), dict(theirs.grid.parameters), rtol=0, atol=0)
    parts = {part for packed in (*found.values(), *wanted.values()) for part in packed.parts}
    mine, other = tensors_of(first.folder), tensors_of(second.folder)
    assert mine.keys() - parts == other.keys() - parts
    for name in mine.keys() - parts:
        torch.testing.assert_close(mine[name], other[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "route"),
    [
        ({"grid.symmetric": True, "grid.bits": 3}, ["compressed-tensors", "gptq", "gptq-v2", "compressed-tensors"]),
        ({"grid.group_size": None, "grid.bits": 8}, ["gptq-v2", "compressed-tensors"]),
        ({"grid.bits": 5}, ["compressed-tensors"]),
    ],
)
def test_there_and_back_again(settings: dict[str, Any], route: list[str], tmp_path: Path) -> None:
    start = folder = made("mezzotint", tmp_path / "start", {**UNIFORM, **settings})
    for place, form in enumerate([*route, "mezzotint"]):
        result = mezzotint.convert(folder, form, out=tmp_path / f"{place}-{form}")
        folder = Path(result["out"])
        assert result["format"] == json.loads((folder / "mezzotint.json").read_text())["plan"]["format"] == form
        assert_same_codes(folder, start)
    assert_same_tensors(folder, start)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_converting_is_as_quantizing_for_that_format(form: str, tmp_path: Path) -> None:
    settings = {**UNIFORM, "grid.symmetric": True}
    start, direct = made("mezzotint", tmp_path / "start", settings), made(form, tmp_path / "direct", settings)
    mezzotint.convert(start, form, out=tmp_path / "out")
    assert_same_tensors(tmp_path / "out", direct)
    config, expected = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", direct))
    assert config == expected
    report, expected = (json.loads((f / "mezzotint.json").read_text()) for f in (tmp_path / "out", direct))
    for name in ("bits_per_weight", "output_bytes"):
        assert report[name] == expected[name]
    assert report["command"].endswith(f"mezzotint convert start --out out --format {form}")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in direct.iterdir()}


@pytest.mark.parametrize(
    "settings", [UNIFORM, {"transform.kind": "hadamard", "grid.kind": "trellis", "grid.bits": 2.5}]
)
def test_everything_becomes_dense(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"rounding.kind": "nearest", **settings}
    start = made("mezzotint", tmp_path / "start", settings)
    direct = made("dense", tmp_path / "direct", settings)
    mezzotint.convert(start, "dense", out=tmp_path / "out")
    assert_same_tensors(tmp_path / "out", direct)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.slow
def test_blocks_become_a_gguf_file_and_that_becomes_dense(tmp_path: Path) -> None:
    settings = {"grid.kind": "gguf", "grid.type": "Q4_K", "grid.range": "error"}
    start, direct = made("mezzotint", tmp_path / "start", settings), made("gguf", tmp_path / "direct", settings)
    mezzotint.convert(start, "gguf", out=tmp_path / "out")
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (direct / "model.gguf").read_bytes()
    mezzotint.convert(tmp_path / "out", "dense", out=tmp_path / "dense")
    evaluated = [
        mezzotint.evaluate(tmp_path / name, HELD_OUT, against=TINY_LLAMA, seqlen=32, windows=4).kl_nats
        for name in ("dense", "out")
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=0.05)  # dense values are rounded to bfloat16


def test_gguf_files_become_our_own_format_and_files_again(tmp_path: Path) -> None:
    """Every type, blocks as they are; the tables become dense."""
    names = ("q", "k", "v", "o", "gate", "up", "down")
    types = dict(zip(names, ("Q2_K", "Q3_K", "Q4_1", "Q5_K", "Q6_K", "IQ4_NL", "Q5_1"), strict=True))
    rules = [Rule(match=f"*.{name}_proj", set={"grid.type": kind}) for name, kind in types.items()]
    recipe = load_recipe("rtn").with_settings({"grid.kind": "gguf", "grid.range": "error"}).with_rules(rules)
    start = tmp_path / "start"
    quantized(TINY_LLAMA, start, recipe, engine="llama.cpp", keep=["*.[12].*"])
    mezzotint.convert(start, "mezzotint", out=tmp_path / "own")
    mezzotint.convert(tmp_path / "own", "gguf", out=tmp_path / "again")
    original, own, again = (open_packed(tmp_path / name)[1] for name in ("start", "own", "again"))
    assert original.keys() == own.keys() == again.keys()
    for name, packed in original.items():
        for other in (own[name], again[name]):
            assert other.grid.type == packed.grid.type == types[name.rpartition("_proj")[0].rpartition(".")[2]]
            torch.testing.assert_close(other.weight().code, packed.weight().code, rtol=0, atol=0)
            torch.testing.assert_close(other.dense(), packed.dense(), rtol=0, atol=0)


def of_type(kind: str, folder: Path) -> Path:
    """A GGUF file with the attention of one block on a type."""
    settings = {"grid.kind": "gguf", "grid.type": kind}
    quantized(TINY_LLAMA, folder, "rtn", engine="llama.cpp", settings=settings, keep=["*.mlp.*", "*.[12].*"])
    return folder


@pytest.mark.parametrize(
    ("kind", "bits", "forms"),
    [
        ("Q4_0", 4, ("compressed-tensors", "gptq")),
        ("Q5_0", 5, ("compressed-tensors",)),
        ("Q8_0", 8, ("compressed-tensors", "gptq-v2")),
    ],
)
def test_blocks_of_integers_become_integers(kind: str, bits: int, forms: tuple[str, ...], tmp_path: Path) -> None:
    start = of_type(kind, tmp_path / "start")
    _, blocks = open_packed(start)
    for form in forms:
        mezzotint.convert(start, form, out=tmp_path / form)
        source, integers = open_packed(tmp_path / form)
        assert source.config.dtype == torch.float16
        assert integers.keys() == blocks.keys()
        for name, packed in integers.items():
            grid = packed.grid
            assert (grid.bits, grid.group_size, grid.symmetric, grid.scale_dtype) == (bits, 32, True, "float16")
            torch.testing.assert_close(packed.weight().code, blocks[name].weight().code, rtol=0, atol=0)
            torch.testing.assert_close(packed.dense(), blocks[name].dense(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Q4_1", "groups have a minimum"),
        ("Q5_K", "groups have a minimum"),
        ("Q6_K", "products of two numbers"),
        ("IQ4_NL", "numbers of a table"),
    ],
)
def test_blocks_that_are_no_integers_are_refused(kind: str, reason: str, tmp_path: Path) -> None:
    start = of_type(kind, tmp_path / "start")
    for form in ("compressed-tensors", "gptq"):
        with pytest.raises(FormatError, match=rf"{kind}; .*{reason}.*\[block-type\]"):
            mezzotint.convert(start, form, out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"start"}


@pytest.mark.parametrize(
    ("settings", "form", "options", "message"),
    [
        ({}, "gptq", {}, r"q_proj cannot be converted to gptq without loss.*\[zero-point-less-one\]"),
        ({"grid.bits": 5}, "gptq-v2", {}, r"\[gptq-bits\]"),
        ({"grid.bits": 3}, "compressed-tensors", {"engine": "vllm-cpu"}, r"\[engine-bits\]"),
        ({"grid.symmetric": True}, "gguf", {}, r"\[gguf-only\]"),
        ({"grid.kind": "lookup"}, "compressed-tensors", {}, r"\[uniform-only\]"),
        ({"transform.kind": "hadamard"}, "compressed-tensors", {}, r"\[no-transform\]"),
    ],
)
def test_what_would_lose_something_is_refused(
    settings: dict[str, Any], form: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = {"rounding.kind": "nearest"} if "grid.kind" in settings else UNIFORM
    start = made("mezzotint", tmp_path / "start", {**base, **settings})
    with pytest.raises(FormatError, match=message):
        mezzotint.convert(start, form, out=tmp_path / "out", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"start"}


def test_nothing_is_converted_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to convert"):
        mezzotint.convert(TINY_LLAMA, "gptq", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown format 'gpqt'"):
        mezzotint.convert(TINY_LLAMA, "gpqt", out=tmp_path / "out")


def test_a_failure_leaves_nothing_and_a_killed_conversion_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, out = made("mezzotint", tmp_path / "start", {**UNIFORM, "grid.symmetric": True}), tmp_path / "out"

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mezzotint.convert(start, "gptq", out=out, step=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"start"}

    partial = tmp_path / "out.partial"
    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "discard", lambda _: None)  # as if it was killed
        with pytest.raises(KeyboardInterrupt):
            mezzotint.convert(start, "gptq", out=out, step=stop)
    with pytest.raises(OutputError, match="unfinished work"):
        mezzotint.convert(start, "gptq", out=out)
    with pytest.raises(ConfigError, match=r'another request: format \(was "gptq", is "gptq-v2"\) changed'):
        mezzotint.convert(start, "gptq-v2", out=out, resume=True)
    assert (partial / "model.safetensors").is_file()
    mezzotint.convert(start, "gptq", out=out, resume=True)
    assert_same_codes(out, start)
    assert not partial.exists()


def test_a_damaged_source_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    start = made("compressed-tensors", tmp_path / "start")
    path = start / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    name = "model.layers.2.mlp.down_proj.weight_packed"
    data[8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"{name} is damaged"):
        mezzotint.convert(start, "mezzotint", out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"start"}


def test_the_command(tmp_path: Path) -> None:
    start = made("mezzotint", tmp_path / "start")
    arguments = ["convert", str(start), "--out", str(tmp_path / "out"), "--format", "compressed-tensors", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout.splitlines()[-1])
    assert (shown["from"], shown["format"], shown["matrices"]) == ("mezzotint", "compressed-tensors", 21)
    shutil.rmtree(tmp_path / "out")
    assert CliRunner().invoke(app, [*arguments[:4], "--format", "gptq"]).exit_code == 2


def test_trellis_codes_go_to_exl3_and_back(tmp_path: Path) -> None:
    start = folder = tmp_path / "start"
    fast = {"grid.bits": 2, "rounding.kind": "nearest", "grid.window": 1}
    report = quantized(
        TINY_LLAMA, start, "trellis", format="exl3", settings=fast, keep=["*.mlp.*", "*.[12].*", "*.[qo]_proj"]
    )
    assert {linear["grid"]["states"] for linear in report["plan"]["linears"]} == {16}
    for place, form in enumerate(["mezzotint", "exl3"]):
        mezzotint.convert(folder, form, out=tmp_path / f"{place}-{form}")
        folder = tmp_path / f"{place}-{form}"
        assert_same_codes(folder, start)
    assert_same_tensors(folder, start)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "exl3", "bits": 2.0, "head_bits": 16.0, "codebook": "mul1"}
    found = [mezzotint.evaluate(tmp_path / name, HELD_OUT, seqlen=32, windows=2) for name in ("start", "0-mezzotint")]
    assert found[0].perplexity == pytest.approx(found[1].perplexity, rel=1e-6)


def test_other_codes_are_not_those_of_exl3(tmp_path: Path) -> None:
    settings = {"grid.bits": 2.5, "grid.kind": "trellis", "transform.kind": "hadamard", "rounding.kind": "nearest"}
    start = made("mezzotint", tmp_path / "start", settings)
    for form, rule in (("exl3", "exl3-code"), ("gptq", "uniform-only")):
        with pytest.raises(FormatError, match=rf"\[{rule}\]"):
            mezzotint.convert(start, form, out=tmp_path / "out")
