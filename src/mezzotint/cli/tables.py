"""Tables and progress bars on the terminal."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

__all__ = [
    "bar", "escape", "progress", "show_evaluation", "show_plan", "show_recipes", "show_result", "size",
]  # fmt: skip


def size(nbytes: int | float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    )


@contextmanager
def bar(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """One progress bar; gives a function of done and total."""
    with _bars(console) as bars:
        task = bars.add_task(title, total=None, note="")
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def progress(console: Console) -> Iterator[Callable[[Any], Any]]:
    """One bar per stage of a run: time left, memory, the last matrix and the last block's error; gives events back."""
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    )
    with bars:
        tasks: dict[str, Any] = {}
        behind = ""

        def listen(event: Any) -> Any:
            nonlocal behind
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, note="")
            record = event.record
            relative = getattr(record, "relative_error", None)
            if relative is not None:
                behind = f"block {record.index}: held-out error {relative:.2%}"
            parts = [
                None if event.seconds_left is None else f"{duration(event.seconds_left)} left",
                None if event.memory_bytes is None else size(event.memory_bytes),
                None if record is None else behind,
                getattr(record, "name", None),
            ]
            note = " | ".join(part for part in parts if part)
            bars.update(tasks[event.stage], completed=event.done, total=event.total, note=note)
            return event

        yield listen


def duration(seconds: float) -> str:
    """Seconds for people: ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_plan(planned: Any, console: Console) -> None:
    """The plan by kind of matrix, then totals."""
    from mezzotint.allocation.knapsack import ALLOCATED  # scipy takes half a second

    plan = planned.plan
    table = Table(title=f"plan: recipe {planned.request.recipe.name} for {planned.request.model.name}")
    for column in ("matrices", "method", "bits/weight", "chosen by"):
        table.add_column(column, justify="right" if column == "bits/weight" else "left", overflow="fold")
    for names, entry in _alike(plan.entries):
        rows, columns = planned.shapes[entry.matrix]
        stages = (entry.target, entry.grid, entry.rounding, entry.curvature, entry.refinement)
        how = ", ".join(_short(stage) for stage in stages if stage is not None)
        stored = "see below"
        if entry.because != ALLOCATED:
            stored = f"{entry.bits.total / (rows * columns):.3f}"
        table.add_row(names, how, stored, entry.because)
    console.print(table)
    for name, reason in _alike_kept(plan.kept):
        console.print(f"kept: {escape(name)}: {escape(reason)}", highlight=False)
    for step, names in planned.steps_down.items():
        parts = ", ".join(dict.fromkeys(re.sub(r"^.*?\.\d+\.|\[\d+\]", "", name) for name in names))
        console.print(
            f"simpler: {escape(step.what)}: {escape(step.why)}: {escape(parts)} ({len(names)})", highlight=False
        )
    console.print(
        f"{planned.bits_per_weight:.3f} bits per weight ({planned.bits_per_weight_without_side_data:.3f} without "
        f"scales and zero points), {size(plan.bytes)} in all, format {plan.format} ({planned.because})"
    )
    if planned.importance is not None:
        console.print(f"calibration: importance matrix {planned.importance.name!r}")
    elif planned.calibration is None:
        console.print("calibration: not needed")
    else:
        c = planned.calibration
        console.print(f"calibration: {c.samples} samples of {c.seqlen} tokens from {c.source!r}")
    console.print(f"estimate: {planned.seconds():.0f} s on this machine, {size(plan.peak_memory_bytes)} of memory")


def _alike(entries: Any) -> list[tuple[str, Any]]:
    """Entries that are treated alike, as one line: their names within a block, and how many they are."""
    from mezzotint.allocation.knapsack import ALLOCATED

    groups: dict[tuple[Any, ...], list[Any]] = {}
    for e in entries:
        if e.because == ALLOCATED:  # how many bits each has is another table
            e = replace(e, grid=replace(e.grid, bits=type(e.grid)().bits))
        groups.setdefault((e.grid, e.rounding, e.target, e.curvature, e.refinement, e.because), []).append(e)
    lines = []
    for members in groups.values():
        parts = dict.fromkeys(re.sub(r"^.*?\.\d+\.|\[\d+\]", "", e.matrix) for e in members)
        lines.append((f"{', '.join(parts)} ({len(members)})", members[0]))
    return lines


def _alike_kept(kept: Mapping[str, str]) -> list[tuple[str, str]]:
    groups: dict[tuple[str, str], int] = {}
    for name, reason in kept.items():
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        groups[pattern, reason] = groups.get((pattern, reason), 0) + 1
    return [(f"{name} ({count})" if count > 1 else name, reason) for (name, reason), count in groups.items()]


def _short(stage: Any) -> str:
    """A stage's kind and what differs from its defaults."""
    changed = [
        f"{f.name}={getattr(stage, f.name)}" for f in fields(stage) if getattr(stage, f.name) not in (f.default, None)
    ]
    return " ".join([stage.kind, *changed])


def show_result(result: Mapping[str, Any], console: Console) -> None:
    """What a run made."""
    table = Table(title="quantized")
    table.add_column("what")
    table.add_column("value", justify="right")
    blocks = [b for b in result["blocks"] if b["relative_error"] is not None]
    rows = [
        ("matrices", str(len(result["linears"]))),
        ("bits per weight", f"{result['bits_per_weight']:.3f}"),
        ("without scales and zero points", f"{result['bits_per_weight_without_side_data']:.3f}"),
        ("size of all tensors", size(result["output_bytes"])),
        ("time", f"{result['seconds']:.1f} s ({result['cpu_seconds']:.1f} s of processor time)"),
        ("peak memory", f"{size(result['peak_rss_bytes'])} ({size(result['promised_peak_memory_bytes'])} planned)"),
    ]
    if blocks:
        rows.append(("held-out error of the last block", f"{blocks[-1]['relative_error']:.2%}"))
    measured = [linear for linear in result["linears"] if linear["h_error_held_out"] is not None]
    if measured:
        worst = max(measured, key=lambda linear: linear["h_error_held_out"])
        rows.append(("largest held-out error of a matrix", f"{worst['h_error_held_out']:.2%} ({worst['name']})"))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    alike: dict[tuple[str, str], list[str]] = {}
    for name, decisions in result["decisions"].items():
        for what, why in decisions.items():
            alike.setdefault((what, str(why)), []).append(name)
    for (what, why), names in alike.items():
        where = names[0] if len(names) == 1 else f"{len(names)} matrices"
        console.print(f"{escape(what)} {escape(why)}: {escape(where)}")
    console.print(f"written to {escape(result['out'])}")


def show_evaluation(text: Any | None, tasks: Mapping[str, Any] | None, console: Console) -> None:
    """Perplexities, divergence and scores."""
    if text is not None:
        table = Table(title=f"{text.text}: {text.windows} windows of {text.seqlen} tokens, {text.tokens} predicted")
        table.add_column("measure")
        table.add_column("value", justify="right")
        table.add_column("± stderr", justify="right")
        for name, value, stderr in _text_rows(text):
            table.add_row(name, value, "" if stderr is None else f"{stderr:.4f}")
        console.print(table)
    if tasks is not None:
        table = Table(
            title="tasks: original, quantized, and difference over the same questions (95 % confidence interval)"
        )
        for column in ("task", "metric", "original", "model", "difference", "lost", "gained"):
            table.add_column(column, justify="left" if column in ("task", "metric") else "right")
        for name, task in tasks.items():
            for score in (task, *task.others):
                table.add_row(name, *_score_row(score))
                name = ""
        console.print(table)


def _text_rows(text: Any) -> list[tuple[str, str, float | None]]:
    rows = [("perplexity", f"{text.perplexity:.4f}", text.perplexity_stderr)]
    if text.kl_nats is None:
        return rows
    ratio = text.log_perplexity_ratio
    return [
        *rows,
        ("reference_perplexity", f"{text.reference_perplexity:.4f}", None),
        ("log_perplexity_ratio", f"{ratio:.4f}", text.log_perplexity_ratio_stderr),
        ("kl_nats, mean over tokens", f"{text.kl_nats:.4f}", text.kl_stderr),
        *((f"kl_nats, {name}", f"{value:.4f}", None) for name, value in text.kl_percentiles.items()),
        ("same top token", f"{text.top1_agreement:.2%}", text.top1_stderr),
        ("lost (right in the original only)", f"{text.flips['lost']:.2%}", None),
        ("gained (right in the quantized model only)", f"{text.flips['gained']:.2%}", None),
    ]


def _score_row(score: Any) -> list[str]:
    def shown(value: float | None, stderr: float | None) -> str:
        spread = "" if stderr is None else f" ± {stderr:.4f}"
        return "" if value is None else f"{value:.4f}{spread}"

    change, flips = score.difference, score.flips or {}
    return [
        score.metric,
        shown(score.reference, score.reference_stderr),
        shown(score.value, score.stderr),
        "" if change is None else f"{change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}]",
        *(f"{flips[name]:.2%}" if name in flips else "" for name in ("lost", "gained")),
    ]


def show_comparison(found: Sequence[Any], pairs: Sequence[Any], console: Console) -> None:
    """Folders beside each other, then what can be told apart."""
    texts = dict.fromkeys(text for one in found for text in one.results["texts"])
    table = Table(title="folders")
    for column in ("folder", "recipe", "bits/weight", "size", "seconds", "last block", *texts):
        table.add_column(column, justify="left" if column in ("folder", "recipe") else "right", overflow="fold")
    for one in found:
        row = one.figures()
        error = row["last_block_error"]
        losses = [one.results["texts"].get(text) for text in texts]
        table.add_row(
            row["name"],
            row["recipe"],
            f"{row['bits_per_weight']:.3f}",
            size(row["output_bytes"]),
            f"{row['seconds']:.0f}",
            "-" if error is None else f"{error:.2%}",
            *("-" if loss is None else _loss(loss) for loss in losses),
        )
    console.print(table)
    if not pairs:
        console.print(
            "no differences: run `mezzotint evaluate --keep-results` with the same text or tasks on each folder first"
        )
        return
    table = Table(title="differences over the same windows or questions, with 95 % confidence intervals")
    for column in ("measure", "on", "first", "second", "first minus second", "significant"):
        table.add_column(column, overflow="fold")
    for pair in pairs:
        d = pair.difference
        shown = f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"
        table.add_row(pair.measure, pair.on, pair.first, pair.second, shown, "yes" if d.clear else "no")
    console.print(table)


def _loss(text: Mapping[str, Any]) -> str:
    divergence = "" if text["kl_nats"] is None else f"KL {text['kl_nats']:.4f}, "
    return f"{divergence}perplexity {text['perplexity']:.2f}"


def show_drift(found: Sequence[Any], console: Console) -> None:
    """Relative error of the stream behind every block, a column a recipe."""
    table = Table(title=f"error after each block; the first {found[0].blocks} blocks are quantized")
    table.add_column("block", justify="right")
    for one in found:
        table.add_column(one.recipe, justify="right")
    for index in range(len(found[0].relative)):
        table.add_row(str(index), *(f"{one.relative[index]:.3%}" for one in found))
    console.print(table)


def show_palette(found: Sequence[Any], console: Console) -> None:
    """Every grid, best first at each number of bits."""
    table = Table(title="palette: error on Gaussian weights of unit variance")
    for column in (
        "grid",
        "bits",
        "with scales",
        "error",
        "x bound",
        "decoding, G weights/s",
        "engines",
        " also called",
    ):
        left = column in ("grid", "engines", "also called")
        table.add_column(column, justify="left" if left else "right", no_wrap=column == "grid")
    for one in sorted(found, key=lambda one: (one.bits, one.distortion)):
        error = f"{one.distortion:.4g}", f"{one.ratio_to_bound:.2f}"
        rate = f"{one.decode_rate / 1e9:.2f}"
        names = ", ".join(one.engines), ", ".join(one.aliases)
        table.add_row(one.name, f"{one.bits:g}", f"{one.bits_with_side_data:.3f}", *error, rate, *names)
    console.print(table)


def show_recipes(found: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Names, what they do, their papers."""
    table = Table(title="recipes")
    for column in ("name", "what it does", "paper"):
        table.add_column(column)
    for name, recipe in found.items():
        table.add_row(name, recipe["summary"], recipe["paper"])
    console.print(table)
