"""Commands that look at models: evaluate, inspect, compare."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mezzotint.cli import tables
from mezzotint.cli.app import app, errors, finish
from mezzotint.cli.options import MORE, Asked, Device, Json, Memory, Model, Trust, asks
from mezzotint.errors import ConfigError

if TYPE_CHECKING:
    from mezzotint.evaluation import Evaluation
    from mezzotint.evaluation.tasks import TaskScore

Html = Annotated[
    Path | None, typer.Option("--html", help="Write the report as one HTML file that needs no other file.")
]
Against = Annotated[Path | None, typer.Option("--against", help="Folder of the original model, to compare with.")]


TextOption = Annotated[str | None, typer.Option("--text", help="Text to measure on: a file, or wikitext2, ptb or c4.")]
WindowTokens = Annotated[
    int | None,
    typer.Option(
        "--seqlen",
        help="Tokens per window. The default is 2048, or the longest that the model allows.",
        rich_help_panel=MORE,
    ),
]
WindowCount = Annotated[
    int | None,
    typer.Option(
        "--windows", help="Number of windows, from the start of the text. The default is all.", rich_help_panel=MORE
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder for the last hidden states of the original. The next evaluation reads them.",
        rich_help_panel=MORE,
    ),
]
Products = Annotated[
    str,
    typer.Option(
        "--precision",
        help="Precision of the forward passes: float32, or bfloat16 (twice as fast on CPUs with AMX).",
        rich_help_panel=MORE,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option("--tasks", help="Tasks of lm-eval, e.g. arc_easy,piqa. Needs `pip install mezzotint[eval]`."),
]
TaskPath = Annotated[
    list[Path] | None,
    typer.Option("--task-path", help="Folder with your own lm-eval task files.", rich_help_panel=MORE),
]
Limit = Annotated[
    int | None, typer.Option("--limit", help="Number of questions per task. The default is all.", rich_help_panel=MORE)
]
Shots = Annotated[
    int | None,
    typer.Option("--shots", help="Number of solved examples in each prompt (few-shot).", rich_help_panel=MORE),
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Batch size for tasks.", rich_help_panel=MORE)]
Keep = Annotated[
    bool,
    typer.Option(
        "--keep-results", help="Save the results in the folder, for its model card and for `mezzotint compare`."
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        help="With --html: show how the model, and the one of --against, continue this text.",
        rich_help_panel=MORE,
    ),
]
DriftRecipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", help="With --drift: recipe to measure. Can be given several times.", rich_help_panel=MORE),
]
DriftBlocks = Annotated[
    int, typer.Option("--blocks", help="With --drift: number of blocks to quantize.", rich_help_panel=MORE)
]
DriftPlot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        help="With --drift: draw the errors into a .png or .svg, one line per recipe.",
        rich_help_panel=MORE,
    ),
]


@app.command()
def evaluate(
    *,
    model: Model,
    text: TextOption = None,
    against: Against = None,
    seqlen: WindowTokens = None,
    windows: WindowCount = None,
    cache: Cache = None,
    precision: Products = "float32",
    tasks: Tasks = None,
    task_path: TaskPath = None,
    limit: Limit = None,
    shots: Shots = None,
    batch_size: BatchSize = 8,
    keep_results: Keep = False,
    device: Device = "auto",
    memory: Memory = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, scores in tasks, and with --against the KL divergence from the original."""

    def work() -> dict[str, Any]:
        from mezzotint.evaluation import texts as texts
        from mezzotint.evaluation.scores import evaluate_tasks
        from mezzotint.recipes.request import parse_bytes, resolve_device

        if text is None and tasks is None:
            raise ConfigError("evaluate has nothing to measure. Give --text FILE, --tasks NAMES, or both.")
        _idle("--text", text, {"--seqlen": seqlen, "--windows": windows, "--cache": cache})
        _idle("--tasks", tasks, {"--task-path": task_path or None, "--limit": limit, "--shots": shots})
        if keep_results:
            _check_results(model)
        common: dict[str, Any] = {
            "against": against,
            "device": resolve_device(device),
            "memory": None if memory is None else parse_bytes(memory),
            "trust_remote_code": trust_remote_code,
        }
        result, scores = None, None
        if text is not None:
            with tables.bar(errors, "evaluating") as progress:
                result = texts.evaluate(
                    model,
                    text,
                    seqlen=seqlen,
                    windows=windows,
                    cache=cache,
                    precision=precision,
                    progress=progress,
                    **common,
                )
        if tasks is not None:
            scores = evaluate_tasks(
                model, [name.strip() for name in tasks.split(",") if name.strip()], task_path=task_path or (),
                limit=limit, shots=shots, batch_size=batch_size, show_progress=errors.is_terminal, **common,
            )  # fmt: skip
        return _told(model, result, scores, against and against.name, keep=keep_results, as_json=as_json)

    finish(work, as_json)


@app.command()
@asks
def inspect(
    *,
    folder: Annotated[
        Path, typer.Argument(help="Quantized folder. With --drift: the original model.", show_default=False)
    ],
    html: Html = None,
    every: Annotated[bool, typer.Option("--all", help="List every matrix, not one line per block.")] = False,
    prompt: Prompt = None,
    against: Against = None,
    drift: Annotated[
        bool,
        typer.Option(
            "--drift",
            help="Quantize only the first blocks, and measure the error after every block.",
            rich_help_panel=MORE,
        ),
    ] = False,
    recipe: DriftRecipes = None,
    blocks: DriftBlocks = 10,
    plot: DriftPlot = None,
    asked: Asked,
    as_json: Json = False,
) -> None:
    """Show the report of a quantized folder: bits, errors, size and time. --drift: how errors grow over the blocks."""

    def work() -> dict[str, Any]:
        if not drift:
            return _inspected(folder, html, prompt, against, device=asked.device, every=every, as_json=as_json)
        from mezzotint.cli.plots import check_plot, plot_drift
        from mezzotint.jobs.drift import measure_drift

        check_plot(plot)
        requests = [asked.request(folder, name, "dense") for name in recipe or ("rtn", "qep-rtn")]
        with tables.bar(errors, "measuring drift") as progress:
            found = measure_drift(requests, blocks, progress)
        if plot is not None:
            plot_drift(found, plot)
        if not as_json:
            tables.show_drift(found, Console())
        return {"drift": [asdict(one) for one in found], "plot": None if plot is None else str(plot)}

    finish(work, as_json)


@app.command()
def compare(
    *,
    folders: Annotated[list[Path], typer.Argument(help="Two or more quantized folders.", show_default=False)],
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Compare quantized folders: size, time, and results of `evaluate --keep-results` with confidence intervals."""

    def work() -> dict[str, Any]:
        from mezzotint.cli.page import check_page, comparison, write_page
        from mezzotint.report.compare import compare as run

        check_page(html)
        found, pairs = run(folders)
        if html is not None:
            write_page(html, comparison(found, pairs))
        if not as_json:
            tables.show_comparison(found, pairs, Console())
        return {"folders": [one.figures() for one in found], "differences": [pair.figures() for pair in pairs]}

    finish(work, as_json)


def _check_results(folder: Path) -> None:
    """Refuse before the work to add to results that cannot be read.

    Raises:
        ConfigError: there is no folder.
        ModelError: the results in it are damaged.
    """
    from mezzotint.report.results import read_results

    if not folder.is_dir():
        raise ConfigError(
            f"--keep-results cannot write into {str(folder)!r}: this is not a folder. "
            "Give a folder, or leave --keep-results out."
        )
    read_results(folder)


def _told(
    model: Path,
    text: "Evaluation | None",
    tasks: "dict[str, TaskScore] | None",
    against: str | None,
    *,
    keep: bool,
    as_json: bool,
) -> dict[str, Any]:
    """Keep and show what was measured; gives it for JSON."""
    if keep:
        from mezzotint.report import card, results

        results.keep_results(model, text=text, tasks=tasks, against=against)
        card.update_card(model)
    if not as_json:
        tables.show_evaluation(text, tasks, Console())
    found = {} if text is None else text.figures()
    return found if tasks is None else {**found, "tasks": {name: score.figures() for name, score in tasks.items()}}


def _idle(option: str, value: object | None, others: dict[str, object | None]) -> None:
    """Refuse what depends on an option that is not given.

    Raises:
        ConfigError: names one of them.
    """
    for name, given in others.items():
        if value is None and given is not None:
            raise ConfigError(f"{name} does nothing without {option}. Give both, or leave {name} out.")


def _inspected(
    folder: Path,
    html: Path | None,
    prompt: str | None,
    against: Path | None,
    *,
    device: str,
    every: bool,
    as_json: bool,
) -> dict[str, Any]:
    from mezzotint.cli.page import check_page, single, write_page
    from mezzotint.report.report import read_report

    check_page(html)
    _idle("--html", html, {"--prompt": prompt})
    report = read_report(folder)
    if html is not None:
        from mezzotint.jobs.samples import Sample, write_samples
        from mezzotint.recipes.request import resolve_device
        from mezzotint.report.results import read_results

        written: Sequence[Sample] = ()
        if prompt is not None:
            models = [folder] if against is None else [against, folder]
            written = write_samples(models, prompt, device=resolve_device(device))
        write_page(html, single(folder.absolute().name, report, read_results(folder), prompt, written))
    if not as_json:
        from mezzotint.cli.inspected import show_report

        show_report(report, Console(), every=every)
    return report
