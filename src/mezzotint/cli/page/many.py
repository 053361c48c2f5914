"""The page that compares several quantized folders."""

from collections.abc import Sequence

from mezzotint.cli.page.charts import Line, Whisker, line_chart, whiskers
from mezzotint.cli.page.document import document
from mezzotint.cli.page.markup import Markup, code, number, seconds, section, size, table, tag, text
from mezzotint.report.compare import Compared, Pair


def comparison(found: Sequence[Compared], pairs: Sequence[Pair]) -> str:
    """The page of a comparison; every folder is held against the first."""
    models = dict.fromkeys(one.report["model"] for one in found)
    subtitle = f"{len(found)} quantizations, each compared with {found[0].name}"
    sections = [_overview(found), *_losses(found), _differences(found, pairs), _drift(found), _commands(found)]
    return document(", ".join(models), subtitle, sections, found[0].report["mezzotint"])


def _overview(found: Sequence[Compared]) -> Markup:
    rows = []
    for one in found:
        error = one.drift[-1] if one.drift else None
        rows.append(
            [
                text(one.name) + tag("small", text(f" {one.report['recipe']['name']}")),
                number(one.report["bits_per_weight"], 3),
                text(size(one.report["output_bytes"])),
                text("–" if error is None else f"{error:.2%}"),
                text(seconds(one.report["seconds"])),
                text(size(one.report["peak_rss_bytes"])),
            ]
        )
    columns = ("folder", "bits per weight", "size", "last block", "time", "memory")
    note = "Last block: error of the hidden states after it, on held-out text."
    return section("Overview", table(columns, rows), note=note)


def _losses(found: Sequence[Compared]) -> list[Markup]:
    sections = []
    for name in dict.fromkeys(name for one in found for name in one.results["texts"]):
        there = [(one, one.results["texts"][name]) for one in found if name in one.results["texts"]]
        rows = [
            [
                text(one.name),
                number(measured["kl_nats"], 4, measured["kl_stderr"]),
                number(measured["perplexity"], 3, measured["perplexity_stderr"]),
                number(measured["reference_perplexity"], 3),
                "–" if measured["top1_agreement"] is None else text(f"{measured['top1_agreement']:.1%}"),
            ]
            for one, measured in there
        ]
        parts = [table(("folder", "KL, nats/token", "perplexity", "original", "same top token"), rows)]
        known = [(one, measured) for one, measured in there if measured["kl_nats"] is not None]
        bits = [one.report["bits_per_weight"] for one, _ in known]
        if bits and max(bits) - min(bits) > 0.05:  # else they differ by what scales take, and a picture says nothing
            lines = [
                Line(name=one.name, points=[(one.report["bits_per_weight"], measured["kl_nats"])], dots=True)
                for one, measured in known
            ]
            parts.append(
                line_chart(
                    lines,
                    label="KL divergence against stored bits",
                    x="bits per weight",
                    y="KL, nats per token",
                    x_format=lambda value: f"{value:.2f}",
                    y_format=lambda value: f"{value:.2g}",
                )
            )
        sections.append(section(f"On {name}", *parts, note="± is a standard error over windows."))
    return sections


def _differences(found: Sequence[Compared], pairs: Sequence[Pair]) -> Markup:
    if not pairs:
        told = (
            "The folders have no results on the same windows or questions. Run this on each folder, with "
            "the same arguments:"
        )
        return section(
            "Differences", code("mezzotint evaluate FOLDER --against MODEL --text FILE --keep-results"), note=told
        )
    parts = []
    for measure, on in dict.fromkeys((pair.measure, pair.on) for pair in pairs):
        rows = [
            Whisker(name=pair.first, value=pair.difference.mean, low=pair.difference.low, high=pair.difference.high)
            for pair in pairs
            if (pair.measure, pair.on) == (measure, on)
        ]
        heading = tag("h3", text(f"{measure} on {on}"))
        chart = whiskers(rows, label=measure, value_format=lambda value: f"{value:+.4f}".replace("-", "−"))
        parts.append(heading + chart)
    note = (
        f"Difference from {found[0].name} over the same windows or questions, with 95 % confidence intervals. If the "
        "interval does not contain zero, the difference is significant. KL and perplexity: lower is better. Scores: "
        "higher is better."
    )
    return section("Differences", *parts, note=note)


def _drift(found: Sequence[Compared]) -> Markup:
    lines = [
        Line(name=one.name, points=[(float(block), error) for block, error in enumerate(one.drift)])
        for one in found
        if one.drift
    ]
    if not lines:
        return ""
    chart = line_chart(
        lines,
        label="error of the hidden states after each block",
        x="block",
        y="squared difference over the square of the original's",
        x_format=lambda value: f"{value:.0f}",
        y_format=lambda value: f"{value:.3g}",
        log=True,
    )
    return section("Error after each block", chart, note="Held-out error of the hidden states after each block.")


def _commands(found: Sequence[Compared]) -> Markup:
    return section("Commands", code("\n".join(one.report["command"] for one in found)))
