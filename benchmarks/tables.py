"""``python -m benchmarks.tables``: write the tables of the README and the documentation from the committed results."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.peers import table
from benchmarks.processors import named, seconds_of, usual_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a suite's results."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def ranges_of(name: str) -> str:
    """How a suite's ranges were chosen, where it was not the grid's own way."""
    settings = [r["settings"] for r in rows_of(name)]
    squared = any("grid.range_power=2" in (*s.get("common", ()), *s["row"].get("set", ())) for s in settings)
    return "Ranges of integers minimise squared errors (`grid.range_power=2`)." if squared else ""


def recipes(page: str) -> list[str]:
    """Our recipes, and the best other quantizer at every width; ``page`` has all of them."""
    done = sorted((r for r in rows_of("peers") if r["status"] == "done"), key=lambda r: -r["evaluate"]["kl_nats"])
    widths = sorted({r["settings"]["row"]["bits"] for r in done}, reverse=True)
    ours: dict[str, dict[int, str]] = {}
    others: dict[int, str] = {}
    stored: dict[int, float] = {}
    for r in done:  # the best of the others come last, and stay
        row, e = r["settings"]["row"], r["evaluate"]
        loss = f"{e['kl_nats']:.3f} ({e['perplexity']:.1f}"
        if row["peer"] == "mezzotint":
            ours.setdefault(f"`{row['method']}`", {})[row["bits"]] = f"{loss})"
            stored[row["bits"]] = r["quantize"]["bits_per_weight"]
        else:
            others[row["bits"]] = f"{loss}, {row['method']} of {row['peer']})"
    heads = " | ".join(f"{bits} bits ({stored[bits]:.2f} stored)" for bits in widths)
    lines = [f"| recipe | {heads} |", "|---" * (len(widths) + 1) + "|"]
    for name, found in {**ours, "best of other quantizers": others}.items():
        lines.append(f"| {name} | {' | '.join(found.get(bits, '') for bits in widths)} |")
    before = done[0]["evaluate"]["reference_perplexity"]
    heading = (
        f"{done[0]['model']}, groups of 64, calibrated on 32 x 512 tokens of Wikipedia: KL from the original in nats\n"
        f"a token, and perplexity ({before:.1f} before) on 16 x 1024 tokens of the WikiText-2 test set\n"
        f"([all quantizers]({page}), `python -m benchmarks.peers`):"
    )
    return [heading, "", *lines]


def headline() -> list[str]:
    """KL alone: the recipes that people choose from, and the best other quantizer at every width."""
    done = [r for r in rows_of("peers") if r["status"] == "done"]
    widths = sorted({r["settings"]["row"]["bits"] for r in done}, reverse=True)
    losses: dict[str, dict[int, float]] = {}
    for r in done:
        row, loss = r["settings"]["row"], r["evaluate"]["kl_nats"]
        name = f"`{row['method']}`" if row["peer"] == "mezzotint" else "best of five other quantizers"
        found = losses.setdefault(name, {})
        found[row["bits"]] = min(loss, found.get(row["bits"], loss))
    shown = ("`rtn`", "`gptq`", "best of five other quantizers", "`default`", "`palette`")
    lines = [f"| recipe | {' | '.join(f'{bits} bits' for bits in widths)} |", "|---" * (len(widths) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{losses[name][bits]:.3f}' for bits in widths)} |" for name in shown]
    heading = (
        f"KL divergence from the original {done[0]['model']}, in nats per token, on WikiText-2. Lower is better.\n"
        "All results of a column have the same stored bits within 0.05, scales included\n"
        "([settings, perplexity and time of each](docs/peers.md)):"
    )
    return [heading, "", *lines]


def quality() -> list[str]:
    """Loss by method and bits."""
    rows = rows_of("quality")
    rows.sort(key=lambda r: (-r["settings"]["row"]["bits"], r["evaluate"]["kl_nats"]))
    lines = ["| bits | stored | recipe | KL, nats/token | perplexity |", "|---|---|---|---|---|"]
    for r in rows:
        row, e = r["settings"]["row"], r["evaluate"]
        stored = r["quantize"]["bits_per_weight"]
        lines.append(f"| {row['bits']} | {stored:.2f} | {row['name']} | {e['kl_nats']:.3f} | {e['perplexity']:.1f} |")
    original = rows[0]["evaluate"]["reference_perplexity"]
    heading = (
        f"SmolLM2-135M-Instruct (perplexity {original:.1f} before), groups of 64, calibrated on 32 x 512 tokens of "
        "Wikipedia,\nmeasured on 16 x 1024 tokens of the WikiText-2 test set (`python -m benchmarks quality`):"
    )
    return [heading, ranges_of("quality"), "", *lines]


def trellises() -> list[str]:
    """The trellis against the uniform grid at equal stored bits."""
    base = [r for r in rows_of("quality") if r["settings"]["row"]["name"] == "gptq, plain range"]
    rows = sorted(base + rows_of("trellis"), key=lambda r: -r["evaluate"]["kl_nats"])
    lines = ["| stored bits | recipe | KL, nats/token | perplexity |", "|---|---|---|---|"]
    for r in rows:
        e, stored = r["evaluate"], r["quantize"]["bits_per_weight"]
        lines.append(f"| {stored:.2f} | {r['settings']['row']['name']} | {e['kl_nats']:.3f} | {e['perplexity']:.1f} |")
    return ["The trellis on the same model, text and calibration (`python -m benchmarks trellis`):", "", *lines]


def allocations() -> list[str]:
    """Allocated bits against the same bits everywhere."""
    lines = [
        "| recipe | stored bits | KL predicted | KL measured | perplexity |",
        "|---|---|---|---|---|",
    ]
    rows = sorted(rows_of("allocation"), key=lambda r: (r["quantize"]["bits_per_weight"], r["settings"]["row"]["name"]))
    for r in rows:
        e, made = r["evaluate"], r["quantize"]
        chosen = made.get("allocation", {}).get("chosen", {})
        predicted = f"{chosen['predicted_kl_nats']:.3f}" if chosen else ""
        lines.append(
            f"| {r['settings']['row']['name']} | {made['bits_per_weight']:.3f} | {predicted} | {e['kl_nats']:.3f} ± "
            f"{e['kl_stderr']:.3f} | {e['perplexity']:.1f} |"
        )
    heading = (
        "SmolLM2-135M-Instruct, calibrated on 32 x 512 tokens of Wikipedia, measured on 16 x 1024 tokens of "
        "the WikiText-2\ntest set, nats per token (`python -m benchmarks allocation`); without the guard:"
    )
    return [heading, ranges_of("allocation"), "", *lines]


def submodules() -> list[str]:
    """Each part of LPCD alone and all together, by bits, on the small model."""
    found: dict[str, dict[int, float]] = {}
    for r in rows_of("lpcd"):
        row = r["settings"]["row"]
        found.setdefault(row["name"], {})[row["bits"]] = r["evaluate"]["kl_nats"]
    lines = ["| recipe | 4 bits | 3 bits | 2 bits |", "|---|---|---|---|"]
    for name, losses in found.items():
        shown = " | ".join(f"{losses[bits]:.3g}" if bits in losses else "" for bits in (4, 3, 2))
        lines.append(f"| {name} | {shown} |")
    return [
        "stories260k, protocol *screen*, a scale a row: KL in nats per token (`python -m benchmarks lpcd`):",
        ranges_of("lpcd"),
        "",
        *lines,
    ]


def submodules_short() -> list[str]:
    """The same on a larger model, with time and memory; error of each submodule behind the last and the first block."""
    lines = [
        "| recipe | KL | perplexity | seconds of processor | peak memory, MiB | loss of submodules, over before |",
        "|---|---|---|---|---|---|",
    ]
    rows = rows_of("lpcd_short")
    usual = usual_of(rows)
    rows.sort(key=lambda r: ("rtn" in r["settings"]["row"]["name"], -r["evaluate"]["kl_nats"]))
    for r in rows:
        q, e = r["quantize"], r["evaluate"]
        parts: dict[str, list[float]] = {}
        for block in q["blocks"]:
            for part, losses in block["submodules"].items():
                parts.setdefault(part, []).append(losses["after"] / losses["before"])
        ratios = ", ".join(f"{part} {statistics.geometric_mean(found):.2f}" for part, found in parts.items())
        seconds, peak = seconds_of(r, usual), q["peak_rss_bytes"] / 2**20
        shown = f"{e['kl_nats']:.3f} ± {e['kl_stderr']:.3f} | {e['perplexity']:.1f} | {seconds} | {peak:.0f}"
        lines.append(f"| {r['settings']['row']['name']} | {shown} | {ratios} |")
    heading = (
        "SmolLM2-135M-Instruct, protocol *short*, 3 bits in groups of 64 (`python -m benchmarks lpcd_short`);\n"
        "the loss is that of held-out windows, a geometric mean over blocks. Seconds with a star are of another\n"
        "processor, two to three times as slow at this, and busy:"
    )
    return [heading, ranges_of("lpcd_short"), "", *lines]


def generation() -> list[str]:
    """Speed of packed weights."""
    lines = ["| threads | bfloat16, ms/token | packed, ms/token | times faster |", "|---|---|---|---|"]
    rows = rows_of("decoding")
    for r in rows:
        ms = r["milliseconds_per_token"]
        times = f"{ms['bfloat16']:.0f} | {ms['packed']:.0f} | {r['times_faster']:.2f}"
        lines.append(f"| {r['settings']['threads']} | {times} |")
    stored = rows[0]["settings"]["bits_per_weight"]
    heading = (
        f"Generating token by token from a trellis of {stored:.2f} stored bits and from bfloat16, both in "
        "transformers, in one\nrun (`python -m benchmarks.decoding`):"
    )
    return [heading, "", *lines]


def medians(row: dict[str, Any]) -> dict[str, float]:
    """Time and memory of a row's repeated runs."""
    runs = row["quantize"] if isinstance(row["quantize"], list) else [row["quantize"]]
    return {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds", "peak_rss_bytes")}


def costs() -> list[str]:
    """Time and memory."""
    lines = ["| what | seconds | seconds of processor | peak memory, MiB |", "|---|---|---|---|"]
    for r in rows_of("speed"):
        middle = medians(r)
        times = f"{middle['seconds']:.1f} | {middle['cpu_seconds']:.1f}"
        peak = middle["peak_rss_bytes"] / 2**20
        lines.append(f"| {r['settings']['row']['name']}, {r['model']} | {times} | {peak:.0f} |")
    for r in rows_of("memory"):  # a run for its memory: its time is not a measurement
        peak = r["quantize"]["peak_rss_bytes"] / 2**20
        lines.append(f"| {r['settings']['row']['name']}, {r['model']} | | | {peak:.0f} |")
    machine = rows_of("speed")[0]["machine"]
    return [
        f"On {machine['cores']} cores ({machine['processor']}), after imports, medians of repeated runs:",
        "",
        *lines,
    ]


def overhead() -> list[str]:
    """What error propagation takes over plain GPTQ; nothing while it has not been run."""
    rows = rows_of("overhead")
    if not rows:
        return []
    base, machine = medians(rows[0]), rows[0]["machine"]
    lines = ["| recipe | seconds | over gptq | seconds of processor | over gptq |", "|---|---|---|---|---|"]
    for r in rows:
        middle = medians(r)
        cells = [f"{middle[key]:.1f} | {middle[key] / base[key] - 1:.0%}" for key in ("seconds", "cpu_seconds")]
        lines.append(f"| {r['settings']['row']['name']} | {' | '.join(cells)} |")
    heading = (
        "SmolLM2-135M-Instruct at 3 bits in groups of 64, calibrated on 32 x 512 tokens, whole runs on "
        f"{machine['cores']} cores\n({machine['processor']}), medians (`python -m benchmarks overhead`):"
    )
    return [heading, "", *lines]


def bases() -> list[str]:
    """Changes of basis on the small model: KL by recipe, bits and granularity."""
    found: dict[str, dict[tuple[int, str], float]] = {}
    for r in rows_of("basis"):
        row = r["settings"]["row"]
        sizes = [s.partition("=")[2] for s in row.get("set", []) if s.startswith("grid.group_size=")]
        place = row["bits"], "group" if sizes == ["32"] else "channel"
        found.setdefault(row["name"], {})[place] = r["evaluate"]["kl_nats"]
    places = [(bits, size) for size in ("channel", "group") for bits in (4, 3, 2)]
    lines = [
        "| recipe | 4 bits, channel | 3, channel | 2, channel | 4, groups | 3, groups | 2, groups |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in found.items():
        cells = [f"{values[place]:.3f}" if place in values else "" for place in places]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    heading = (
        "KL in nats per token on stories260k, protocol *screen* (`python -m benchmarks basis`), a scale a row "
        "(channel)\nor for 32 columns (groups):"
    )
    return [heading, ranges_of("basis"), "", *lines]


def bases_short() -> list[str]:
    """Changes of basis on a real model."""
    lines = [
        "| bits | stored | recipe | KL, nats/token | perplexity | seconds of processor |",
        "|---|---|---|---|---|---|",
    ]
    for r in sorted(rows_of("basis_short"), key=lambda r: (-r["settings"]["row"]["bits"], r["evaluate"]["kl_nats"])):
        row, e, q = r["settings"]["row"], r["evaluate"], r["quantize"]
        figures = f"{e['kl_nats']:.3f} | {e['perplexity']:.1f} | {q['cpu_seconds']:.0f}"
        lines.append(f"| {row['bits']} | {q['bits_per_weight']:.2f} | {row['name']} | {figures} |")
    heading = "SmolLM2-135M-Instruct, protocol *short*, per channel (`python -m benchmarks basis_short`):"
    return [heading, ranges_of("basis_short"), "", *lines]


def corrections(suite: str, heading: str) -> list[str]:
    """Methods of correction with everything else held fixed, on two texts; nothing while it has not been run."""
    rows = rows_of(suite)
    if not rows:
        return []
    heads = f"| bits | scales | recipe | stored | {losses_heads(rows)} | seconds of processor | peak memory, MiB |"
    lines, usual = [heads, "|---" * (heads.count("|") - 1) + "|"], usual_of(rows)
    first = next(iter(rows[0]["evaluate"]))
    rows.sort(key=lambda r: (-r["settings"]["row"]["bits"], scales_of(r), r["evaluate"][first]["kl_nats"]))
    for r in rows:
        made = r["quantize"]
        row = f"{r['settings']['row']['bits']} | {scales_of(r)} | {r['settings']['row']['name']}"
        costs = f"{seconds_of(r, usual)} | {made['peak_rss_bytes'] / 2**20:.0f}"
        lines.append(f"| {row} | {made['bits_per_weight']:.2f} | {losses_of(r)} | {costs} |")
    return [f"{heading} Seconds are of {named(rows)}", ranges_of(suite), "", *lines]


def losses_heads(rows: list[dict[str, Any]]) -> str:
    """Over the columns of `losses_of`."""
    return " | ".join(f"KL, {text} | perplexity" for text in rows[0]["evaluate"])


def losses_of(result: dict[str, Any]) -> str:
    """Of every text."""
    return " | ".join(
        f"{e['kl_nats']:.3f} ± {e['kl_stderr']:.3f} | {e['perplexity']:.1f}" for e in result["evaluate"].values()
    )


def scales_of(result: dict[str, Any]) -> str:
    """What shares a scale."""
    size = next(s.split("=")[1] for s in result["settings"]["row"]["set"] if s.startswith("grid.group_size="))
    return "a row" if size == "null" else f"groups of {size}"


def all_corrections() -> list[list[str]]:
    """Those of every calibration and size that was run."""
    blocks = (
        corrections(
            "ablation",
            "SmolLM2-135M-Instruct, calibrated on 32 x 512 tokens of Wikipedia, measured on 16 x 1024 of WikiText-2\n"
            "and of C4 (`python -m benchmarks ablation`).",
        ),
        corrections("ablation-c4", "The same, calibrated on C4 (`python -m benchmarks ablation --protocol c4`)."),
        corrections(
            "full",
            "Calibrated on 64 x 1024 tokens of Wikipedia, measured on 40 x 2048 of each text\n"
            "(`python -m benchmarks full`).",
        ),
    )
    return [block for block in blocks if block]


def tokens() -> list[str]:
    """What more calibration is worth to each method; nothing while it has not been run."""
    rows = rows_of("tokens")
    if not rows:
        return []
    heads = f"| recipe | windows | {losses_heads(rows)} | seconds of processor |"
    lines = [heads, "|---" * (heads.count("|") - 1) + "|"]
    for r in sorted(rows, key=lambda r: (r["settings"]["row"]["name"], r["settings"]["row"]["samples"])):
        row = r["settings"]["row"]
        lines.append(f"| {row['name']} | {row['samples']} | {losses_of(r)} | {r['quantize']['cpu_seconds']:.0f} |")
    heading = "SmolLM2-135M-Instruct at 3 bits in groups of 64, by windows of 512 tokens of Wikipedia, one in eight\n"
    return [heading + "held out (`python -m benchmarks tokens`), on a busy machine:", "", *lines]


def screened(suite: str, heading: str) -> list[str]:
    """Losses of the small model by bits and scales, a recipe a row."""
    columns = [(bits, size) for bits in (4, 3, 2) for size in ("null", "32")]
    found: dict[str, dict[tuple[int, str], float]] = {}
    for r in rows_of(suite):
        row = r["settings"]["row"]
        size = next(s.split("=")[1] for s in row["set"] if s.startswith("grid.group_size="))
        found.setdefault(row["name"], {})[row["bits"], size] = r["evaluate"]["kl_nats"]
    titles = " | ".join(f"{bits}, {'a row' if size == 'null' else 'groups'}" for bits, size in columns)
    lines = [f"| recipe | {titles} |", "|---|" + "---|" * len(columns)]
    for name, losses in found.items():
        cells = (f"{losses[column]:.3f}" if column in losses else "" for column in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [heading, ranges_of(suite), "", *lines]


def departures() -> list[str]:
    """What differs between papers and their authors' code."""
    heading = (
        "stories260k, protocol *screen*: papers against their authors' code (`python -m benchmarks departures`). KL in "
        "nats a\ntoken by bits, with a scale a row or for groups of 32 columns:"
    )
    return screened("departures", heading)


def every_range() -> list[str]:
    """Every correction with every range."""
    heading = (
        "stories260k, protocol *screen*: KL in nats per token by bits, with a scale a row or for groups of 32 columns; "
        "`plain` ranges\nminimise the squared error of weights, `weighted` ones that of the inputs' energies "
        "(`python -m benchmarks corrections`).\nNumbers behind `qep` are strength and damping:"
    )
    return screened("corrections", heading)


def gguf_files() -> list[str]:
    """Our GGUF files against those of llama.cpp's quantizer, at equal size."""
    lines = ["| model | size of | bytes | quantizer | KL, nats/token | perplexity |", "|---|---|---|---|---|---|"]
    for r in rows_of("gguf"):
        loss = f"{r['kl_nats']:.4f} ± {r['kl_stderr']:.4f} | {r['perplexity']:.2f}"
        lines.append(f"| {r['model']} | {r['file']} | {r['file_bytes']:,} | {r['quantizer']} | {loss} |")
    return [
        "The types of all tensors are those of llama.cpp's file of that name, made with an importance matrix from the",
        "same calibration windows; llama.cpp runs every file, on held-out text (`python -m benchmarks.gguf`):",
        "",
        *lines,
    ]


def gguf_matrices() -> list[str]:
    """The same of random matrices."""
    path = HERE / "results" / "gguf_matrices.json"
    names = ("ggml, importance matrix", "mezzotint nearest", "mezzotint gptq")
    lines = [f"| type | bits | {' | '.join(names)} |", "|---|---|---|---|---|"]
    for r in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        lines.append(f"| {r['type']} | {r['bits']} | {' | '.join(f'{r[name]:.3g}' for name in names)} |")
    return ["h_error of random matrices, 4096 wide (`python -m benchmarks.gguf_matrices`):", "", *lines]


def bounded() -> list[str]:
    """A large model within a limit; nothing while it has not been run."""
    rows = rows_of("bounded")
    if not rows:
        return []
    lines = [
        "| run | original | limit | promised | measured | seconds of processor |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        q, row = r["quantize"], r["settings"]["row"]
        promised, peak = (q[name] / 2**30 for name in ("promised_peak_memory_bytes", "peak_rss_bytes"))
        sizes = f"{q['original_bytes'] / 1e9:.1f} GB | {row['memory']} | {promised:.2f} GiB | {peak:.2f} GiB"
        lines.append(f"| {row['name']}, {r['model']} | {sizes} | {q['cpu_seconds']:.0f} |")
    return ["Peak memory of a process (`python -m benchmarks bounded`):", "", *lines]


def line_through(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Slope and start of the line of least squares, and the largest distance from it over the largest value."""
    slope, start = statistics.linear_regression(*zip(*points, strict=True))
    worst = max(abs(y - start - slope * x) for x, y in points)
    return slope, start, worst / max(y for _, y in points)


def growth_points() -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """Runs that differ in their number of blocks only, and those that differ in their number of tokens only."""
    rows = rows_of("growth")
    few = {key: min(r["settings"][key] for r in rows) for key in ("blocks", "windows")}
    return {
        "blocks": [(r["settings"]["blocks"], r) for r in rows if r["settings"]["windows"] == few["windows"]],
        "tokens": [
            (r["settings"]["windows"] * r["settings"]["seqlen"], r)
            for r in rows
            if r["settings"]["blocks"] == few["blocks"]
        ],
    }


def growth() -> list[str]:
    """Time and memory against blocks and tokens; nothing while it has not been run."""
    if not rows_of("growth"):
        return []
    lines = ["| blocks | tokens | seconds of processor | peak memory, MiB | promised, MiB |", "|---|---|---|---|---|"]
    fits = []
    for kind, points in growth_points().items():
        for _, r in points:
            s, peak, promised = r["settings"], r["peak_rss_bytes"] / 2**20, r["promised_peak_memory_bytes"] / 2**20
            shown = (
                f"{s['blocks']} | {s['windows'] * s['seqlen']} | {r['cpu_seconds']:.1f} | {peak:.0f} | {promised:.0f}"
            )
            lines += [] if f"| {shown} |" in lines else [f"| {shown} |"]
        slope, start, worst = line_through([(x, r["cpu_seconds"]) for x, r in points])
        fits.append(f"{start:.1f} s + {slope:.3g} s x {kind} (largest distance {worst:.1%})")
    memory = line_through([(x, r["peak_rss_bytes"] / 2**20) for x, r in growth_points()["blocks"]])
    return [
        "Time and memory against blocks and tokens, one thread, in a small shape (`python -m benchmarks.growth`):",
        "",
        *lines,
        "",
        f"Lines of least squares: {'; '.join(fits)}. Peak memory changes by {memory[0]:+.2f} MiB a block.",
        "",
        "![seconds of processor against blocks and tokens](growth.svg)",
    ]


def draw_growth(path: Path) -> None:
    """The same as a picture."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "mezzotint"  # the same picture, the same bytes
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, (kind, points) in zip(figure.subplots(1, 2), growth_points().items(), strict=True):
        seconds = [(x, r["cpu_seconds"]) for x, r in points]
        slope, start, _ = line_through(seconds)
        axes.plot(*zip(*seconds, strict=True), "o")
        ends = [0, max(x for x, _ in seconds)]
        axes.plot(ends, [start + slope * x for x in ends], color="0.6", zorder=0)
        axes.set(xlabel=kind, ylabel="seconds of processor", xlim=(0, None), ylim=(0, None))
    figure.savefig(path, metadata={"Date": None})


def ranks() -> list[str]:
    """The same run by one process and by several; nothing while it has not been run."""
    rows = rows_of("ranks")
    if not rows:
        return []
    alone = rows[0]["quantize"]
    lines = [
        "| ranks | seconds | seconds of processor, busiest rank | over one rank's | load average |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        q = r["quantize"]
        busiest = max(one["cpu_seconds"] for one in q["by_rank"])
        load = " to ".join(f"{value:.1f}" for value in sorted(q["load_average"]))
        times = f"{q['seconds']:.0f} | {busiest:.1f} | {busiest / alone['cpu_seconds']:.0%}"
        lines.append(f"| {len(q['by_rank'])} | {times} | {load} |")
    return [f"QEP with GPTQ on {rows[0]['model']}, protocol *short* (`python -m benchmarks ranks`):", "", *lines]


def latencies() -> list[str]:
    """Predicted against measured time of a token."""
    result = json.loads((HERE / "results" / "latency.json").read_text(encoding="utf-8"))
    lines = ["| allocation | stored bits | predicted, ms | measured, ms | ratio |", "|---|---|---|---|---|"]
    for r in result["rows"]:
        times = f"{r['predicted_ms']:.1f} | {r['measured_ms']:.1f} | {r['ratio']:.2f}"
        lines.append(f"| {r['allocation']} | {r['bits_per_weight']:.2f} | {times} |")
    threads = "one thread" if result["settings"]["threads"] == 1 else f"{result['settings']['threads']} threads"
    constant = result["rows"][0]["constant_ms"]
    what = f"A token of {result['model']} with {threads}, of which {constant:.0f} ms are beside its matrices"
    return [f"{what} (`python -m benchmarks.latency`):", "", *lines]


def filled(text: str, *blocks: list[str]) -> str:
    """The page with its results in place."""
    body = "\n" + "\n\n".join("\n".join(block) for block in blocks) + "\n"
    return re.sub(r"(?<=<!-- results -->).*?(?=<!-- /results -->)", lambda _: body, text, flags=re.DOTALL)


def engines() -> list[str]:
    """What real engines made of what was written for them."""
    rows = rows_of("engines")
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: (r["version"], r["format"], r["bits"])):
        cells.setdefault((row["version"], row["format"], row["bits"]), {})[row["model"]] = row
    lines = [
        f"| engine | format | bits | {' | '.join(models)} | tokens written | over HTTP |",
        f"|---|---|---|{'---|' * len(models)}---|---|",
    ]
    for (version, form, bits), found in cells.items():
        differences = [found[m]["largest_log_probability_difference"] if m in found else None for m in models]
        shown = " | ".join("" if d is None else "0" if d == 0 else f"{d:.2g}" for d in differences)
        written = min(row["tokens_generated"] for row in found.values())
        http = {None: "", True: "yes", False: "no"}[next(iter(found.values()))["http"]]
        lines.append(f"| {version} | {form} | {bits} | {shown} | {written} | {http} |")
    heading = (
        "Largest difference of a log-probability from the dense folder's, in nats, over the tokens of held-out text;\n"
        "tokens that the engine wrote behind it, and whether it was asked through its server (`make test-engines`):"
    )
    return [heading, "", *lines]


def pages() -> dict[Path, tuple[list[str], ...]]:
    """The tables of every page."""
    docs = ROOT / "docs"
    return {
        ROOT / "README.md": (headline(),),
        docs / "propagation.md": tuple(
            block for block in (tokens(), overhead(), departures(), every_range(), *all_corrections()) if block
        ),
        docs / "bases.md": (bases(), bases_short()),
        docs / "allocation.md": (allocations(), latencies()),
        docs / "submodules.md": (submodules(), submodules_short()),
        docs / "long-runs.md": tuple(block for block in (bounded(), growth(), ranks()) if block),
        docs / "engines.md": (engines(),),
        docs / "gguf.md": (gguf_files(), gguf_matrices()),
        docs / "peers.md": table.blocks(),
        docs / "choose.md": (recipes("peers.md"), quality(), trellises(), generation(), costs()),
    }


def main() -> None:
    """Write all tables."""
    for page, blocks in pages().items():
        page.write_text(filled(page.read_text(encoding="utf-8"), *blocks), encoding="utf-8")
    draw_growth(ROOT / "docs" / "growth.svg")


if __name__ == "__main__":
    main()
