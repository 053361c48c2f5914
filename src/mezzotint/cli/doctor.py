"""The command that describes the machine for a bug report."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mezzotint.cli import tables
from mezzotint.cli.app import app, finish
from mezzotint.cli.options import Json

_WIDTH = 22


@app.command()
def doctor(*, as_json: Json = False) -> None:
    """Print versions, processor, kernels, memory, disk, GPUs and engines, to paste into a bug report."""

    def work() -> dict[str, Any]:
        from mezzotint.jobs.doctor import examine

        found = examine()
        if not as_json:
            # no table: it is pasted, and must not depend on the width of the terminal
            sys.stdout.write("\n".join(("```text", *_lines(found), "```")) + "\n")
        return found

    finish(work, as_json)


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name, value in found["versions"].items():
        yield _line(name, value or "not installed")
    yield _line("system", f"{found['system']['platform']}; {found['system']['python']}")
    processor = found["processor"]
    yield _line("processor", f"{processor['model']}; torch uses {processor['torch_capability']}")
    yield _line("cores", f"{processor['cores']}, usable {processor['usable_cores']}, threads {processor['threads']}")
    yield _line("kernels", _kernels(found["kernels"]))
    memory = {name: _size(value) for name, value in found["memory"].items()}
    yield _line("memory", f"{memory['total_bytes']}, available {memory['available_bytes']}")
    if found["memory"]["limit_bytes"] is not None:
        yield _line("memory limit", memory["limit_bytes"])
    for name, place in found["disk"].items():
        yield _line(f"free, {name}", _size(place["free_bytes"]))
    for gpu in found["gpus"] or ({"name": "none"},):
        yield _line("GPU", _gpu(gpu))
    for name, value in found["engines"].items():
        yield _line(name, value or "not installed")
    for name, value in found["environment"].items():
        yield _line(name, value)


def _kernels(kernels: Mapping[str, Any]) -> str:
    if not kernels["loaded"]:
        return f"not loaded ({kernels['error']})"
    return (
        f"{kernels['used']} of {', '.join(kernels['available'])}; products {kernels['products']}; bfloat16 products "
        f"{'yes' if kernels['multiplies_bfloat16'] else 'no'}; {kernels['file']}"
    )


def _gpu(gpu: Mapping[str, Any]) -> str:
    if gpu.get("error") is not None:
        return gpu["error"]
    if "memory_bytes" not in gpu:
        return gpu["name"]
    return f"{gpu['name']}, {tables.size(gpu['memory_bytes'])}, compute capability {gpu['capability']}"


def _line(name: str, value: str) -> str:
    return f"{name:{_WIDTH}}{value}"


def _size(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else tables.size(nbytes)
