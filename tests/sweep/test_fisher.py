"""The curvature in outputs against explicit gradients of whole models, and what runs do with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.blockwise import backward
from mezzotint.blockwise.backward import sampled
from mezzotint.calibration import Windows
from mezzotint.errors import CalibrationError, ConfigError
from mezzotint.jobs import run
from mezzotint.jobs.drift import measure_drift
from mezzotint.jobs.run import Progress
from mezzotint.models import Source, open_model
from mezzotint.sweep import fisher
from mezzotint.sweep.fisher import measure_curvature, planned_curvature, windows_for
from runs import TINY_LLAMA, assert_same_tensors, opened, plan_of, quantized, request_of, stock

Folder = Callable[[str], Path]
F64 = torch.float64
FISHER: dict[str, Any] = {"curvature.kind": "fisher", "curvature.block_size": 16}


def random_windows(count: int, length: int) -> Windows:
    tokens = torch.randint(3, 300, (count, length), generator=torch.Generator().manual_seed(0))
    return Windows(tokens=tokens, mask=None, source="random")


def measured(folder: Path, windows: Windows, recipe: str = "gptq", **options: Any) -> dict[str, Tensor]:
    entries = plan_of(folder, recipe, settings={**FISHER, "curvature.tokens": windows.tokens.numel()}).plan.entries
    return dict(measure_curvature(open_model(folder), entries, windows, **options))


def outputs_of(model: nn.Module, source: Source, names: list[str]) -> tuple[dict[str, Tensor], list[Any]]:
    """Where the outputs of matrices will be, and the hooks that put them there."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name in names:
        module = model.get_submodule(source.map.matrices[name].parameter.rpartition(".")[0])

        def ran(_module: Any, _inputs: Any, output: Tensor, name: str = name) -> None:
            seen[name] = output

        hooks.append(module.register_forward_hook(ran))
    return seen, hooks


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "falcon_multi_query"])
def test_blocks_are_those_of_explicit_unit_gradients(
    name: str, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, windows, drawn = tiny_folder(name), random_windows(2, 12), []

    def watched(*args: Any) -> Tensor:
        drawn.append(sampled(*args))
        return drawn[-1]

    monkeypatch.setattr(backward, "sampled", watched)
    found = measured(folder, windows, seed=3, dtype=F64)
    source = open_model(folder)
    expected = [e.matrix for e in plan_of(folder).plan.entries if source.map.matrices[e.matrix].expert is None]
    assert sorted(found) == sorted(expected)
    experts = {"experts_implementation": "eager"} if name == "mixtral" else {}
    model = stock(folder, F64, **experts)
    seen, hooks = outputs_of(model, source, expected)
    sums = {matrix: torch.zeros(source.map.matrices[matrix].shape[0], dtype=F64).diag() for matrix in expected}
    for window in range(2):
        logits = model(input_ids=windows.tokens[window : window + 1], use_cache=False).logits[0, :-1]
        labels = drawn[window]
        loss = -logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()
        for matrix, gradient in zip(expected, torch.autograd.grad(loss, [seen[m] for m in expected]), strict=True):
            unit = torch.nn.functional.normalize(gradient.flatten(0, -2), eps=1e-300)
            sums[matrix] += unit.T @ unit
    for hook in hooks:
        hook.remove()
    for matrix, blocks in found.items():
        rows = len(sums[matrix])
        whole = torch.block_diag(*blocks)
        mask = torch.block_diag(*torch.ones_like(blocks)).bool()[:rows, :rows]
        torch.testing.assert_close(whole[:rows, :rows], sums[matrix] * mask, rtol=1e-7, atol=1e-8)
        assert not whole[rows:].any()
        assert not whole[:, rows:].any()


def test_padding_and_other_windows_say_nothing(tiny_folder: Folder) -> None:
    windows = random_windows(2, 12)
    padded = torch.cat([windows.tokens, torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    mask = torch.arange(16).expand(2, 16) < 12
    found = measured(tiny_folder("llama"), Windows(tokens=padded, mask=mask, source="padded"), dtype=F64)
    for name, blocks in measured(tiny_folder("llama"), windows, dtype=F64).items():
        # other random numbers are drawn for windows of another length: only that padding adds nothing can be told
        assert float(found[name].diagonal(dim1=1, dim2=2).sum()) <= 2 * 11 + 1e-9
        assert float(blocks.diagonal(dim1=1, dim2=2).sum()) <= 2 * 12 + 1e-9
    some = windows_for(random_windows(5, 12), 25)
    assert some.tokens.tolist() == random_windows(5, 12).tokens[:3].tolist()
    assert len(windows_for(windows, 10**6)) == 2


def test_spilled_states_give_the_same(tiny_folder: Folder) -> None:
    windows = random_windows(2, 12)
    whole = measured(tiny_folder("llama"), windows, seed=1)
    for name, blocks in measured(tiny_folder("llama"), windows, seed=1, memory=1).items():
        assert torch.equal(blocks, whole[name])
    other = measured(tiny_folder("llama"), windows, seed=2)
    assert all(not torch.equal(other[name], blocks) for name, blocks in whole.items())


def test_windows_without_a_next_token_are_refused(tiny_folder: Folder) -> None:
    with pytest.raises(CalibrationError, match="no token to predict"):
        measured(tiny_folder("llama"), random_windows(2, 1))


def test_a_run_rounds_with_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Progress] = []
    report = quantized(TINY_LLAMA, tmp_path / "joint", "gptq", settings=FISHER, listener=steps.append)
    assert {linear["curvature"]["kind"] for linear in report["plan"]["linears"]} == {"fisher"}
    told = [(step.done, step.total) for step in steps if step.stage == "curvature"]
    blocks = len(opened(TINY_LLAMA).map.blocks)
    assert told == [(done, 2 * blocks + 1) for done in range(1, 2 * blocks + 2)]
    quantized(TINY_LLAMA, tmp_path / "alone", "gptq")
    with pytest.raises(AssertionError):
        assert_same_tensors(tmp_path / "joint", tmp_path / "alone")

    def nothing(*args: Any, **kwargs: Any) -> Any:
        for name, blocks in planned(*args, **kwargs):
            yield name, torch.zeros_like(blocks)

    planned = run.planned_curvature
    monkeypatch.setattr(run, "planned_curvature", nothing)
    quantized(TINY_LLAMA, tmp_path / "flat", "gptq", settings=FISHER)
    assert_same_tensors(tmp_path / "flat", tmp_path / "alone")


def test_experts_and_the_head_have_none(tiny_folder: Folder) -> None:
    planned = plan_of(tiny_folder("mixtral"), "gptq", settings=FISHER)
    source = open_model(tiny_folder("mixtral"))
    for entry in planned.plan.entries:
        assert (entry.curvature is None) == (source.map.matrices[entry.matrix].expert is not None)


def test_drift_is_measured_with_it_too() -> None:
    requests = [request_of(TINY_LLAMA, "gptq", settings=settings) for settings in ({}, FISHER)]
    plain, joint = measure_drift(requests, blocks=1)
    assert joint.absolute[0] > 0
    assert joint.absolute != plain.absolute


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("gptaq", {}, r"curvature 'fisher' needs rounding.kind=gptq, but rounding.kind is 'gptaq'"),
        ("rtn", {}, r"needs rounding.kind=gptq, but rounding.kind is 'nearest'"),
        ("gptq", {"grid.kind": "lookup"}, r"needs grid.kind=uniform, but grid.kind is 'lookup'"),
        ("awq-gptq", {}, r"transform 'awq' changes it. Use curvature.kind=none"),
        (
            "default",
            {"grid.kind": "lookup", "grid.range": "error"},
            r"curvature 'fisher' needs .*; refinement 'descent' .*Use curvature.kind=none and refinement.kind=none",
        ),
        ("gptq", {"curvature.block_size": 8}, r"curvature.block_size is 8"),
    ],
)
def test_what_it_is_not_for_is_refused(recipe: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(TINY_LLAMA, recipe, settings={"curvature.kind": "fisher", **settings})


def test_it_is_measured_on_what_statistics_are_fitted_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Windows] = []
    monkeypatch.setattr(fisher, "measure_curvature", lambda _, __, windows, **___: seen.append(windows) or iter(()))
    windows, planned = random_windows(16, 8), plan_of(TINY_LLAMA, "default")
    assert not [*planned_curvature(opened(TINY_LLAMA), planned, windows, folder=tmp_path)]
    fit, _ = windows.split(seed=planned.request.seed)
    torch.testing.assert_close(seen[0].tokens, fit.tokens, rtol=0, atol=0)
