"""The command that rotates models."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mezzotint.cli import tables
from mezzotint.cli.app import Resume, app, errors, finish
from mezzotint.cli.options import Json, Model, Trust

Kind = "hadamard, random or none."


@app.command()
def rotate(
    *,
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", help="Folder to make; must not exist, or be empty.", show_default=False)
    ],
    residual: Annotated[
        str, typer.Option("--residual", help=f"Rotation of the residual stream (R1): {Kind}")
    ] = "hadamard",
    heads: Annotated[str, typer.Option("--heads", help=f"Rotation of the values of heads (R2): {Kind}")] = "hadamard",
    untie: Annotated[
        bool, typer.Option("--untie", help="A head that is the embedding may become a matrix of its own.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float16, bfloat16 or float32; the model's own if left out.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the rotations.")] = 0,
    resume: Resume = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Rotate a model into one that computes the same and has fewer outliers; quantize that one."""

    def work() -> dict[str, Any]:
        from mezzotint.jobs.rotate import Rotations
        from mezzotint.jobs.rotate import rotate as run

        choices = Rotations(residual=residual, heads=heads, untie=untie, dtype=dtype, seed=seed)
        with tables.bar(errors, "comparing") as progress:
            result = run(model, out, choices, resume=resume, trust_remote_code=trust_remote_code, step=progress)
        if not as_json:
            Console().print(
                f"{result['out']}: {result['output_bytes'] / 2**20:.1f} MiB. Before rounding to the stored dtype, "
                f"logits differ by {result['difference']:.1e} of the largest."
            )
        return result

    finish(work, as_json)
