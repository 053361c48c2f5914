"""The command about the user's cache."""

from typing import Annotated, Any

import typer
from rich.console import Console

from mezzotint.cli.app import app, finish
from mezzotint.cli.options import Json


@app.command()
def cache(
    *,
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything in the cache.")] = False,
    as_json: Json = False,
) -> None:
    """Show what the cache holds: calibration samples and measurements of models; --clear empties it."""

    def work() -> dict[str, Any]:
        from mezzotint.storage.cache import LIMIT, Cache

        kept = Cache()
        removed = kept.clear() if clear else 0
        sizes = [size for _, size in kept.files()]
        if not as_json:
            console = Console(highlight=False, soft_wrap=True)
            if clear:
                console.print(f"Removed {removed / 2**20:.1f} MiB.")
            console.print(
                f"{len(sizes)} files, {sum(sizes) / 2**20:.1f} of at most {kept.limit >> 20} MiB, in {kept.folder}",
                markup=False,
            )
            console.print(f"Set {LIMIT} to another number of bytes to change the limit; 0 keeps nothing.")
        return {
            "folder": str(kept.folder),
            "files": len(sizes),
            "bytes": sum(sizes),
            "limit_bytes": kept.limit,
            "removed_bytes": removed,
        }

    finish(work, as_json)
