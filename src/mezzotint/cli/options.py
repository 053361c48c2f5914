"""Options that several commands share, and the request that they make."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.errors import ConfigError

if TYPE_CHECKING:
    from mezzotint.recipes.request import Request

Model = Annotated[Path, typer.Argument(help="Folder with config.json, safetensors and tokenizer.", show_default=False)]
RecipeName = Annotated[str, typer.Option("--recipe", help="Name (see `mezzotint recipes`) or a .yaml file.")]
BitsOption = Annotated[
    float | None,
    typer.Option("--bits", help="Bits of one code; where bits are allocated, the average that is stored for a weight."),
]
SizeOption = Annotated[
    str | None, typer.Option("--size", help="Of the folder, e.g. 1.5GiB: the best bits for every matrix within it.")
]
FitsOption = Annotated[
    str | None,
    typer.Option("--fits", help="Memory for weights, cache and activations, e.g. 8GiB: the best bits within it."),
]
ContextOption = Annotated[int | None, typer.Option("--context", help="With --fits: tokens that the cache must hold.")]
SpeedOption = Annotated[
    float | None,
    typer.Option("--tokens-per-second", help="Of one sequence on this machine: the best bits for every matrix."),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="What will run it: transformers, vllm, vllm-cpu, sglang, gptqmodel, llama.cpp, exllamav3, mezzotint (any "
        "grid; our own format), or dense (dequantized, loads anywhere).",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="Another format than the engine's usual one: gptq, gptq-v2, exl3, mezzotint, dense."),
]
CalibrationOption = Annotated[
    str,
    typer.Option(
        "--calibration", help="'self' samples from the model; a .txt, .jsonl or .parquet file; wikitext2, c4."
    ),
]
Imatrix = Annotated[
    Path | None,
    typer.Option(
        "--imatrix", help="Importance matrix of llama.cpp in the place of text: weighs ranges, for rounding to nearest."
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
Precision = Annotated[
    str,
    typer.Option(
        "--precision", help="Of products in calibration: float32, bfloat16, or auto (as the model is stored)."
    ),
]
Memory = Annotated[
    str | None, typer.Option("--memory", help="Bound for the process, e.g. 8GiB; activations spill past it.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code from the model folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of stdout.")]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `quantize`, `plan` and `inspect --drift` are asked, as typed: every field of `Options` but ``engine``."""

    format: FormatOption = None
    bits: BitsOption = None
    size: SizeOption = None
    fits: FitsOption = None
    context: ContextOption = None
    tokens_per_second: SpeedOption = None
    calibration: CalibrationOption = "self"
    imatrix: Imatrix = None
    samples: Samples = "auto"
    seqlen: Seqlen = "auto"
    field: Field = None
    lines: Lines = False
    packing: Packing = True
    keep: Keep = None
    settings: Set = None
    seed: Seed = 0
    device: Device = "auto"
    precision: Precision = "auto"
    memory: Memory = None
    trust_remote_code: Trust = False

    def request(self, model: Path, recipe: str, engine: str | None) -> "Request":
        """Checked, as far as it can be without the model."""
        from mezzotint.recipes.request import make_request

        options: dict[str, Any] = {option.name: getattr(self, option.name) for option in fields(self)}
        options |= {
            "settings": parse_settings(self.settings or []),
            "keep": self.keep or (),
            "samples": _count("samples", self.samples),
            "seqlen": _count("seqlen", self.seqlen),
        }
        return make_request(model, recipe, engine=engine, **options)


def asks(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes ``asked: Asked`` the options of `Asked` in its place."""
    own = inspect.signature(command)
    names = [f.name for f in fields(Asked)]
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(Asked)
    ]

    @wraps(command)
    def wrapped(**values: Any) -> None:
        command(asked=Asked(**{name: values.pop(name) for name in names}), **values)

    parameters = []
    for parameter in own.parameters.values():
        parameters += shared if parameter.name == "asked" else [parameter]
    wrapped.__signature__ = own.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are YAML scalars.

    Raises:
        ConfigError: a pair has no ``=``, or a value that cannot be read.
    """
    import yaml

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
