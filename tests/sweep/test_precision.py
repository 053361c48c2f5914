"""Products of calibration in bfloat16."""

from pathlib import Path

import pytest
import torch

from mezzotint.blockwise import streams
from mezzotint.core.precision import RoundedLinears, products_in
from mezzotint.core.statistics import Accumulator
from mezzotint.errors import ConfigError
from mezzotint.evaluation.texts import evaluate
from mezzotint.report.report import REPORT_NAME
from runs import TEXT, TINY_LLAMA, plan_of, quantized, request_of, tiny


@pytest.fixture
def in_use(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """torch's setting wherever a sum is formed, and wherever a Hessian is factorised."""
    from mezzotint.core import linalg

    seen: dict[str, set[str]] = {"sums": set(), "solves": set()}
    add, damped = Accumulator.add, linalg.damped

    def spy_add(self: Accumulator, *args: torch.Tensor, **options: torch.Tensor) -> None:
        seen["sums"].add(torch.get_float32_matmul_precision())
        add(self, *args, **options)

    def spy_damped(*args: object, **options: object) -> object:
        seen["solves"].add(torch.get_float32_matmul_precision())
        return damped(*args, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Accumulator, "add", spy_add)
    monkeypatch.setattr(linalg, "damped", spy_damped)
    return seen


def test_the_setting_is_put_back_whatever_happens() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), products_in("bfloat16"):
        _ = 1 / (torch.get_float32_matmul_precision() == before)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(("precision", "setting"), [("bfloat16", "medium"), ("float32", "highest")])
def test_products_are_so_and_solvers_are_not(
    precision: str, setting: str, in_use: dict[str, set[str]], tmp_path: Path
) -> None:
    report = quantized(TINY_LLAMA, tmp_path / "out", "qep-gptq", bits=3, precision=precision)
    assert in_use == {"sums": {setting}, "solves": {"highest"}}
    assert report["precision"] == precision
    assert (tmp_path / "out" / REPORT_NAME).is_file()


def test_rounded_linears_are_those_of_a_model_in_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator)
    linear = torch.nn.Linear(8, 6)
    wanted = linear.bfloat16()(x.bfloat16()).float()
    linear = linear.float()
    with RoundedLinears(), torch.no_grad():
        assert torch.equal(linear(x), wanted)
        assert linear(x).dtype == torch.float32
        plain = x @ x.mT
        assert torch.nn.functional.linear(input=x, weight=linear.weight).dtype == torch.float32
    assert torch.equal(plain, x @ x.mT)
    with torch.no_grad():
        exact = linear(x)
    assert not torch.equal(exact, wanted)
    with RoundedLinears():
        assert torch.equal(linear(x), exact)  # gradients are wanted


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_processors_that_gain_by_it_multiply_bfloat16(
    precision: str, able: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    factors: set[torch.dtype] = set()
    linears: set[torch.dtype] = set()
    monkeypatch.setattr(streams, "multiplies_bfloat16", lambda: able)
    add = Accumulator.add
    linear = torch.nn.functional.linear

    def spy_add(self: Accumulator, *args: torch.Tensor, **options: torch.Tensor) -> None:
        factors.add(self._factors)
        assert self.gram.dtype == torch.float32
        add(self, *args, **options)

    class Spy(RoundedLinears):
        def __torch_function__(self, func: object, *rest: object) -> object:  # type: ignore[override]
            result = super().__torch_function__(func, *rest)  # pyright: ignore[reportArgumentType]
            if func is linear:
                linears.add(result.dtype)
            return result

    monkeypatch.setattr(Accumulator, "add", spy_add)
    monkeypatch.setattr(streams, "RoundedLinears", Spy)
    quantized(TINY_LLAMA, tmp_path / "out", "loaq-gptq", bits=3, precision=precision)
    rounded = able and precision == "bfloat16"
    assert factors == {torch.bfloat16 if rounded else torch.float32}
    assert linears == ({torch.float32} if rounded else set())


def test_auto_is_what_the_model_is_stored_in(tmp_path: Path) -> None:
    assert plan_of(TINY_LLAMA, precision="auto").precision == "bfloat16"
    wide = tiny("llama", tmp_path, dtype=torch.float32)
    assert plan_of(wide, precision="auto").precision == "float32"
    assert plan_of(TINY_LLAMA).plan.fingerprint != plan_of(TINY_LLAMA, precision="auto").plan.fingerprint


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="float32"):
        request_of(TINY_LLAMA, precision="float23")


def test_evaluation_keeps_states_of_each_precision_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantized(TINY_LLAMA, out, "rtn", bits=4)
    options = {"against": TINY_LLAMA, "seqlen": 32, "windows": 4, "cache": tmp_path / "states"}
    exact, rounded, again = (
        evaluate(out, str(TEXT), precision=p, **options) for p in ("float32", "bfloat16", "float32")
    )
    assert again == exact
    assert len(list((tmp_path / "states").iterdir())) == 2
    assert rounded.kl_nats == pytest.approx(exact.kl_nats, rel=0.02)
    with pytest.raises(ConfigError, match="precision"):
        evaluate(out, str(TEXT), precision="int8", **options)
