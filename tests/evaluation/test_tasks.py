"""Scores of two models side by side, without lm-eval; tests/evaluation/test_scores.py runs it."""

import importlib.util

import pytest

from mezzotint.errors import ConfigError
from mezzotint.evaluation.tasks import Metric, TaskRun, load_tasks, scored


def run(**metrics: tuple[float, ...]) -> TaskRun:
    made = {
        name: Metric(value=sum(items) / len(items), stderr=0.1, items=items) for name, items in metrics.items() if items
    }
    return TaskRun(count=4, shots=0, digest="same", metrics=made)


def test_the_normalised_metric_comes_first() -> None:
    score = scored(run(acc=(1.0, 0.0, 0.0, 0.0), acc_norm=(1.0, 1.0, 0.0, 0.0)), None)
    assert (score.metric, score.value, [other.metric for other in score.others]) == ("acc_norm", 0.5, ["acc"])
    assert (score.reference, score.difference, score.flips) == (None, None, None)


def test_items_are_paired() -> None:
    score = scored(run(acc=(1.0, 0.0, 0.0, 1.0)), run(acc=(1.0, 1.0, 1.0, 0.0)))
    assert (score.value, score.reference) == (0.5, 0.75)
    assert score.difference is not None
    assert (score.difference.mean, score.difference.count) == (-0.25, 4)
    assert score.flips == {"lost": 0.5, "gained": 0.25}
    figures = score.figures()
    assert figures.keys() >= {"metric", "value", "stderr", "reference"}
    assert "items" not in figures
    assert figures["difference"]["low"] < -0.25 < figures["difference"]["high"]


def test_a_metric_that_is_no_mean_has_no_difference() -> None:
    perplexity = TaskRun(count=4, shots=0, digest="", metrics={"perplexity": Metric(value=7.0, stderr=None)})
    score = scored(perplexity, perplexity)
    assert (score.value, score.reference, score.difference, score.flips) == (7.0, 7.0, None, None)


def test_scores_between_right_and_wrong_have_no_flips() -> None:
    score = scored(run(f1=(0.5, 0.0, 1.0, 1.0)), run(f1=(0.0, 0.0, 1.0, 1.0)))
    assert score.difference is not None
    assert score.flips is None


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval() -> None:
    with pytest.raises(
        ConfigError, match=r"needs lm-eval, which is not installed. Run: pip install 'mezzotint\[eval\]'"
    ):
        load_tasks(["arc_easy"])
