"""Following the error of the first blocks through the rest of the model."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from cli.conftest import SMALL, Answer
from mezzotint.errors import ConfigError
from mezzotint.jobs.drift import measure_drift
from mezzotint.models import open_model
from runs import TINY_LLAMA, quantized, request_of, stock, windows_of
from twins import quantized_twin, run


def test_against_two_explicit_models(tmp_path: Path) -> None:
    """Only the first block quantized: the same differences behind every block, by transformers itself."""
    options = {"bits": 3, "samples": 16, "engine": "dense"}
    (found,) = measure_drift([request_of(TINY_LLAMA, "default", **options)], 1)
    quantized(TINY_LLAMA, tmp_path / "out", "default", keep=["model.layers.[12].*"], **options)
    source = open_model(TINY_LLAMA)
    _, held_out = windows_of(source, request_of(TINY_LLAMA, "default", **options))
    models = stock(TINY_LLAMA, torch.float64), quantized_twin(TINY_LLAMA, tmp_path / "out")
    before, after = (run(model, source, held_out.tokens, held_out.mask) for model in models)
    assert len(found.absolute) == len(source.map.blocks)
    for block, absolute, relative in zip(source.map.blocks, found.absolute, found.relative, strict=True):
        error = (before[block.path] - after[block.path]).square().mean()
        assert absolute == pytest.approx(float(error), rel=1e-3)
        assert relative == pytest.approx(float(error / before[block.path].square().mean()), rel=1e-3)


def test_a_recipe_that_needs_no_calibration_is_followed_too() -> None:
    seen: list[tuple[int, int]] = []
    requests = [request_of(TINY_LLAMA, name, bits=3, engine="dense") for name in ("rtn", "qep-rtn")]
    plain, corrected = measure_drift(requests, 2, lambda done, total: seen.append((done, total)))
    assert (plain.recipe, corrected.recipe) == ("rtn", "qep-rtn")
    assert plain.absolute[0] > 0
    assert corrected.relative[1] < plain.relative[1]
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize("blocks", [0, 4])
def test_there_are_only_so_many_blocks(blocks: int) -> None:
    with pytest.raises(ConfigError, match=f"--blocks is {blocks}; this model has 3"):
        measure_drift([request_of(TINY_LLAMA, "rtn", engine="dense")], blocks)


def check_lines(drawn: str, expected: dict[str, list[float]]) -> None:
    """One line a recipe, each with its name in the legend, through the logarithms of its errors."""
    assert drawn.startswith("<?xml")
    for name in expected:
        assert drawn.count(f"<!-- {name} -->") == 1
    lines: dict[str, list[list[float]]] = {}
    for path in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}path"):
        drawing = path.get("d", "")
        if path.get("clip-path") and drawing.count("L") == 2:  # grid lines have one, and areas more
            points = re.split("[ML]", drawing)[1:]
            lines[path.get("style", "")] = [[float(place) for place in point.split()] for point in points]
    assert len(lines) == len(expected), "each in a style of its own"
    (x, y), errors = np.moveaxis(np.array([*lines.values()]), 2, 0), np.array([*expected.values()])
    np.testing.assert_allclose(np.diff(x), x[0, 1] - x[0, 0], rtol=1e-5)
    slope, offset = np.polyfit(np.log(errors).flatten(), y.flatten(), 1)
    assert slope < 0, "down the page"
    np.testing.assert_allclose(slope * np.log(errors) + offset, y, rtol=1e-5)


def test_on_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mezzotint.cli.app import app

    def run(*arguments: str) -> Answer:
        result = CliRunner().invoke(app, ["inspect", str(TINY_LLAMA), "--drift", "--bits", "3", *SMALL, *arguments])
        return Answer(result.exit_code, result.stdout, result.stderr)

    plot = tmp_path / "drift.svg"
    answer = run("--recipe", "rtn", "--recipe", "gptq", "--blocks", "1", "--plot", str(plot), "--json")
    assert answer.code == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert [one["recipe"] for one in found["drift"]] == ["rtn", "gptq"]
    assert all(len(one["absolute"]) == len(one["relative"]) == 3 for one in found["drift"])
    check_lines(plot.read_text(encoding="utf-8"), {one["recipe"]: one["relative"] for one in found["drift"]})
    shown = run("--recipe", "rtn", "--blocks", "1")
    assert "the first 1 blocks are quantized" in " ".join(shown.stdout.split())
    assert f"{found['drift'][0]['relative'][2]:.3%}" in shown.stdout
    for wrong, part in ((("--plot", "x.txt"), "must end in .png"), (("--plot", "no/such.png"), "does not exist")):
        refused = run(*wrong)
        assert refused.code == 2
        assert part in refused.stderr
