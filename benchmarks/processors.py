"""Seconds of results that several processors took."""

from collections import Counter
from typing import Any


def usual_of(results: list[dict[str, Any]]) -> str:
    """The processor that took most of the results."""
    return Counter(result["machine"]["processor"] for result in results).most_common(1)[0][0]


def seconds_of(result: dict[str, Any], usual: str) -> str:
    """Seconds of processor of a quantization; with a star where the usual processor has not taken them."""
    star = "" if result["machine"]["processor"] == usual else r"\*"
    return f"{result['quantize']['cpu_seconds']:.0f}{star}"


def named(results: list[dict[str, Any]]) -> str:
    """The usual processor, and what a star stands for."""
    usual = usual_of(results)
    others = " or ".join(sorted({result["machine"]["processor"] for result in results} - {usual}))
    return f"{usual}; with a star, of {others}." if others else f"{usual}."
