"""The command that changes the format of a quantized folder."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mezzotint.cli import tables
from mezzotint.cli.app import Resume, app, errors, finish
from mezzotint.cli.options import Engine, Json, Trust


@app.command()
def convert(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder that `mezzotint quantize` made.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", help="Folder to create. It must not exist, or be empty.", show_default=False)
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="File format: compressed-tensors, gptq, gptq-v2, mezzotint, gguf, exl3 or dense.",
            show_default=False,
        ),
    ],
    engine: Engine = None,
    resume: Resume = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Convert a quantized folder to another file format. Codes and scales stay the same."""

    def work() -> dict[str, Any]:
        from mezzotint.jobs.convert import convert as run

        with tables.bar(errors, "converting") as progress:
            result = run(
                folder, out, form, engine=engine, resume=resume, trust_remote_code=trust_remote_code, step=progress
            )
        if not as_json:
            Console().print(
                f"{result['out']}: {result['matrices']} matrices from {result['from']} to {result['format']}, "
                f"{result['output_bytes'] / 2**20:.1f} MiB"
            )
        return result

    finish(work, as_json)
