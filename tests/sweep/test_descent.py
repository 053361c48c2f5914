"""Coordinate descent over submodules: the whole way from a recipe to weights, on several architectures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mezzotint
from mezzotint.blockwise import batches
from mezzotint.errors import ConfigError
from mezzotint.recipes.recipe import Rule, load_recipe
from mezzotint.submodules import lpcd
from mezzotint.submodules.lpcd import Lpcd
from mezzotint.sweep import sweep
from mezzotint.sweep.descent import Descent
from runs import HELD_OUT, TEXT, TINY_LLAMA, assert_same_tensors, least_memory, plan_of, quantized, tensors_of
from zoo.models import make

Folder = Callable[[str], Path]
# fused and separate, norms of queries and keys, capped scores, sliding windows, parallel blocks, post-norms, Conv1D
QUICK, SLOW = ["qwen3", "phi3"], ["tiny_llama", "gemma2", "gemma3", "gpt_neox", "gpt2", "olmo2"]
MODELS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


EVERY = {"submodules.parts": ["qk", "vo", "updown"]}
PLAIN = {"target.norm_aware": "no"}  # losses are those of the stream itself, as the report's block errors are


def descended(model: Path, out: Path, recipe: str = "lpcd-gptq", **options: Any) -> dict[str, Any]:
    """Quantized with every part, unless the settings say otherwise."""
    return quantized(model, out, recipe, **{**options, "settings": {**EVERY, **options.get("settings", {})}})


@pytest.mark.parametrize("name", MODELS)
def test_every_part_runs_and_never_raises_its_loss(name: str, tiny_folder: Folder, tmp_path: Path) -> None:
    model = TINY_LLAMA if name == "tiny_llama" else tiny_folder(name)
    report = descended(model, tmp_path / "out", "lpcd-gptq", bits=3, samples=8, engine="dense")
    for block in report["blocks"]:
        assert set(block["submodules"]) == {"qk", "vo", "updown"}
        for losses in block["submodules"].values():
            assert 0 < losses["after"] <= losses["before"]
    told = [key for made in report["decisions"].values() for key in made if key.startswith("submodules.")]
    assert {key.rpartition(".")[2] for key in told} == {"q", "k", "v", "o", "up", "down"}
    assert len(told) == 6 * len(report["blocks"])
    changed = [
        value
        for made in report["decisions"].values()
        for key, value in made.items()
        if key.startswith("submodules.") and value.startswith("accepted")
    ]
    assert changed


def test_a_refused_step_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every step refused the result is that of the same recipe without submodules, bit for bit."""
    monkeypatch.setattr(Descent, "_helps", staticmethod(lambda *_: False))
    # of down projections the recipe without submodules would sum W D, where that with them sums D: not the same bits
    monkeypatch.setattr(sweep, "drifts_by_output", lambda *_, **__: False)
    options: dict[str, Any] = {"bits": 3, "samples": 12, "engine": "dense"}
    report = descended(TINY_LLAMA, tmp_path / "refused", "lpcd-gptq", **options)
    through = {"target.norm_aware": "original"}
    quantized(TINY_LLAMA, tmp_path / "without", "loaq-gptq", settings=through, **options)
    assert_same_tensors(tmp_path / "refused", tmp_path / "without")
    for block in report["blocks"]:
        for losses in block["submodules"].values():
            assert losses["after"] == losses["before"]


def test_the_block_error_is_that_of_what_was_written(tmp_path: Path) -> None:
    """Evaluated again from the folder, the losses of the last part of the last block are those that were reported."""
    report = descended(
        TINY_LLAMA, tmp_path / "out", "lpcd-gptq", bits=3, samples=12, engine="dense",
        settings={**PLAIN, "submodules.parts": ["updown"]},
    )  # fmt: skip
    for block in report["blocks"]:
        # without post-norms the stream after the MLP is the block's output
        assert block["submodules"]["updown"]["after"] == pytest.approx(block["relative_error"], rel=1e-4)


@pytest.mark.parametrize("name", ["opt", "falcon_multi_query", "falcon_new_decoder"])
def test_mlps_without_a_gate_are_served(name: str, tiny_folder: Folder, tmp_path: Path) -> None:
    """Biases, rectifiers, linears that lie in the block itself, blocks whose branches run side by side."""
    # of random weights nothing but the error of coarse attention can be made up for
    coarse = Rule(match="*attn*" if name == "opt" else "*attention*", set={"grid.bits": 2})
    report = quantized(
        tiny_folder(name), tmp_path / "out", load_recipe("lpcd-gptq").with_rules([coarse]), bits=8, samples=64,
        engine="dense", settings={**PLAIN, "submodules.parts": ["updown"]},
    )  # fmt: skip
    for block in report["blocks"]:
        losses = block["submodules"]["updown"]
        assert losses["after"] < losses["before"]
        assert losses["after"] == pytest.approx(block["relative_error"], rel=1e-4)
    told = [value for made in report["decisions"].values() for key, value in made.items() if key.endswith("updown.up")]
    assert all(decision.startswith("accepted") for decision in told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "base", "share"),
    [("lpcd-rtn", "qep-rtn", 0.97), ("lpcd-gptq", "qep-gptq", 0.97), ("best", "default", 1.0)],
)
def test_it_lowers_the_divergence(recipe: str, base: str, share: float, tmp_path: Path) -> None:
    """Against less with the same grid and rounding, on text that nothing was chosen on."""
    options: dict[str, Any] = {"bits": 2, "samples": 48, "seqlen": 64, "engine": "dense"}
    found = {}
    for name in (recipe, base):
        quantized(TINY_LLAMA, tmp_path / name, name, **options)
        found[name] = mezzotint.evaluate(tmp_path / name, HELD_OUT, against=TINY_LLAMA, seqlen=64, windows=48).kl_nats
    assert found[recipe] < share * found[base]


@pytest.mark.parametrize("name", ["phi3", pytest.param("tiny_llama", marks=pytest.mark.slow)])
def test_little_memory_gives_the_same(
    name: str, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams that are spilled and blocks that start anew change no bit."""
    model = TINY_LLAMA if name == "tiny_llama" else tiny_folder(name)
    options: dict[str, Any] = {"bits": 3, "samples": 8, "engine": "dense"}
    monkeypatch.setattr(batches, "BATCH_TOKENS", 64)  # so that one batch is less than all
    descended(model, tmp_path / "free", "lpcd-gptq", **options)
    least = least_memory(model, "lpcd-gptq", settings=EVERY, **options)
    assert not plan_of(model, "lpcd-gptq", settings=EVERY, **options, memory=least).costs.keep_runs
    descended(model, tmp_path / "tight", "lpcd-gptq", **options, memory=least)
    assert_same_tensors(tmp_path / "free", tmp_path / "tight")


def test_rows_of_other_roles_stay(tiny_folder: Folder, tmp_path: Path) -> None:
    """Of a fused matrix only the rows of the part that is optimised change, and nothing after it in the first block."""
    options: dict[str, Any] = {"bits": 3, "samples": 12, "engine": "dense"}
    model = tiny_folder("phi3")
    descended(model, tmp_path / "with", "lpcd-gptq", **options, settings={"submodules.parts": ["qk"]})
    quantized(model, tmp_path / "without", "loaq-gptq", **options)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    changed = tensors_of(tmp_path / "with")[name] != tensors_of(tmp_path / "without")[name]
    assert changed[:96].any()  # 4 query heads and 2 key heads of 16
    assert not changed[96:].any()


@pytest.mark.slow
def test_more_sweeps_and_other_settings_reach_the_descent(tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 3, "samples": 8, "engine": "dense"}
    results = {}
    for name, settings in {
        "once": {},
        "twice": {"submodules.sweeps": 2},
        "nothing": {"submodules.strength": 0.0},
        "plain": {"submodules.metric": "plain"},
        "few": {"submodules.tokens": 0.5, "submodules.mlp_tokens": 0.5, "submodules.iterations": 1},
    }.items():
        descended(TINY_LLAMA, tmp_path / name, "lpcd-gptq", **options, settings=settings)
        results[name] = tensors_of(tmp_path / name)
    for name, tensors in results.items():
        if name != "once":
            assert any(not torch.equal(tensors[key], value) for key, value in results["once"].items()), name


def test_members_that_are_kept_leave_their_part_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And fewer tokens than there are leave windows to judge by, which lie behind all that are fitted on."""
    seen: list[set[bool]] = []
    choose = Descent._chosen

    def spy(self: Descent, part: Any) -> dict[int, int]:
        found = choose(self, part)
        seen.append({self._streams.batches[index].held_out for index in found})
        return found

    monkeypatch.setattr(Descent, "_chosen", spy)
    monkeypatch.setattr(lpcd, "_LEAST_TOKENS", dict.fromkeys(lpcd._LEAST_TOKENS, 1))
    report = descended(
        TINY_LLAMA, tmp_path / "out", "lpcd-gptq", bits=3, samples=8, engine="dense", keep=["*.0.*k_proj", "*.1.*"],
        settings={"submodules.tokens": 0.25, "submodules.mlp_tokens": 0.25},
    )  # fmt: skip
    assert [set(block["submodules"]) for block in report["blocks"][:2]] == [{"vo", "updown"}, set()]
    assert seen
    assert all(kinds == {False, True} for kinds in seen)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"submodules.parts": ["qk", "vq"]}, "setting 'submodules.parts' cannot be 'vq'"),
    ("llama", {"submodules.parts": []}, "name each of qk, vo, updown at most once"),
    ("llama", {"submodules.strength": 1.5}, "submodules.strength is 1.5; it must be from 0 to 1"),
    ("llama", {"rounding.kind": "qronos", "target.kind": "weight"}, "would be corrected twice"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
def test_refusals_before_any_work(
    name: str, settings: dict[str, Any], message: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        descended(tiny_folder(name), tmp_path / "out", "lpcd-gptq", bits=3, settings=settings)
    assert not list(tmp_path.iterdir())


LACKING = [
    ("mixtral", {"updown"}, "several matrices have the role 'up' (experts)"),
    ("falcon_new", {"qk", "vo"}, "its attention is not called through transformers' interface"),
    ("bloom", {"qk", "vo"}, "its attention is not called through transformers' interface"),
    ("bloom", {"updown"}, "gelu_impl (BloomGelu) is written for plain gradients only"),
    ("mamba", {"qk", "vo", "updown"}, "no matrix is known to have the role"),
    ("doge", {"qk", "vo"}, "attention has a mask of shape (1, 4, 4, 4)"),
    ("gemma3n_text", {"qk"}, "another matrix reads the same inputs before attention does"),
]


@pytest.mark.parametrize(("name", "lacking", "why"), LACKING)
def test_parts_that_a_block_lacks_are_left_out(name: str, lacking: set[str], why: str, tmp_path: Path) -> None:
    """The plan names them, with why, and every entry of the block has the others."""
    folder = make(name, tmp_path / name)
    planned = mezzotint.plan(folder, "lpcd-gptq", engine="dense", calibration=TEXT)
    told = {step.what.removeprefix("submodules without ") for step in planned.steps_down if why in step.why}
    assert told == lacking
    left = {"qk", "vo", "updown"} - {
        step.what.removeprefix("submodules without ") for step in planned.plan.entries[0].steps_down
    }
    parts = planned.plan.entries[0].submodules
    assert (set(parts.parts) if isinstance(parts, Lpcd) else set()) == left


def test_rules_may_not_change_submodules(tmp_path: Path) -> None:
    recipe = mezzotint.Recipe(
        target={"kind": "qep"},
        submodules={"kind": "lpcd"},
        rules=({"match": "*.0.*", "set": {"submodules.strength": 0.1}},),
    )
    with pytest.raises(ConfigError, match="a rule changes 'submodules'"):
        quantized(TINY_LLAMA, tmp_path / "out", recipe, bits=3)


@pytest.mark.slow
def test_experts_are_served_by_the_parts_they_have(tiny_folder: Folder, tmp_path: Path) -> None:
    for name in ("mixtral", "gpt_oss"):
        report = descended(
            tiny_folder(name), tmp_path / name, "lpcd-gptq", bits=3, samples=12, engine="dense",
            settings={"submodules.parts": ["qk", "vo"]},
        )  # fmt: skip
        assert all(set(block["submodules"]) == {"qk", "vo"} for block in report["blocks"])
