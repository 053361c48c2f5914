"""Commands and their arguments."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from mezzotint.cli import tables
from mezzotint.errors import ConfigError, MezzotintError, RunError
from mezzotint.pipeline.request import CalibrationRequest, Request, parse_bytes, resolve_device, resolve_recipe

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


Model = Annotated[Path, typer.Argument(help="Folder with config.json, safetensors and tokenizer.", show_default=False)]
RecipeName = Annotated[str, typer.Option("--recipe", help="Name (see `mezzotint recipes`) or a .yaml file.")]
BitsOption = Annotated[float | None, typer.Option("--bits", help="Bits of one code; the recipe's own if left out.")]
Engine = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="transformers, vllm, mezzotint (any grid; our own format), or dense (dequantized, loads anywhere).",
    ),
]
CalibrationOption = Annotated[
    str,
    typer.Option(
        "--calibration", help="'self' samples from the model; a .txt, .jsonl or .parquet file; wikitext2, c4."
    ),
]
Samples = Annotated[str, typer.Option("--samples", help="Calibration windows; 'auto' lets the plan choose.")]
Seqlen = Annotated[str, typer.Option("--seqlen", help="Tokens per calibration window; 'auto' lets the plan choose.")]
Field = Annotated[str | None, typer.Option("--field", help="Field of a .jsonl or .parquet row that holds the text.")]
Lines = Annotated[bool, typer.Option("--lines", help="A .txt file has one document a line.")]
Packing = Annotated[bool, typer.Option("--packing/--no-packing", help="Documents end to end, or one a window, padded.")]
Keep = Annotated[
    list[str] | None, typer.Option("--keep", help="Leave matrices whose name matches this glob as they are.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any setting by dotted name: --set grid.group_size=64.")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="Bound for the process, e.g. 8GiB; activations spill past it.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code from the model folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of stdout.")]


def make_request(
    model: Path,
    *,
    recipe: str,
    bits: int | float | None,
    engine: str | None,
    calibration: CalibrationRequest,
    keep: list[str] | None,
    settings: list[str] | None,
    seed: int,
    device: str,
    memory: str | None,
    trust_remote_code: bool,
) -> Request:
    """A request from the command line's values."""
    return Request(
        model=model,
        recipe=resolve_recipe(recipe, bits=bits, settings=parse_settings(settings or []), keep=tuple(keep or ())),
        engine=engine,
        calibration=calibration,
        seed=seed,
        device=resolve_device(device),
        memory=None if memory is None else parse_bytes(memory),
        trust_remote_code=trust_remote_code,
    )


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are YAML scalars.

    Raises:
        ConfigError: a pair has no ``=``, or a value that cannot be read.
    """
    settings = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(
                f"--set {pair!r} has no '='; write --set name=value, for example --set grid.group_size=64."
            )
        try:
            settings[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--set {pair!r}: the value is no YAML scalar; write for example 64, true or null."
            ) from error
    return settings


def _count(name: str, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdigit():
        raise ConfigError(f"--{name} is {value!r}; give a whole number or 'auto'.")
    return int(value)


@app.command()
def quantize(
    *,
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", help="Folder to make; must not exist, or be empty.", show_default=False)
    ],
    recipe: RecipeName = "default",
    bits: BitsOption = None,
    engine: Engine = None,
    calibration: CalibrationOption = "self",
    samples: Samples = "auto",
    seqlen: Seqlen = "auto",
    field: Field = None,
    lines: Lines = False,
    packing: Packing = True,
    keep: Keep = None,
    settings: Set = None,
    seed: Seed = 0,
    device: Device = "auto",
    memory: Memory = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model folder into another folder."""

    def work() -> dict[str, Any]:
        from mezzotint.pipeline import report, run  # torch and transformers take a second to import

        text = CalibrationRequest(
            source=calibration, samples=_count("samples", samples), seqlen=_count("seqlen", seqlen),
            field=field, lines=lines, packing=packing,
        )  # fmt: skip
        request = make_request(
            model, recipe=recipe, bits=bits, engine=engine, calibration=text, keep=keep, settings=settings,
            seed=seed, device=device, memory=memory, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if dry_run:
            planned = run.plan(request)
            tables.show_plan(planned, errors if as_json else Console())
            return report.plan_json(planned)
        with tables.progress(errors) as listener:
            result = run.quantize(request, out, listener)
        if not as_json:
            tables.show_result(result, Console())
        return result

    _finish(work, as_json)


@app.command()
def plan(
    *,
    model: Model,
    recipe: RecipeName = "default",
    bits: BitsOption = None,
    engine: Engine = None,
    calibration: CalibrationOption = "self",
    samples: Samples = "auto",
    seqlen: Seqlen = "auto",
    keep: Keep = None,
    settings: Set = None,
    seed: Seed = 0,
    device: Device = "auto",
    memory: Memory = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Print what would be done: every matrix, sizes, calibration, memory, time."""

    def work() -> dict[str, Any]:
        from mezzotint.pipeline import report, run

        text = CalibrationRequest(
            source=calibration, samples=_count("samples", samples), seqlen=_count("seqlen", seqlen)
        )
        request = make_request(
            model, recipe=recipe, bits=bits, engine=engine, calibration=text, keep=keep, settings=settings,
            seed=seed, device=device, memory=memory, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        planned = run.plan(request)
        if not as_json:
            tables.show_plan(planned, Console())
        return report.plan_json(planned)

    _finish(work, as_json)


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

    _finish(work, as_json)


@app.command()
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
    bits: BitsOption = None,
    calibration: CalibrationOption = "self",
    samples: Samples = "auto",
    seqlen: Seqlen = "auto",
    settings: Set = None,
    seed: Seed = 0,
    device: Device = "auto",
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
        text = CalibrationRequest(
            source=calibration, samples=_count("samples", samples), seqlen=_count("seqlen", seqlen)
        )
        requests = [
            make_request(
                folder, recipe=name, bits=bits, engine="dense", calibration=text, keep=None, settings=settings,
                seed=seed, device=device, memory=None, trust_remote_code=False,
            )
            for name in recipe or ("rtn", "qep-rtn")
        ]  # fmt: skip
        with tables.bar(errors, "following the streams") as progress:
            found = measure_drift(requests, blocks, progress)
        if plot is not None:
            plot_drift(found, plot)
        if not as_json:
            tables.show_drift(found, Console())
        return {"drift": [asdict(one) for one in found], "plot": None if plot is None else str(plot)}

    _finish(work, as_json)


@app.command()
def recipes(*, as_json: Json = False) -> None:
    """List every recipe that has a name, with its paper."""

    def work() -> dict[str, Any]:
        from mezzotint.pipeline.recipe import presets

        found = {name: recipe.model_dump(mode="json") for name, recipe in presets().items()}
        if not as_json:
            tables.show_recipes(found, Console())
        return {"recipes": found}

    _finish(work, as_json)


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

    _finish(work, as_json)


def _finish(work: Callable[[], dict[str, Any]], as_json: bool) -> None:
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
