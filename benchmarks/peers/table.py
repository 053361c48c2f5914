"""The tables of docs/peers.md."""

import json
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.processors import named, seconds_of, usual_of

HERE = Path(__file__).resolve().parent
HEADING = (
    "| who | method | stored bits | KL | perplexity | seconds of processor | peak memory, MiB |",
    "|---|---|---|---|---|---|---|",
)
LIBRARIES = ("torch", "transformers", "numpy")


def line(result: dict[str, Any], usual: str) -> str:
    """A row of the table; seconds that the usual processor has not taken get a star."""
    row = result["settings"]["row"]
    who = f"**{row['peer']}**" if row["peer"] == "mezzotint" else row["peer"]
    if result["status"] == "failed":
        return f"| {who} | {row['method']} | | failed: {result['message']} | | | |"
    e, q = result["evaluate"], result["quantize"]
    quality = f"{e['kl_nats']:.3f} ± {e['kl_stderr']:.3f} | {e['perplexity']:.1f}"
    cost = f"{seconds_of(result, usual)} | {q['peak_rss_bytes'] / 2**20:.0f}"
    return f"| {who} | {row['method']} | {q['bits_per_weight']:.3f} | {quality} | {cost} |"


def by_divergence(result: dict[str, Any]) -> float:
    """Failures last."""
    return result["evaluate"]["kl_nats"] if result["status"] == "done" else float("inf")


def measured(results: list[dict[str, Any]], config: dict[str, Any]) -> list[str]:
    """Every quantizer at every width, the failed ones too; what nobody has run yet is named."""
    lines, usual = [], usual_of(results)
    for bits in sorted(config["bits"], reverse=True):
        here = [r for r in results if r["settings"]["row"]["bits"] == bits]
        lines += ["", f"### {bits} bits"]
        lines += ["", *HEADING, *(line(r, usual) for r in sorted(here, key=by_divergence))] if here else []
        ran = [(r["settings"]["row"]["peer"], r["settings"]["row"]["method"]) for r in here]
        left = [f"{r['peer']} {r['method']}" for r in config["rows"] if (r["peer"], r["method"]) not in ran]
        lines += ["", f"Not measured yet: {', '.join(left)}."] if left else []
    one = next(r for r in results if r["status"] == "done")
    original = one["evaluate"]["reference_perplexity"]
    heading = (
        f"{one['model']} (perplexity {original:.1f} before), the same 32 x 512 tokens of Wikipedia for all,\n"
        "measured on 16 x 1024 tokens of the WikiText-2 test set, nats a token "
        f"(`python -m benchmarks.peers`). Seconds are of one thread of {named(results)}"
    )
    return [heading, *lines]


def asked_for(results: list[dict[str, Any]], config: dict[str, Any]) -> list[str]:
    """The settings of every row, and the versions."""
    lines = ["### Settings", "", "| who | method | asked for |", "|---|---|---|"]
    lines += [f"| {row['peer']} | {row['method']} | {row['note']} |" for row in config["rows"]]
    ran = [r["quantize"]["versions"] for r in results if r["status"] == "done"]
    versions = {name: number for one in ran for name, number in one.items() if name not in LIBRARIES}
    return [*lines, "", f"Versions: {', '.join(f'{name} {number}' for name, number in sorted(versions.items()))}."]


def blocks() -> tuple[list[str], ...]:
    """Of the committed results."""
    results = json.loads((HERE.parent / "results" / "peers.json").read_text(encoding="utf-8"))
    config = tomllib.loads((HERE / "peers.toml").read_text(encoding="utf-8"))
    return measured(results, config), asked_for(results, config)
