"""Commands and their arguments."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import IntEnum
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mezzotint.cli import tables
from mezzotint.cli.options import MORE, Asked, Engine, Json, Model, RecipeName, asks
from mezzotint.cli.stop import stopping, undisturbed
from mezzotint.errors import ConfigError, MezzotintError, RunError

if TYPE_CHECKING:
    from mezzotint.recipes.request import Request

app = typer.Typer(
    name="mezzotint",
    help="Quantize language models after training: 1.5 to 8 bits per weight.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def _show_version(given: bool) -> bool:
    if given:
        sys.stdout.write(f"mezzotint {version('mezzotint')}\n")
        raise typer.Exit
    return given


@app.callback()
def _common(
    *,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    # Without a docstring, so that the help of the program stays that of `app`.
    del show_version


class Exit(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAILED = 1
    WRONG_REQUEST = 2


Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue an interrupted run with the same --out. Without one, start."),
]


@app.command()
@asks
def quantize(
    *,
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", help="Folder to create. It must not exist, or be empty.", show_default=False)
    ],
    recipe: RecipeName = "default",
    engine: Engine = None,
    asked: Asked,
    resume: Resume = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.", rich_help_panel=MORE)] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model folder into a new folder."""

    def work() -> dict[str, Any]:
        from mezzotint.jobs import quantize as budgeted

        request = asked.request(model, recipe, engine)
        if dry_run:
            return _planned(request, errors if as_json else Console(), None)
        shown = errors if leads() else Console(quiet=True)
        with tables.progress(shown) as listener, stopping(shown) as stop:
            result = budgeted.quantize(request, out, lambda event: stop(listener(event)), resume=resume)
        if leads() and not as_json:
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
        Path | None,
        typer.Option(
            "--plot",
            help="With `palette` or a budget: draw size against loss into a .png, .svg or .pdf.",
            rich_help_panel=MORE,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what `quantize` would do: bits of each matrix, size, memory and time. Nothing is written."""

    def work() -> dict[str, Any]:
        return _planned(asked.request(model, recipe, engine), None if as_json else Console(), plot)

    finish(work, as_json)


@app.command()
def recipes(*, as_json: Json = False) -> None:
    """List all named recipes and their papers."""

    def work() -> dict[str, Any]:
        from mezzotint.recipes.recipe import presets

        found = {name: recipe.model_dump(mode="json") for name, recipe in presets().items()}
        if not as_json:
            tables.show_recipes(found, Console())
        return {"recipes": found}

    finish(work, as_json)


@app.command()
def palette(
    *,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure all errors again (takes minutes), instead of using the stored table."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List all grids: bits, error on Gaussian weights, decoding speed on this machine, engines."""

    def work() -> dict[str, Any]:
        from mezzotint.jobs.palette import palette as members

        found = list(members(measure=measure))
        if not as_json:
            tables.show_palette(found, Console())
        return {"grids": [asdict(one) | {"ratio_to_bound": one.ratio_to_bound} for one in found]}

    finish(work, as_json)


def _planned(request: "Request", console: Console | None, plot: Path | None) -> dict[str, Any]:
    """Plan, and allocate where bits are left to a budget; show it, and give it as JSON."""
    from mezzotint.cli import allocations
    from mezzotint.cli.plots import check_plot
    from mezzotint.jobs import quantize as budgeted
    from mezzotint.report import report

    check_plot(plot)
    if plot is not None and request.recipe.stages().allocation is None:
        raise ConfigError(
            "--plot needs bits that are allocated under a budget. Give --size or --recipe palette, or leave --plot out."
        )
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
    """Do the work of a command: errors to stderr, its object to stdout if asked for, and the exit code."""
    try:
        result = work()
    except KeyboardInterrupt as error:
        if leads():
            _say("[red]stopped.[/red] The output folder was not created.", error)
        raise typer.Exit(Exit.FAILED) from None
    except MezzotintError as error:
        _say(f"[bold red]error:[/bold red] {tables.escape(str(error))}", error)
        raise typer.Exit(Exit.FAILED if isinstance(error, RunError) else Exit.WRONG_REQUEST) from None
    if leads():
        for warning in result.get("warnings", ()):
            errors.print(f"[yellow]warning:[/yellow] {tables.escape(warning)}")
    if as_json and leads():
        sys.stdout.write(json.dumps(result) + "\n")


def leads() -> bool:
    """Whether this process tells what happens: the only one, or the first of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def _say(line: str, error: BaseException) -> None:
    with undisturbed():
        errors.print(line)
        for note in getattr(error, "__notes__", ()):
            errors.print(tables.escape(note))


def main() -> None:
    """Entry point of the ``mezzotint`` command."""
    if isinstance(sys.stdout, TextIOWrapper):  # a name of a file that is not UTF-8 ends no command that shows it
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
