"""The command that rotates models."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mezzotint.cli import tables
from mezzotint.cli.app import Resume, app, errors, finish
from mezzotint.cli.options import MORE, Json, Model, Trust

Kind = "hadamard, random or none."


@app.command()
def rotate(
    *,
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", help="Folder to create. It must not exist, or be empty.", show_default=False)
    ],
    residual: Annotated[
        str, typer.Option("--residual", help=f"Rotation of the residual stream (R1): {Kind}")
    ] = "hadamard",
    heads: Annotated[
        str, typer.Option("--heads", help=f"Rotation of the attention values, per head (R2): {Kind}")
    ] = "hadamard",
    untie: Annotated[
        bool, typer.Option("--untie", help="Store lm_head separately if it is tied to the embedding.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="float16, bfloat16 or float32. The default is the checkpoint's own.", rich_help_panel=MORE
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random rotations.", rich_help_panel=MORE)] = 0,
    resume: Resume = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Rotate the weights of a model. It computes the same, with fewer outliers. Quantize the new folder."""

    def work() -> dict[str, Any]:
        from mezzotint.jobs.rotate import Rotations
        from mezzotint.jobs.rotate import rotate as run

        choices = Rotations(residual=residual, heads=heads, untie=untie, dtype=dtype, seed=seed)
        with tables.bar(errors, "comparing") as progress:
            result = run(model, out, choices, resume=resume, trust_remote_code=trust_remote_code, step=progress)
        if not as_json:
            Console().print(
                f"{result['out']}: {result['output_bytes'] / 2**20:.1f} MiB. The largest change of a logit, before "
                f"rounding to the stored dtype, is {result['difference']:.1e} of the largest logit."
            )
        return result

    finish(work, as_json)
