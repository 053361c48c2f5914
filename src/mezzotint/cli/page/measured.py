"""Tables of the saved evaluation results of one folder."""

from collections.abc import Mapping
from typing import Any

from mezzotint.cli.page.charts import Whisker, whiskers
from mezzotint.cli.page.markup import Markup, number, section, table, tag, text


def measured(results: Mapping[str, Any]) -> Markup:
    """Texts and tasks; nothing where nothing was kept."""
    parts = [*_texts(results["texts"]), *_tasks(results["tasks"])]
    note = "± is a standard error. Results are valid only if this text was not used for calibration."
    return section("Evaluation", *parts, note=note) if parts else ""


def _texts(texts: Mapping[str, Any]) -> list[Markup]:
    if not texts:
        return []
    rows = []
    for name, one in texts.items():
        rows.append(
            [
                text(name) + tag("small", text(f" {one['windows']} × {one['seqlen']} tokens")),
                number(one["perplexity"], 3, one["perplexity_stderr"]),
                number(one["reference_perplexity"], 3),
                number(one["kl_nats"], 4, one["kl_stderr"]),
                "–" if one["top1_agreement"] is None else text(f"{one['top1_agreement']:.1%}"),
                "–" if one["flips"] is None else text(f"{one['flips']['lost']:.1%} / {one['flips']['gained']:.1%}"),
            ]
        )
    columns = ("text", "perplexity", "original", "KL, nats/token", "same top token", "lost / gained")
    tables = [table(columns, rows)]
    kept = {name: one["kl_percentiles"] for name, one in texts.items() if one["kl_percentiles"]}
    if kept:
        names = list(next(iter(kept.values())))
        spread = [[text(name), *(number(values[part], 3) for part in names)] for name, values in kept.items()]
        tables += [tag("p", text("Percentiles of KL over tokens:"), class_="note"), table(("text", *names), spread)]
    return tables


def _tasks(tasks: Mapping[str, Any]) -> list[Markup]:
    if not tasks:
        return []
    rows = []
    for name, one in tasks.items():
        flips = one["flips"]
        rows.append(
            [
                text(name) + tag("small", text(f" {one['metric']}, {one['count']} questions")),
                number(one["reference"], 4, one["reference_stderr"]),
                number(one["value"], 4, one["stderr"]),
                "–" if flips is None else text(f"{flips['lost']:.1%} / {flips['gained']:.1%}"),
            ]
        )
    parts = [table(("task", "original", "quantized", "lost / gained"), rows)]
    changes = [
        Whisker(name=name, value=change["mean"], low=change["low"], high=change["high"])
        for name, change in ((name, one["difference"]) for name, one in tasks.items())
        if change is not None
    ]
    if changes:
        told = "Difference from the original over the same questions, with 95 % confidence intervals:"
        chart = whiskers(changes, label="difference", value_format=lambda value: f"{value:+.3f}".replace("-", "−"))
        parts += [tag("p", text(told), class_="note"), chart]
    return parts
