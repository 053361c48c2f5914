"""Commands and their arguments."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mezzotint.cli import tables
from mezzotint.cli.options import Asked, Device, Engine, Json, Memory, Model, RecipeName, Trust, asks
from mezzotint.errors import ConfigError, MezzotintError, RunError
from mezzotint.pipeline.request import Request, parse_bytes, resolve_device

app = typer.Typer(
    name="mezzotint",
    help="Make language models smaller: each weight in 2 to 8 bits, with the model's behaviour kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


class Exit(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAILED = 1
    WRONG_REQUEST = 2


@app.command()
@asks
def quantize(
    *,
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", help="Folder to make; must not exist, or be empty.", show_default=False)
    ],
    recipe: RecipeName = "default",
    engine: Engine = None,
    asked: Asked,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model folder into another folder."""

    def work() -> dict[str, Any]:
        from mezzotint.pipeline import budgeted  # torch and transformers take a second to import

        request = asked.request(model, recipe, engine)
        if dry_run:
            return _planned(request, errors if as_json else Console(), None)
        with tables.progress(errors) as listener:
            result = budgeted.quantize(request, out, listener)
        if not as_json:
            tables.show_result(result, Console())
        return result

    finish(work, as_json)


@app.command()
@asks
def plan(
    *,
    model: Model,
    recipe: RecipeName = "default",
    engine: Engine = None,
    asked: Asked,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="With a budget: a .png, .svg or .pdf of size against loss.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what would be done: every matrix, sizes, calibration, memory, time; with a budget, the frontier."""

    def work() -> dict[str, Any]:
        return _planned(asked.request(model, recipe, engine), None if as_json else Console(), plot)

    finish(work, as_json)


@app.command()
def evaluate(
    *,
    model: Model,
    text: Annotated[str, typer.Option("--text", help="A file, or wikitext2, ptb, c4 by name.", show_default=False)],
    against: Annotated[Path | None, typer.Option("--against", help="The original, for the divergence.")] = None,
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", help="Tokens per window (2048 if the model takes it).")
    ] = None,
    windows: Annotated[int | None, typer.Option("--windows", help="Use the first so many windows.")] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Folder that keeps the original's states for the next comparison.")
    ] = None,
    device: Device = "auto",
    memory: Memory = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Perplexity on a text, and the divergence from the original (KL, nats per token)."""

    def work() -> dict[str, Any]:
        from mezzotint.pipeline.evaluate import evaluate as run

        with tables.bar(errors, "evaluating") as progress:
            result = run(
                model, text, against=against, seqlen=seqlen, windows=windows, device=resolve_device(device),
                memory=None if memory is None else parse_bytes(memory), cache=cache,
                trust_remote_code=trust_remote_code, progress=progress,
            )  # fmt: skip
        if not as_json:
            tables.show_evaluation(result, Console())
        return asdict(result)

    finish(work, as_json)


@app.command()
@asks
def inspect(
    *,
    folder: Annotated[
        Path, typer.Argument(help="A folder that mezzotint made; with --drift, an original.", show_default=False)
    ],
    drift: Annotated[
        bool, typer.Option("--drift", help="Quantize the first blocks only and follow their error to the last one.")
    ] = False,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", help="With --drift: to compare; give several.")
    ] = None,
    blocks: Annotated[int, typer.Option("--blocks", help="With --drift: how many to quantize.")] = 10,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="With --drift: a .png or .svg with one line a recipe.")
    ] = None,
    asked: Asked,
    as_json: Json = False,
) -> None:
    """Show what was done to a quantized folder: bits, sizes, errors; with --drift, how errors travel in a model."""

    def work() -> dict[str, Any]:
        if not drift:
            from mezzotint.pipeline.report import read_report

            report = read_report(folder)
            if not as_json:
                tables.show_report(report, Console())
            return report
        from mezzotint.cli.plots import check_plot, plot_drift
        from mezzotint.pipeline.drift import measure_drift

        check_plot(plot)
        requests = [asked.request(folder, name, "dense") for name in recipe or ("rtn", "qep-rtn")]
        with tables.bar(errors, "following the streams") as progress:
            found = measure_drift(requests, blocks, progress)
        if plot is not None:
            plot_drift(found, plot)
        if not as_json:
            tables.show_drift(found, Console())
        return {"drift": [asdict(one) for one in found], "plot": None if plot is None else str(plot)}

    finish(work, as_json)


@app.command()
def recipes(*, as_json: Json = False) -> None:
    """List every recipe that has a name, with its paper."""

    def work() -> dict[str, Any]:
        from mezzotint.pipeline.recipe import presets

        found = {name: recipe.model_dump(mode="json") for name, recipe in presets().items()}
        if not as_json:
            tables.show_recipes(found, Console())
        return {"recipes": found}

    finish(work, as_json)


@app.command()
def palette(
    *,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure every distortion again (minutes) instead of reading the table.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List every grid: bits, error on Gaussian weights against the bound, decode speed here, engines."""

    def work() -> dict[str, Any]:
        from mezzotint.pipeline.palette import palette as members

        found = list(members(measure=measure))
        if not as_json:
            tables.show_palette(found, Console())
        return {"grids": [asdict(one) | {"ratio_to_bound": one.ratio_to_bound} for one in found]}

    finish(work, as_json)


def _planned(request: Request, console: Console | None, plot: Path | None) -> dict[str, Any]:
    """Plan, and allocate where bits are left to a budget; show it, and give it as JSON."""
    from mezzotint.cli import allocations
    from mezzotint.cli.plots import check_plot
    from mezzotint.pipeline import budgeted, report

    check_plot(plot)
    if plot is not None and request.recipe.stages().allocation is None:
        raise ConfigError("--plot draws size against loss where bits are allocated. Give --size, or --recipe palette.")
    with tables.progress(errors) as listener:
        planned, found = budgeted.plan(request, listener)
    if console is not None:
        tables.show_plan(planned, console)
    shown = report.plan_json(planned)
    if found is None:
        return shown
    if console is not None:
        allocations.show(found, planned, console)
    if plot is not None:
        allocations.draw(found, planned, plot)
    return {**shown, "predicted_kl_nats": found.chosen.predicted_kl_nats, **found.as_json()}


def finish(work: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Do the work of a command; errors become messages and exit codes, the result becomes JSON if asked for."""
    try:
        result = work()
    except KeyboardInterrupt:
        errors.print("[red]stopped.[/red] Nothing was written under the output's name.")
        raise typer.Exit(Exit.FAILED) from None
    except MezzotintError as error:
        for line in (str(error), *getattr(error, "__notes__", ())):
            errors.print(f"[bold red]error:[/bold red] {tables.escape(line)}")
        raise typer.Exit(Exit.FAILED if isinstance(error, RunError) else Exit.WRONG_REQUEST) from None
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")


def main() -> None:
    """Entry point of the ``mezzotint`` command."""
    app()
