"""Bits from a budget, on the trained tiny Llama."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mezzotint
from mezzotint.allocation.sensitivity import Sensitivity
from mezzotint.blockwise.source import open_original
from mezzotint.budgeting import allocate, pricing
from mezzotint.budgeting.allocate import Allocated, allocated
from mezzotint.budgeting.footprint import serving_bytes
from mezzotint.budgeting.latency import Latency
from mezzotint.budgeting.noise import noise_insertion
from mezzotint.budgeting.pricing import Price
from mezzotint.core.contracts import Aim
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError, FormatError
from mezzotint.formats.native import Scheme
from mezzotint.grids.trellis import TrellisGrid
from mezzotint.grids.uniform import UniformGrid
from mezzotint.jobs.quantize import quantize
from mezzotint.models import Source
from mezzotint.planning.plan import make_plan
from mezzotint.report.report import REPORT_NAME
from mezzotint.rounding.gptq import Gptq
from mezzotint.storage.cache import LIMIT
from mezzotint.sweep import job as jobs
from mezzotint.sweep.job import Job
from runs import TINY_LLAMA, opened, plan_of, quantized, request_of, stock, windows_of
from twins import run

FAST = {"allocation.windows": 2, "allocation.guard": False}
ALLOCATING = FAST | {"allocation.kind": "knapsack", "grid.group_size": 32}


def found(recipe: str = "palette", settings: dict[str, Any] | None = None, **options: Any) -> Allocated:
    request = request_of(
        TINY_LLAMA, recipe, settings={"allocation.kind": "knapsack", **FAST, **(settings or {})}, **options
    )
    return allocated(Job(request))


def bits_of(result: Allocated) -> dict[str, float]:
    return {name: float(settings["grid.bits"]) for name, settings in result.request.recipe.matrices.items()}


def test_no_better_uniform_choice_fits() -> None:
    result = found(bits=3.6)
    assert result.alike is not None
    assert result.chosen.bits_per_weight <= 3.6
    assert result.chosen.predicted_kl_nats < result.alike.predicted_kl_nats
    assert len(set(bits_of(result).values())) > 2
    assert result.gap < 0.02
    uniform = [point for point in result.points if point.kind == "uniform"]
    assert [point.code_bits for point in uniform] == [quarter / 4 for quarter in range(6, 25)]
    spread = [point for point in result.points if point.kind == "allocated"]
    assert [point.bytes for point in spread] == sorted(point.bytes for point in spread)
    for point in uniform:
        best = min(one.predicted_kl_nats for one in spread if one.bytes <= point.bytes)
        assert best <= point.predicted_kl_nats * 1.05  # the hull has gaps, whose ends lie below every uniform point


def test_losses_are_those_of_rounded_rows_in_the_norm_of_inputs_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """One price by hand, in float64, from what the rounding makes of every row."""
    prices: dict[str, tuple[Price, ...]] = {}
    price = allocate.price

    def spy(*args: Any, **options: Any) -> Any:
        prices.update(price(*args, **options))
        return prices

    monkeypatch.setattr(allocate, "price", spy)
    monkeypatch.setattr(pricing, "_ROWS", 10_000)
    result = found("gptq", {"grid.group_size": 32, "rounding.damping": 0.01, "rounding.order": "natural"}, bits=3.5)
    name = "model.layers.1.mlp.up_proj"
    source = opened(TINY_LLAMA)
    weight = source.checkpoint.parameter(source.map.matrices[name].parameter).float()
    inputs = inputs_of(source, name, result)
    gram = inputs.T @ inputs
    statistics = Statistics(tokens=float(len(inputs)), gram=gram.float())
    sensitivity = result.sensitivities[name]
    assert sensitivity.columns is not None
    by_input = gram * (sensitivity.columns / gram.diagonal()).sqrt().outer(
        (sensitivity.columns / gram.diagonal()).sqrt()
    )
    for choice in prices[name]:
        fitted = choice.grid.fit(weight, statistics.importance)
        error = (Gptq(order="natural").round(Aim(matrix=weight), fitted, statistics).value - weight).double()
        loss = 0.5 * float(torch.einsum("o,oi,ij,oj->", sensitivity.rows, error, by_input, error) / sensitivity.trace)
        assert choice.loss == pytest.approx(loss, rel=1e-2)  # a code at the border of two, in float32
        assert sensitivity.loss(error.float(), gram) == pytest.approx(loss, rel=1e-4)


def test_a_trellis_is_priced_in_the_order_of_its_columns() -> None:
    """Columns in the order of their inputs cost what they cost where they lie so."""
    generator = torch.Generator().manual_seed(0)
    width, tile = 64, TrellisGrid(bits=3).tile[1]
    inputs = torch.randn(200, width, generator=generator) @ torch.randn(width, width, generator=generator)
    inputs *= torch.linspace(0.1, 4, width)
    order = torch.arange(width).view(-1, tile).flip(0).flatten()  # the largest come first
    weight = torch.randn(32, width, generator=generator)

    def price_of(order: str, inputs: torch.Tensor, weight: torch.Tensor) -> float:
        known = Statistics(tokens=200.0, gram=inputs.T @ inputs)
        return pricing.predicted(Gptq(order=order), TrellisGrid(bits=3), weight, known, Sensitivity.even(1.0, weight))

    ordered = price_of("diagonal", inputs, weight)
    assert ordered == pytest.approx(price_of("natural", inputs[:, order], weight[:, order]), rel=1e-4)
    assert ordered != pytest.approx(price_of("natural", inputs, weight), rel=1e-2)


@pytest.mark.slow
def test_some_rows_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for rows in (10_000, 48):
        monkeypatch.setattr(pricing, "_ROWS", rows)
        result = found("gptq", {"grid.group_size": 32}, bits=3.5)
        losses.append([point.predicted_kl_nats for point in result.points if point.kind == "uniform"])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[1] != losses[0]


def test_a_basis_of_another_scale_changes_no_price_by_its_scale() -> None:
    """Weights of a Hadamard basis have rows of unit energy, some forty times that of the originals."""
    losses = [
        [point.predicted_kl_nats for point in found("rtn", settings, bits=3.5).points if point.kind == "uniform"]
        for settings in ({}, {"transform.kind": "hadamard"})
    ]
    assert len(losses[0]) == len(losses[1])
    for plain, turned in zip(*losses, strict=True):
        assert 0.3 < turned / plain < 3


def inputs_of(source: Source, name: str, result: Allocated) -> torch.Tensor:
    fit, _ = windows_of(source, result.request)
    return run(stock(TINY_LLAMA, torch.float64), source, fit.tokens, fit.mask)[name].double()


def test_the_folder_is_as_large_as_it_may_be(tmp_path: Path) -> None:
    limit = 2_200_000
    quantized(TINY_LLAMA, tmp_path / "out", "palette", size=limit, settings=FAST)
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert 0.995 * limit < size <= limit


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"size": 1000}, r"--size is 1,000 bytes; with this menu the folder takes [\d,]+ to [\d,]+ bytes"),
        ({"bits": 1.0}, r"--bits is 1; with this menu 1\.\d+ to 6\.\d+ bits are stored"),
        ({}, "there is no budget"),
        ({"bits": 3.0, "size": 10**6}, "each of them limits the size"),
        ({"size": 10**6, "engine": "dense"}, "same size with any bits"),
        ({"tokens_per_second": 5.0, "engine": "dense"}, "not known"),
        ({"fits": 10**6, "context": 10**6}, "a sequence of 1000000 tokens takes"),
        ({"fits": 10**6, "size": 10**6}, "each of them limits the size"),
        ({"bits": 3.0, "settings": {"allocation.limits": {"*": [7, 8]}}}, "no grid of"),
    ],
)
def test_a_budget_that_nothing_fits_says_what_would(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        found(**budget)


def test_a_format_that_cannot_mix_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocate, "measure_sensitivity", lambda *_, **__: pytest.fail("it has begun to measure"))
    with pytest.raises(FormatError, match="mixed-asymmetric"):
        found("gptq", {"grid.symmetric": False}, bits=3.5, engine="transformers")


def test_grids_are_priced_as_the_mixture_will_have_them() -> None:
    result = found("gptq", {"grid.group_size": 32}, bits=6.5, engine="transformers")
    assert len(set(bits_of(result).values())) > 1
    planned = make_plan(open_original(TINY_LLAMA), result.request)
    grids = [entry.grid for entry in planned.plan.entries]
    assert all(isinstance(grid, UniformGrid) and grid.symmetric for grid in grids)
    made = sum(entry.bits.total for entry in planned.plan.entries)
    assert made == pytest.approx(result.chosen.bits_per_weight * planned.weights)


def test_what_vllm_fuses_gets_one_scheme() -> None:
    result = found("gptq", {"grid.group_size": 32}, bits=6.5, engine="vllm")
    bits = bits_of(result)
    assert set(bits.values()) == {4.0, 8.0}
    for block in range(3):
        prefix = f"model.layers.{block}"
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({bits[f"{prefix}.{name}"] for name in fused}) == 1


def test_limits_menu_and_kept_matrices(tmp_path: Path) -> None:
    settings = {"allocation.menu": [2, 3, 4], "allocation.limits": {"*.v_proj": [4, 4]}}
    report = quantized(
        TINY_LLAMA, tmp_path / "out", "gptq", size=2_250_000, settings=FAST | settings, keep=["*.0.*.q_proj"]
    )
    bits = {one["name"]: one["grid"]["bits"] for one in report["plan"]["linears"]}
    assert set(bits.values()) <= {2, 3, 4}
    assert {b for name, b in bits.items() if name.endswith("v_proj")} == {4}
    assert "model.layers.0.self_attn.q_proj" in report["plan"]["kept"]


def test_the_guard_keeps_what_is_better_on_held_out_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told that allocation is worse, it keeps the uniform folder; the losses are those that evaluation finds."""
    from mezzotint.jobs import quantize as budgeted

    measured = budgeted.compare
    losses: dict[str, float] = {}

    def spy(folder: Path, *args: Any, **options: Any) -> Any:
        result = measured(folder, *args, **options)
        assert result.kl_nats is not None
        losses[folder.name] = result.kl_nats
        worse = 10.0 if folder.name == "allocated" and swapped else 0.0
        return replace(result, kl_nats=result.kl_nats + worse)

    opened: list[Path] = []

    def opening(model: Path, **options: Any) -> Source:
        opened.append(model)
        return open_original(model, **options)

    monkeypatch.setattr(jobs, "open_original", opening)
    monkeypatch.setattr(budgeted, "compare", spy)
    for swapped, kept in ((False, None), (True, "uniform")):
        out = tmp_path / f"out{swapped}"
        report = quantized(TINY_LLAMA, out, "gptq", bits=3.6, settings=ALLOCATING | {"allocation.guard": True})
        evidence = report["allocation"]
        assert evidence["kept"] == (kept or min(losses, key=lambda name: losses[name]))
        assert json.loads((out / REPORT_NAME).read_text())["allocation"] == evidence
        bits = {one["grid"]["bits"] for one in report["plan"]["linears"]}
        assert (len(bits) == 1) == (evidence["kept"] == "uniform")
        assert not (tmp_path / f"out{swapped}.partial").exists()
    assert 0 < losses["allocated"] < 5
    assert len(opened) == 2  # the original, once a run


def test_another_budget_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(LIMIT, str(2**24))
    first = found("gptq", ALLOCATING, bits=3.6)
    with monkeypatch.context() as patched:
        for module, name in ((allocate, "measure_sensitivity"), (pricing, "Sweep")):
            patched.setattr(module, name, lambda *_, **__: pytest.fail("it measures again"))
        assert found("gptq", ALLOCATING, bits=3.6).points == first.points
        assert found("gptq", ALLOCATING, bits=4.5).chosen.predicted_kl_nats < first.chosen.predicted_kl_nats
    for changed in ({"seed": 1}, {"settings": ALLOCATING | {"rounding.damping": 0.02}}):
        with monkeypatch.context() as patched:
            patched.setattr(pricing, "Sweep", lambda *_, **__: pytest.fail("it measures again"))
            with pytest.raises(pytest.fail.Exception, match="measures again"):
                found("gptq", **{"settings": ALLOCATING, "bits": 3.6, **changed})


@pytest.mark.parametrize(("where", "kept"), [("allocated", False), ("compare", True)])
def test_finished_candidates_are_kept_and_nothing_else_of_a_run_that_fails(
    where: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mezzotint.jobs import quantize as budgeted

    def broken(*_: Any, **__: Any) -> None:
        raise ConfigError("not today")

    request = request_of(TINY_LLAMA, "gptq", bits=3.6, settings=ALLOCATING | {"allocation.guard": True})
    with monkeypatch.context() as patched:
        patched.setattr(budgeted, where, broken)
        with pytest.raises(ConfigError, match="not today"):
            quantize(request, tmp_path / "out")
    if not kept:
        assert list(tmp_path.iterdir()) == []
        return
    monkeypatch.setattr(budgeted.run, "quantize", None)  # both are there
    quantize(request, tmp_path / "out", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_noise_is_another_way_to_the_same() -> None:
    result = found("rtn", {"allocation.sensitivity": "noise", "allocation.menu": [3, 4]}, bits=4.0)
    source = opened(TINY_LLAMA)
    fit, _ = windows_of(source, request_of(TINY_LLAMA, "gptq"))
    names = list(result.sensitivities)[:2]
    expected = noise_insertion(source, fit.take(torch.arange(2)), names, energy=0.001)
    for name in names:
        assert result.sensitivities[name].fisher == pytest.approx(expected[name], rel=1e-6)
        weight = source.checkpoint.parameter(source.map.matrices[name].parameter)
        assert result.sensitivities[name].loss(0.1 * weight) == pytest.approx(0.01 * expected[name], rel=1e-3)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that needs a microsecond for a weight and bit, and ten milliseconds for the rest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Latency, "seconds", lambda _, shape, grid, __: 1e-6 * grid.bits * shape[0] * shape[1])
    monkeypatch.setattr(Latency, "constant", lambda *_: 0.01)


@pytest.mark.usefixtures("timed")
def test_a_speed_is_a_budget_too() -> None:
    weights = plan_of(TINY_LLAMA, "trellis").weights
    speed = 1 / (0.01 + 3.1e-6 * weights)
    result = found(tokens_per_second=speed)
    reached = result.chosen.tokens_per_second
    assert reached is not None
    assert speed <= reached < 1.05 * speed
    assert result.alike is not None
    assert result.alike.code_bits == 3
    both = found(tokens_per_second=speed, bits=2.6)
    assert both.chosen.bits_per_weight <= 2.6
    with pytest.raises(ConfigError, match=r"this machine reaches \d+\.\d, and 100\.0 if the matrices took no time"):
        found(tokens_per_second=99.0)


def test_latencies_are_measured_once(tmp_path: Path) -> None:
    grid = request_of(TINY_LLAMA, "palette", bits=3.0).recipe.stages().grid
    latency = Latency(10**6, tmp_path / "times.json")
    first = latency.seconds((64, 64), grid, None)
    assert 0 < first < 1
    latency.save()
    again = Latency(10**6, tmp_path / "times.json")
    assert again.seconds((64, 64), grid, None) == first
    assert len(json.loads((tmp_path / "times.json").read_text())) == 1
    (tmp_path / "times.json").write_text("{")
    assert 0 < Latency(10**6, tmp_path / "times.json").seconds((64, 64), grid, None) < 1


def test_the_constant_is_what_a_token_takes_beside_its_matrices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(TINY_LLAMA)
    grid = request_of(TINY_LLAMA, "palette", bits=3.0).recipe.stages().grid
    schemes = {
        name: Scheme(shape=matrix.shape, grid=grid, transform=None)
        for name, matrix in source.map.matrices.items()
        if matrix.shape[1] % 16 == matrix.shape[0] % 16 == 0 and not source.map.looked_up(name)
    }
    assert len(schemes) > 3
    latency = Latency(10**6, tmp_path / "times.json")
    constant = latency.constant(source, schemes)
    assert 0 < constant < 5
    monkeypatch.setattr(Latency, "seconds", lambda *_: 0.0)
    assert latency.constant(source, schemes) > constant  # the same generation, of which nothing is taken off


def test_a_named_matrix_must_be_there_and_rules_are_about_matrices() -> None:
    recipe = mezzotint.Recipe(matrices={"model.layers.7.mlp.up_proj": {"grid.bits": 3}})
    with pytest.raises(ConfigError, match="unknown matrix"):
        mezzotint.plan(TINY_LLAMA, recipe)
    with pytest.raises(ValueError, match="Set it outside the rules"):
        mezzotint.Recipe(rules=[{"match": "*", "set": {"allocation.bits": 3}}])  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_what_fits_leaves_room_for_the_cache() -> None:
    """Three blocks of the tiny Llama: keys and values by hand, in bfloat16."""
    config = opened(TINY_LLAMA).config
    long, short = (serving_bytes(opened(TINY_LLAMA), tokens) for tokens in (8192, 4096))
    head = config.hidden_size // config.num_attention_heads
    assert long - short == 4096 * 3 * config.num_key_value_heads * head * 2 * 2
    fits = short + 2_200_000
    assert found(fits=fits, context=4096).chosen == found(size=2_200_000).chosen
