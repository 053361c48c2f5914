"""The sums that the sweep collects, against two explicit float64 models and hooks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.blockwise import batches, streams
from mezzotint.core.statistics import Statistics
from mezzotint.models import Source, open_model
from mezzotint.recipes.recipe import Recipe, Rule
from mezzotint.sweep.solve import Solved, Solver, least_tokens
from runs import TEXT, TINY_LLAMA, assert_same_tensors, quantized, request_of, stock, tiny, windows_of
from twins import assert_sum, quantized_twin, routes, run

Found = dict[str, tuple[Statistics, Statistics]]


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Found:
    """Statistics of every matrix that the sweep quantizes: over the fit windows and over those held out."""
    found: Found = {}
    solve = Solver.solve

    def spy(self: Solver, weights: Any, fit: Statistics, held_out: Statistics, *, place: int) -> Iterator[Solved]:
        found.update({matrix.name: (fit, held_out) for matrix, _ in weights})
        return solve(self, weights, fit, held_out, place=place)

    monkeypatch.setattr(Solver, "solve", spy)
    return found


def assert_drift(statistics: Statistics, source: Source, name: str, x: torch.Tensor, xh: torch.Tensor) -> None:
    """The drift of a matrix's inputs, or, where it reads them alone and has few rows, of its outputs."""
    if not name.endswith("down_proj"):
        assert statistics.output_drift is None
        assert statistics.drift is not None
        assert_sum(statistics.drift, x - xh, xh, size=x)
    else:
        assert statistics.drift is None
        assert statistics.output_drift is not None
        weight = source.checkpoint.parameter(f"{name}.weight").double()
        assert_sum(statistics.output_drift, (x - xh) @ weight.T, xh, size=x @ weight.T)


def check_llama(
    source: Source, models: tuple[Any, Any], windows: Any, found: dict[str, Statistics], *, drift: bool, residual: bool
) -> None:
    """Every matrix of every block of a Llama."""
    before = run(models[0], source, windows.tokens, windows.mask)
    after = run(models[1], source, windows.tokens, windows.mask)
    norms = {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}
    real = windows.tokens.numel() if windows.mask is None else int(windows.mask.sum())
    for name, statistics in found.items():
        block, kind = name.rsplit(".", 2)[0], name.rsplit(".", 1)[1]
        x, xh = before[name], after[name]
        assert statistics.tokens == real
        assert_sum(statistics.gram, xh, xh, size=xh)
        assert statistics.has_drift == drift
        if drift:
            assert_drift(statistics, source, name, x, xh)
        assert (statistics.residual is not None) == (residual and kind in norms)
        if statistics.residual is not None:
            stream, stream_after = before[f"{block}.{norms[kind]}"], after[f"{block}.{norms[kind]}"]
            assert_sum(statistics.residual, stream - stream_after, xh, size=stream)


@pytest.mark.parametrize(
    ("target", "packing", "refined"),
    [("weight", True, False), ("qep", True, False), ("loaq", True, True), ("loaq", False, True)],
)
def test_sums_of_every_group(
    target: str, packing: bool, refined: bool, collected: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", 100)  # 3 windows a batch, the last one smaller
    settings = {"target.kind": target, **({"refinement.kind": "descent"} if refined else {})}
    options: dict[str, Any] = {"bits": 3, "settings": settings, "samples": 16, "packing": packing}
    if not packing:
        # documents of 3 to 40 tokens: most windows end in padding
        text = tmp_path / "lines.txt"
        words = TEXT.read_text(encoding="utf-8").split()
        text.write_text("\n".join(" ".join(words[i * 30 : i * 30 + 2 + i]) for i in range(16)), encoding="utf-8")
        options |= {"calibration": text, "lines": True}
    report = quantized(TINY_LLAMA, tmp_path / "out", **options)
    source = open_model(TINY_LLAMA)
    fit, held_out = windows_of(source, request_of(TINY_LLAMA, **options))
    assert (fit.mask is None) == packing
    models = stock(TINY_LLAMA, torch.float64), quantized_twin(TINY_LLAMA, tmp_path / "out")
    expected = {"drift": target != "weight", "residual": target == "loaq"}
    assert len(collected) == 21
    check_llama(source, models, fit, {name: both[0] for name, both in collected.items()}, **expected)
    # of the held-out windows, what decides nothing is not summed
    judged = expected if refined else dict.fromkeys(expected, False)
    check_llama(source, models, held_out, {name: both[1] for name, both in collected.items()}, **judged)
    before, after = (run(model, source, held_out.tokens, held_out.mask) for model in models)
    for block, record in zip(source.map.blocks, report["blocks"], strict=True):
        error = (before[block.path] - after[block.path]).square().mean()
        # both outputs have relative errors of 1e-5 at most, and differ by a tenth of their size
        assert record["error"] == pytest.approx(float(error), rel=1e-3)
        assert record["relative_error"] == pytest.approx(float(error / before[block.path].square().mean()), rel=1e-3)


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "lines.txt"
    words = TEXT.read_text(encoding="utf-8").split()
    text.write_text("\n".join(" ".join(words[i * 9 : i * 9 + 2 + i]) for i in range(12)), encoding="utf-8")
    options: dict[str, Any] = {"bits": 3, "calibration": text, "lines": True, "packing": False, "samples": 12}
    quantized(TINY_LLAMA, tmp_path / "zeros", "qep-awq-gptq", settings={"transform.steps": 3}, **options)
    batches_of = streams.batches_of

    def other_padding(windows: Any, held_out: bool, first: int = 0) -> Iterator[Any]:
        for batch in batches_of(windows, held_out, first):
            yield replace(batch, tokens=torch.where(batch.mask, batch.tokens, 77))

    monkeypatch.setattr(streams, "batches_of", other_padding)
    quantized(TINY_LLAMA, tmp_path / "sevens", "qep-awq-gptq", settings={"transform.steps": 3}, **options)
    assert_same_tensors(tmp_path / "sevens", tmp_path / "zeros")


def test_held_out_windows_enter_no_statistic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 3, "settings": {"target.kind": "qep"}, "samples": 16}
    report = quantized(TINY_LLAMA, tmp_path / "one", **options)
    batches_of = streams.batches_of

    def other_held_out(windows: Any, held_out: bool, first: int = 0) -> Iterator[Any]:
        for batch in batches_of(windows, held_out, first):
            yield replace(batch, tokens=(batch.tokens * 7 + 3) % 1024 if held_out else batch.tokens)

    monkeypatch.setattr(streams, "batches_of", other_held_out)
    other = quantized(TINY_LLAMA, tmp_path / "two", **options)
    assert_same_tensors(tmp_path / "two", tmp_path / "one")
    for first, second in zip(report["linears"], other["linears"], strict=True):
        assert first["h_error"] == second["h_error"]
        assert first["h_error_held_out"] != second["h_error_held_out"]


def check_experts(source: Source, found: Found, before: Any, after: Any, model: Any) -> int:
    """Sums of the experts' first matrices; tokens without a counterpart count as without drift. Gives their number."""
    alone = 0
    for index, block in enumerate(source.map.blocks):
        (x, chosen), (xh, chosen_after) = before[index], after[index]
        for expert in range(4):
            name = f"{block.path}.mlp.experts.gate_up_proj[{expert}]"
            rows = (chosen_after == expert).any(dim=1)
            both = rows & (chosen == expert).any(dim=1)
            alone += int((rows & ~both).sum())
            statistics = found[name][0]
            original = torch.where(both[:, None], x, xh)
            assert statistics.tokens == int(rows.sum())
            assert_sum(statistics.gram, xh[rows], xh[rows], size=xh[rows])
            assert_sum(statistics.drift, (original - xh)[rows], xh[rows], size=original[rows])
            gate, up = (model.get_parameter(f"{block.path}.mlp.experts.gate_up_proj")[expert] @ xh[rows].t()).chunk(2)
            inner = (torch.nn.functional.silu(gate) * up).t()
            assert_sum(found[name.replace("gate_up", "down")][0].gram, inner, inner, size=inner)
    return alone


def test_each_expert_has_its_own_sums(collected: Found, tmp_path: Path) -> None:
    model = tiny("mixtral", tmp_path, dtype=torch.float32)
    options: dict[str, Any] = {"bits": 3, "settings": {"target.kind": "qep"}, "samples": 16}
    quantized(model, tmp_path / "out", **options)
    source = open_model(model)
    fit, _ = windows_of(source, request_of(model, **options))
    twin = quantized_twin(model, tmp_path / "out", experts_implementation="eager")
    original = stock(model, torch.float64, experts_implementation="eager")
    before, after = routes(original, fit.tokens), routes(twin, fit.tokens)
    alone = check_experts(source, collected, before, after, twin)
    assert alone > 10, "at 3 bits some tokens go to other experts: the case that alignment is for"


@pytest.mark.parametrize("target", ["weight", "qep", "loaq"])
def test_too_few_tokens_fall_back_to_nothing_known(target: str, collected: Found, tmp_path: Path) -> None:
    model = tiny("qwen3_moe", tmp_path)
    report = quantized(model, tmp_path / "out", samples=8, seqlen=16, settings={"target.kind": target})
    source = open_model(model)
    few = {name for name, (fit, _) in collected.items() if fit.tokens < least_tokens(source.map.matrices[name])}
    assert few
    assert any("experts" in name and name not in few for name in collected)
    assert {name for name, found in report["decisions"].items() if "statistics" in found} == few
    for linear in report["linears"]:
        fit = collected[linear["name"]][0]
        assert linear["tokens"] == fit.tokens
        stated = linear["decisions"].get("statistics", "")
        assert stated.startswith(f"isotropic: only {fit.tokens:.0f} tokens") == (linear["name"] in few)
    by_expert = [fit.tokens for name, (fit, _) in collected.items() if "gate_up_proj" in name]
    # 7 windows of 16 tokens are fitted on, each token goes to 2 experts of the one block that has them
    assert sum(by_expert) == 7 * 16 * 2


def test_nothing_measured_is_not_reported_as_no_error(collected: Found, tmp_path: Path) -> None:
    model = tiny("qwen3_moe", tmp_path)
    report = quantized(model, tmp_path / "out", samples=2, seqlen=8, settings={"refinement.kind": "descent"})
    unseen = 0
    for linear in report["linears"]:
        fit, held_out = collected[linear["name"]]
        unjudged = linear["decisions"]["refinement"].startswith("refused: there are no held-out windows")
        assert unjudged == (held_out.tokens == 0)
        assert (linear["h_error"] is None) == (fit.tokens == 0)
        assert (linear["h_error_held_out"] is None) == (held_out.tokens == 0)
        unseen += fit.tokens == 0 or held_out.tokens == 0
    assert unseen


@pytest.mark.parametrize("target", ["weight", "qep"])
def test_the_head_gets_statistics_of_the_last_stream(target: str, collected: Found, tmp_path: Path) -> None:
    recipe = Recipe(
        grid={"kind": "uniform", "bits": 3},
        target={"kind": target},
        rules=(Rule(match="lm_head", keep=False),),
    )
    report = quantized(TINY_LLAMA, tmp_path / "out", recipe)
    assert report["linears"][-1]["name"] == "lm_head"
    source = open_model(TINY_LLAMA)
    fit, held_out = windows_of(source, request_of(TINY_LLAMA))
    models = stock(TINY_LLAMA, torch.float64), quantized_twin(TINY_LLAMA, tmp_path / "out")
    for windows, statistics in zip((fit, held_out), collected["lm_head"], strict=True):
        x, xh = (run(model, source, windows.tokens)["lm_head"] for model in models)
        assert_sum(statistics.gram, xh, xh, size=xh)
        if target == "qep":
            assert_sum(statistics.drift, x - xh, xh, size=x)


@pytest.mark.parametrize("kind", ["own", "original"])
def test_norm_aware_sums(kind: str, collected: Found, tmp_path: Path) -> None:
    """Each token over the root mean square of the stream that the original weight makes of it.

    Those held out likewise: what a refinement is judged by must be weighted as what it is fitted on.
    """
    settings = {"target.kind": "loaq", "target.norm_aware": kind, "refinement.kind": "descent"}
    options: dict[str, Any] = {"bits": 3, "settings": settings, "samples": 16}
    quantized(TINY_LLAMA, tmp_path / "out", **options)
    source = open_model(TINY_LLAMA)
    models = stock(TINY_LLAMA, torch.float64), quantized_twin(TINY_LLAMA, tmp_path / "out")
    norms = {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}
    for part, windows in enumerate(windows_of(source, request_of(TINY_LLAMA, **options))):
        before, after = (run(model, source, windows.tokens, windows.mask) for model in models)
        for name, both in collected.items():
            statistics, (block, role) = both[part], (name.rsplit(".", 2)[0], name.rsplit(".", 1)[1])
            x, xh = before[name], after[name]
            if role in norms:
                weight = models[0].get_parameter(f"{name}.weight").detach()
                r, rh = before[f"{block}.{norms[role]}"], after[f"{block}.{norms[role]}"]
                n = 1 / (r + x @ weight.T).square().mean(1, keepdim=True).sqrt()
                nh = 1 / (rh + xh @ weight.T).square().mean(1, keepdim=True).sqrt() if kind == "own" else n
                x, xh = x * n, xh * nh
                assert statistics.residual is not None
                assert_sum(statistics.residual, r * n - rh * nh, xh, size=r * n)
            else:
                assert statistics.residual is None
            assert_sum(statistics.gram, xh, xh, size=xh)
            assert_drift(statistics, source, name, x, xh)
