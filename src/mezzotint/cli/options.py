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

MORE = "More options"  # the help of a command shows these below what everyone needs

Model = Annotated[
    Path,
    typer.Argument(help="Model folder: config.json, safetensors files and the tokenizer.", show_default=False),
]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="Name of a recipe (`mezzotint recipes` lists them), or path of a .yaml file.")
]
BitsOption = Annotated[
    float | None,
    typer.Option("--bits", help="Bits per code. With `palette`: average stored bits per weight."),
]
SizeOption = Annotated[
    str | None,
    typer.Option("--size", help="Size of the output folder, e.g. 1.5GiB. Each matrix gets its own number of bits."),
]
FitsOption = Annotated[
    str | None,
    typer.Option(
        "--fits",
        help="Memory for weights, KV cache and activations, e.g. 8GiB. Each matrix gets its own number of bits.",
        rich_help_panel=MORE,
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option("--context", help="With --fits: length of the KV cache in tokens.", rich_help_panel=MORE),
]
SpeedOption = Annotated[
    float | None,
    typer.Option(
        "--tokens-per-second",
        help="Decoding speed of one sequence on this machine. Each matrix gets its own number of bits.",
        rich_help_panel=MORE,
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="Engine that will load the result: transformers, vllm, vllm-cpu, sglang, gptqmodel, llama.cpp, exllamav3, "
        "mezzotint (packed, every grid), or dense (dequantized weights, every engine).",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="File format, if not the engine's usual one: gptq, gptq-v2, exl3, mezzotint, dense.",
        rich_help_panel=MORE,
    ),
]
CalibrationOption = Annotated[
    str,
    typer.Option(
        "--calibration",
        help="Calibration text: a .txt, .jsonl or .parquet file, wikitext2, c4, or 'self': the model writes it.",
    ),
]
Imatrix = Annotated[
    Path | None,
    typer.Option(
        "--imatrix",
        help="Importance matrix of llama.cpp, used instead of calibration text, with rounding to nearest.",
        rich_help_panel=MORE,
    ),
]
Samples = Annotated[
    str,
    typer.Option(
        "--samples", help="Number of calibration samples, or 'auto': chosen by the plan.", rich_help_panel=MORE
    ),
]
Seqlen = Annotated[
    str,
    typer.Option(
        "--seqlen", help="Tokens per calibration sample, or 'auto': chosen by the plan.", rich_help_panel=MORE
    ),
]
Field = Annotated[
    str | None,
    typer.Option("--field", help="Name of the text field of a .jsonl or .parquet file.", rich_help_panel=MORE),
]
Lines = Annotated[
    bool, typer.Option("--lines", help="Each line of the .txt file is one document.", rich_help_panel=MORE)
]
Packing = Annotated[
    bool,
    typer.Option(
        "--packing/--no-packing",
        help="Join documents and cut them into samples, or pad one document per sample.",
        rich_help_panel=MORE,
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", help="Do not quantize matrices whose name matches this glob. Can be given several times."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change one setting of the recipe: --set grid.group_size=64. Can be given several times."
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all random choices.", rich_help_panel=MORE)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.", rich_help_panel=MORE)]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        help="Precision of the forward passes: float32, bfloat16, or auto (the checkpoint's own).",
        rich_help_panel=MORE,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Memory limit of the process, e.g. 8GiB. Activations above it go to disk.",
        rich_help_panel=MORE,
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code from the model folder.", rich_help_panel=MORE),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Options that `quantize`, `plan` and `inspect --drift` share, as typed: the fields of `Options` but ``engine``."""

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
                f"--set {pair!r} has no '='. Write --set name=value, for example --set grid.group_size=64."
            )
        try:
            settings[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--set {pair!r}: the value is not a valid YAML scalar. Write for example 64, true or null."
            ) from error
    return settings


def _count(name: str, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdigit():
        raise ConfigError(f"--{name} is {value!r}. Give a whole number or 'auto'.")
    return int(value)
