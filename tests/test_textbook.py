"""A whole run against a whole textbook: sequential GPTQ of a Llama in float64 with the same grids."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mezzotint
from mezzotint.blockwise.streams import Resources
from mezzotint.calibration import consecutive_windows, load_tokenizer
from mezzotint.core.contracts import QuantizedWeight
from mezzotint.core.statistics import Accumulator
from mezzotint.jobs.output import Output
from mezzotint.models import open_model
from mezzotint.sweep import job, sweep
from reference import textbook
from runs import HELD_OUT, TINY_LLAMA, quantized, request_of, stock, windows_of

SIZES: dict[str, Any] = {"bits": 3, "samples": 16, "seqlen": 64}
WINDOWS, SEQLEN = 16, 64
Kept = Mapping[str, QuantizedWeight]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Codes and grid of every matrix that a run writes."""
    found: dict[str, QuantizedWeight] = {}
    put = Output.put

    def spy(self: Output, matrix: Any, weight: QuantizedWeight) -> None:
        found[matrix.name] = weight
        put(self, matrix, weight)

    monkeypatch.setattr(Output, "put", spy)
    return found


def values_of(kept: Kept) -> dict[str, np.ndarray]:
    return {name: weight.dense(torch.float64).numpy() for name, weight in kept.items()}


def textbook_run(kept: Kept, *, follow: bool, **options: Any) -> tuple[dict[str, textbook.Quantized], float]:
    """What the textbook makes of the same windows and grids, and its divergence on the other text."""
    grids = {
        name: textbook.Grid(
            scale=weight.grid.parameters["scale"].double().numpy(),
            zero_point=weight.grid.parameters["zero_point"].double().numpy(),
            group_size=weight.grid.affine.group_size,
            bits=int(weight.grid.grid.bits),
        )
        for name, weight in kept.items()
    }
    fit, _ = windows_of(open_model(TINY_LLAMA), request_of(TINY_LLAMA, **options))
    original, model = stock(TINY_LLAMA, torch.float64), stock(TINY_LLAMA, torch.float64)
    done = textbook.quantize(model, fit.tokens, grids, follow=values_of(kept) if follow else None)
    for name, result in done.items():
        textbook.put(model, name, result.weight)
    text = HELD_OUT.read_text(encoding="utf-8")
    windows = consecutive_windows(text, load_tokenizer(TINY_LLAMA), seqlen=SEQLEN, windows=WINDOWS)
    return done, textbook.kl_nats(original, model, windows.tokens)


def kl_of(folder: Path) -> float:
    found = mezzotint.evaluate(folder, HELD_OUT, against=TINY_LLAMA, seqlen=SEQLEN, windows=WINDOWS).kl_nats
    assert found is not None
    return found


def test_every_matrix_is_the_textbooks_after_the_same_prefix(kept: Kept, tmp_path: Path) -> None:
    """In float32, as users run it.

    Where a value lies within rounding error of the boundary of two codes, float32 and float64 choose different ones,
    and from there on the row is another rounding. So the textbook continues each time with the matrices of the run:
    otherwise one such code (there are a few among a million) changes a fifth of all codes in later blocks.
    """
    options = SIZES | {"settings": {"grid.group_size": None}}
    report = quantized(TINY_LLAMA, tmp_path / "out", **options)
    done, kl = textbook_run(kept, follow=True, **options)
    assert done.keys() == kept.keys()
    for linear in report["linears"]:
        assert linear["h_error"] == pytest.approx(done[linear["name"]].h_error, rel=1e-3), linear["name"]
    assert kl_of(tmp_path / "out") == pytest.approx(kl, rel=0.02)


def test_the_whole_run_is_the_textbooks(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With streams and sums in float64 no code differs, so the textbook goes all the way by itself."""
    monkeypatch.setattr(job, "Resources", partial(Resources, dtype=torch.float64))
    monkeypatch.setattr(sweep, "Accumulator", partial(Accumulator, dtype=torch.float64))
    options = SIZES | {"settings": {"grid.group_size": 32, "grid.range": "minmax"}}
    report = quantized(TINY_LLAMA, tmp_path / "out", **options)
    done, kl = textbook_run(kept, follow=False, **options)
    for name, value in values_of(kept).items():
        # values of grid and codes are products in float32 here, in float64 there
        np.testing.assert_allclose(value, done[name].weight, rtol=1e-6, atol=0, err_msg=name)
    for linear in report["linears"]:
        assert linear["h_error"] == pytest.approx(done[linear["name"]].h_error, rel=1e-4), linear["name"]
    # the evaluation runs in float32: relative errors of logits of 1e-5, against a divergence of some hundredths
    assert kl_of(tmp_path / "out") == pytest.approx(kl, rel=1e-3)
