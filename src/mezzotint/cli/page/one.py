"""The page of one quantized folder."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mezzotint.cli.page.charts import Cell, Line, bars, heat_map, line_chart
from mezzotint.cli.page.document import document
from mezzotint.cli.page.markup import Markup, code, facts, number, seconds, section, size, table, tag, text
from mezzotint.cli.page.measured import measured
from mezzotint.report.command import recipe_yaml

Report = Mapping[str, Any]
_INSIDE = re.compile(r"^.*?\.(\d+)\.(.*)$")
_EXPERT = re.compile(r"\.\d+\.|\[\d+\]")


def single(name: str, report: Report, results: Mapping[str, Any], prompt: str | None, samples: Sequence[Any]) -> str:
    """The page of a folder.

    Args:
        name: of the folder.
        report: its ``mezzotint.json``.
        results: what was measured of it and kept.
        prompt: that the samples go on from.
        samples: what models wrote.
    """
    recipe = report["recipe"]
    subtitle = f"{name} · recipe {recipe['name']} · format {report['plan']['format']}"
    sections = [
        _headline(report, results),
        _sizes(report),
        measured(results),
        _bits(report),
        _errors(report),
        _drift(report),
        frontier(report.get("allocation")),
        _samples(prompt, samples),
        _costs(report),
        _decisions(report),
        _repeat(report),
    ]
    return document(report["model"], subtitle, sections, report["mezzotint"])


def role_of(matrix: str) -> tuple[int | None, str]:
    """Block and role of a matrix; experts of a block share one role.

    Example:
        >>> role_of("model.layers.3.mlp.experts.7.up_proj")
        (3, 'mlp.experts.up_proj')
    """
    found = _INSIDE.match(matrix)
    if found is None:
        return None, matrix
    return int(found[1]), _EXPERT.sub(lambda m: "." if m[0].startswith(".") else "", found[2])


def frontier(allocation: Mapping[str, Any] | None) -> Markup:
    """Loss against size of an allocation, and what was chosen; nothing where there was none."""
    if allocation is None:
        return ""
    points = [*allocation["frontier"], {**allocation["chosen"], "kind": "chosen"}]
    lines = [
        Line(
            name=kind,
            points=sorted((p["bytes"] / 2**20, float(p["predicted_kl_nats"])) for p in points if p["kind"] == kind),
            dots=kind != "allocated",
        )
        for kind in dict.fromkeys(point["kind"] for point in points)
    ]
    chart = line_chart(
        lines,
        label="predicted loss against size",
        x="size",
        y="predicted KL, nats per token",
        x_format=lambda value: f"{value:.4g} MiB",
        y_format=lambda value: f"{value:.2g}",
        log=True,
    )
    note = (
        "Predicted loss at each size, with allocated bits and with the same bits everywhere. It is "
        "computed from measured sensitivities."
    )
    if "held_out_kl_nats" in allocation:
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in allocation["held_out_kl_nats"].items())
        note += f" Measured on held-out text: KL {losses}. The result with {allocation['kept']} bits was kept."
    return section("Size against loss", chart, note=note)


def _headline(report: Report, results: Mapping[str, Any]) -> Markup:
    before, after = report["original_bytes"], report["output_bytes"]
    without = report["bits_per_weight_without_side_data"]
    shown = [
        ("bits per weight", f"{report['bits_per_weight']:.2f}", f"{without:.2f} for codes, the rest for scales"),
        ("size", size(after), f"{after / before:.0%} of {size(before)}"),
    ]
    for name, one in results["texts"].items():
        if one["kl_nats"] is not None:
            shown.append(("KL from the original", f"{one['kl_nats']:.3f}", f"nats per token of {name}"))
            shown.append(("perplexity", f"{one['perplexity']:.2f}", f"{one['reference_perplexity']:.2f} before"))
            break
    shown.append(("made in", seconds(report["seconds"]), f"at most {size(report['peak_rss_bytes'])} of memory"))
    return facts(shown)


def _sizes(report: Report) -> Markup:
    linears = report["plan"]["linears"]
    weights = sum(one["shape"][0] * one["shape"][1] for one in linears)
    side_bits = report["bits_per_weight"] - report["bits_per_weight_without_side_data"]
    codes, side = (bits * weights / 8 for bits in (report["bits_per_weight_without_side_data"], side_bits))
    after, before = float(report["output_bytes"]), float(report["original_bytes"])
    parts = ("codes", "scales and zero points", "not quantized")
    kept = max(0.0, after - codes - side)
    if report["plan"]["format"] == "dense":
        rows = [("quantized", [(parts[2], after)], size(after))]
        note = (
            "The folder holds dequantized weights, so it is not smaller. Packed weights would take the "
            "bits named above."
        )
        return section("Size", bars([("original", [(parts[2], before)], size(before)), *rows], label="size"), note=note)
    rows = [
        ("original", [(parts[2], before)], size(before)),
        ("quantized", [(parts[0], codes), (parts[1], side), (parts[2], kept)], size(after)),
    ]
    note = f"{weights / 1e6:,.1f} million weights in {len(linears)} matrices were quantized."
    if report["plan"]["kept"]:
        note += " Embeddings, norms and matrices kept by a rule are unchanged."
    return section("Size", bars(rows, label="size", parts=parts), note=note)


def _bits(report: Report) -> Markup:
    bits = {one["name"]: one["bits_per_weight"] for one in report["linears"]}
    low, high = math.floor(min(bits.values())), math.ceil(max(bits.values()))
    if high - low < 2:  # nearly one width: neither end of the scale
        low, high = low - 1, high + 1
    chart = _map(
        bits,
        tone=lambda value: (value - low) / (high - low),
        words=lambda value: f"{value:.2f} bits",
        label="bits per weight of every matrix",
        legend=(f"{low} bits", f"{high} bits"),
        kept=[name for name in report["plan"]["kept"] if role_of(name)[0] is not None],
    )
    because = dict.fromkeys(one["because"] for one in report["plan"]["linears"])
    note = f"Stored bits per weight, scales included. Chosen by {', '.join(because)}."
    return section("Bits", chart, note=note)


def _errors(report: Report) -> Markup:
    def mean(values: list[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return math.fsum(there) / len(there) if there else None

    measures = ("weight_error", "h_error", "h_error_held_out")
    roles: dict[str, list[Mapping[str, Any]]] = {}
    for one in report["linears"]:
        roles.setdefault(role_of(one["name"])[1], []).append(one)
    rows = []
    for role, members in roles.items():
        means = [mean([one[measure] for one in members]) for measure in measures]
        rows.append([text(short_role(role)), *("–" if m is None else _percent(m) for m in means), text(len(members))])
    columns = ("role", "weight", "output", "output, held out", "matrices")
    inside = [table(columns, rows)]
    held_out = {one["name"]: one["h_error_held_out"] for one in report["linears"] if one["h_error_held_out"]}
    note = (
        "Squared error divided by energy: of the weights, of the outputs on calibration text, and of the "
        "outputs on held-out text."
    )
    if held_out:
        logs = sorted(map(math.log, held_out.values()))
        # a few outliers must not take all tones
        low, high = logs[len(logs) // 20], logs[-1 - len(logs) // 20]
        seen = {one["name"]: one["h_error"] for one in report["linears"]}
        chart = _map(
            held_out,
            tone=lambda value: min(1.0, max(0.0, (math.log(value) - low) / (high - low or 1.0))),
            words=lambda value: f"{_percent(value)} held out",
            label="held-out error of every matrix",
            legend=(_percent(math.exp(low)), _percent(math.exp(high))),
            further=lambda name: f", {_percent(seen[name])} in sample",
        )
        inside.insert(0, chart)
        note = f"Darker means a larger output error on held-out text. {note}"
    return section("Errors", *inside, note=note)


def _drift(report: Report) -> Markup:
    points = [(float(b["index"]), b["relative_error"]) for b in report["blocks"] if b["relative_error"] is not None]
    if not points:
        return ""
    chart = line_chart(
        [Line(name="held-out error", points=points)],
        label="error of the hidden states after each block",
        x="block",
        y="squared difference over the square of the original's",
        x_format=lambda value: f"{value:.0f}",
        y_format=lambda value: f"{100 * value:.3g}%",
    )
    note = "Error of the hidden states after each block, relative to the original, on held-out text."
    return section("Error after each block", chart, note=note)


def _samples(prompt: str | None, samples: Sequence[Any]) -> Markup:
    if not samples:
        return ""
    shown = [
        tag("blockquote", tag("cite", text(sample.model)), tag("b", text(prompt)), text(sample.text))
        for sample in samples
    ]
    note = "Greedy decoding. One text says little about a model; use the measures above."
    return section("Generated text", tag("div", *shown, class_="samples"), note=note)


def _costs(report: Report) -> Markup:
    stages = [(name, [(name, spent)], seconds(spent)) for name, spent in report["times"].items()]
    roles: dict[str, float] = {}
    for one in report["linears"]:
        role = short_role(role_of(one["name"])[1])
        roles[role] = roles.get(role, 0.0) + one["seconds"]
    solving = [(f"solving {role}", [(role, spent)], seconds(spent)) for role, spent in roles.items()]
    promised = report["promised_peak_memory_bytes"]
    machine = report["machine"]
    note = (
        f"{seconds(report['seconds'])}, {seconds(report['cpu_seconds'])} of processor time, on "
        f"{machine['cores']} cores "
        f"({machine['device']}). At most {size(report['peak_rss_bytes'])} of memory; the plan predicted "
        f"{size(promised)}."
    )
    return section("Time and memory", bars([*stages, *solving], label="time"), note=note)


def _decisions(report: Report) -> Markup:
    alike: dict[tuple[str, str], int] = {}
    for found in report["decisions"].values():
        for what, why in found.items():
            key = what, why if isinstance(why, str) else f"{why:.4g}"
            alike[key] = alike.get(key, 0) + 1
    if not alike:
        return ""
    rows = [[text(what), text(why), text(many)] for (what, why), many in sorted(alike.items())]
    note = "Steps that were kept or rejected, by their error on held-out text."
    return section("Decisions", table(("what", "decision", "matrices"), rows, left=2), note=note)


def _repeat(report: Report) -> Markup:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [code(report["command"]), tag("p", text("The recipe:")), code(recipe_yaml(report["recipe"]))]
    # reports of older versions have no objectives
    shown = [m for m in _MEASURES if any(one.get(m) is not None for one in report["linears"])]
    names = [
        [text(one["name"]), number(one["bits_per_weight"], 3), *(_scientific(one.get(m)) for m in shown)]
        for one in report["linears"]
    ]
    columns = ("matrix", "bits", *(_MEASURES[m] for m in shown))
    every = tag("details", tag("summary", text(f"All {len(names)} matrices")), table(columns, names))
    note = f"Seed {report['seed']}; mezzotint {report['mezzotint']}, {versions}."
    return section("Reproduce", *parts, every, note=note)


_MEASURES = {
    "weight_error": "weight error",
    "h_error": "error",
    "h_error_held_out": "held out",
    # below 0 if a matrix corrects more of the earlier error than it adds
    "objective": "with earlier errors",
    "objective_held_out": "held out",
}


def _map(
    values: Mapping[str, float],
    *,
    tone: Callable[[float], float],
    words: Callable[[float], str],
    label: str,
    legend: tuple[str, str],
    further: Callable[[str], str] = lambda _: "",
    kept: Sequence[str] = (),
) -> Markup:
    """Blocks by roles; of experts that share a place, their mean."""
    places: dict[tuple[str, int], list[str]] = {}
    for name in (*values, *(name for name in kept if name not in values)):
        block, role = role_of(name.removesuffix(".weight"))
        if block is not None:
            places.setdefault((role, block), []).append(name)
    blocks = 1 + max((block for _, block in places), default=0)
    rows: dict[str, list[Cell | None]] = {}
    for (role, block), names in places.items():
        row = rows.setdefault(short_role(role), [None] * blocks)
        there = [values[name] for name in names if name in values]
        if there:
            mean = math.fsum(there) / len(there)
            title = f"{names[0]}: {words(mean)}" + (
                further(names[0]) if len(names) == 1 else f" ({len(names)} experts)"
            )
            row[block] = Cell(title=title, tone=tone(mean))
        else:
            row[block] = Cell(title=f"{names[0]}: not quantized", tone=None)
    return heat_map({name: row for name, row in rows.items() if any(row)}, label=label, legend=legend)


def short_role(role: str) -> str:
    """``self_attn.q_proj`` -> ``q``; longer roles keep what tells them apart."""
    return re.sub(r"^(self_attn|attn|attention|mlp|feed_forward)\.", "", role).removesuffix("_proj")


def _percent(value: float) -> str:
    return f"{value:.2%}" if value == 0 or value >= 1e-4 else f"{100 * value:.1e}%"


def _scientific(value: float | None) -> Markup:
    return "–" if value is None else text(f"{value:.2e}")
