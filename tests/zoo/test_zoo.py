"""Model types through the whole library: a dozen kinds quickly, all of them through every step slowly."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mezzotint.models.skeleton import quiet
from runs import assert_same_tensors, stock
from zoo import page, walk
from zoo.models import make, names
from zoo.tables import EXCLUDED, SETTINGS, VARIANTS

QUICK = (
    "deepseek_v3",
    "falcon_h1",
    "gemma3n_text",
    "gemma4_text",
    "gptj",
    "kimi_linear",
    "mamba2",
    "minimax_m2",
    "mixtral",
    "olmo",
    "opt_proj",
    "zamba2",
)


def assert_passes(name: str, place: Path, steps: tuple[str, ...]) -> None:
    stopped = [
        f"{one.step}: {one.status} in {one.stage}: {one.what}\n{one.frames}"
        for one in walk.walk(name, make(name, place / name), place, steps)
        if one.status != walk.OK
    ]
    assert not stopped, "\n".join(stopped)


@pytest.mark.filterwarnings("ignore")  # transformers' own, which differ from type to type
@pytest.mark.parametrize("name", QUICK)
def test_default_is_what_stock_transformers_reads(name: str, tmp_path: Path) -> None:
    assert_passes(name, tmp_path, ("default",))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", names())
def test_every_type_in_every_step(name: str, tmp_path: Path) -> None:
    """A type may refuse a step while planning; nothing may crash, or come out otherwise than meant."""
    outcomes = walk.walk(name, make(name, tmp_path / name), tmp_path / "results")
    stopped = [f"{one.step}: {one.status}: {one.what}" for one in outcomes if one.status not in (walk.OK, walk.REFUSED)]
    assert not stopped, "\n".join(stopped)


def test_every_causal_type_of_transformers_is_accounted_for() -> None:
    assert {*names()} | {*EXCLUDED} == {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS}
    assert not {*EXCLUDED} & {*SETTINGS}
    assert {*EXCLUDED} <= {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert {*QUICK} <= {*names()}


def test_models_are_the_same_at_every_call(tmp_path: Path) -> None:
    for name in ("mamba2", "deepseek_v3", "qwen3_5"):
        first, second = (make(name, tmp_path / place / name) for place in "ab")
        assert_same_tensors(first, second)


@pytest.fixture
def llama(tmp_path: Path) -> nn.Module:
    return stock(make("llama", tmp_path / "llama"))


def test_a_moved_weight_is_noticed(llama: nn.Module, tmp_path: Path) -> None:
    other = stock(tmp_path / "llama")
    logits = walk.logits_of(other)
    walk.take_weights_(llama, other)
    walk.check_logits(walk.logits_of(llama), logits)
    original = {name: value.clone() for name, value in llama.named_parameters()}
    walk.check_copied(llama, original, set())
    name = "model.layers.0.mlp.down_proj.weight"
    with torch.no_grad():
        llama.get_parameter(name)[0] *= 1.1
    with pytest.raises(walk.MismatchError, match=r"down_proj\.weight as transformers reads it is"):
        walk.take_weights_(llama, other)
    with pytest.raises(walk.MismatchError, match=r"down_proj\.weight is not quantized and has changed"):
        walk.check_copied(llama, original, set())
    with pytest.raises(walk.MismatchError, match="of their size away"):
        walk.check_logits(walk.logits_of(llama), logits)


def test_an_error_that_the_report_does_not_tell_is_noticed() -> None:
    original = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    values = original * 1.05
    walk.check_error({"name": "a", "weight_error": 0.05**2}, values, original, rounded=False)
    walk.check_error({"name": "a", "weight_error": 0.05**2}, values.to(torch.bfloat16).float(), original, rounded=True)
    with pytest.raises(walk.MismatchError, match=r"a has the error 0.05, and the report says 0.04"):
        walk.check_error({"name": "a", "weight_error": 0.04**2}, values, original, rounded=True)


def test_what_a_step_raises_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", tmp_path / "llama")
    steps = {
        "refused": lambda: walk.mezzotint.plan(model, "default", bits=4.5),
        "crashed": lambda: torch.zeros(2) @ torch.zeros(3),
        "slow": lambda: all(True for _ in iter(int, 1)),
    }

    def outcome_of(name: str, stage: str) -> walk.Outcome:
        def work(outcome: walk.Outcome) -> None:
            outcome.stage = stage
            steps[name]()

        with quiet():
            return walk._attempt(walk.Outcome(name="llama", step=name), work)

    refused, late = outcome_of("refused", "plan"), outcome_of("refused", "quantize")
    assert (refused.status, late.status) == (walk.REFUSED, walk.WRONG)
    assert "whole bits" in refused.what
    assert refused.where.startswith("recipes/request.py:")
    crashed = outcome_of("crashed", "quantize")
    assert crashed.status == walk.CRASH
    assert crashed.what.startswith("RuntimeError: ")
    monkeypatch.setattr(walk, "LIMIT_SECONDS", 1)
    assert outcome_of("slow", "quantize").status == walk.SLOW


def test_the_table_is_written_between_its_marks() -> None:
    outcomes = [
        walk.Outcome(name="llama", step="rtn", share=0.946),
        walk.Outcome(name="llama", step="default", stepped_down=["curvature none: no gradient"]),
        walk.Outcome(
            name="opt_proj", step="best", status=walk.REFUSED, what="matrix model.layers.0.q has no role. Use --keep."
        ),
        walk.Outcome(name="opt_proj", step="own", status=walk.CRASH, what="ValueError: 3 of [2]"),
    ]
    text = page.filled(f"a\n{page.BEGIN}\nold\n{page.END}\nb", outcomes)
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("b")
    assert "| `llama` | 95 % | yes | simpler (1) | not run | not run | not run |" in text
    assert "| `opt_proj` (of `opt`) | – | not run | not run | no (2) | not run | fails (3) |" in text
    assert "2. matrix … has no role\n3. ValueError: 3 of \\[2\\]\n" in text
    assert page.filled(text, outcomes) == text
    with pytest.raises(SystemExit, match="no <!-- zoo -->"):
        page.filled("nothing", outcomes)
