"""The public functions: named, typed arguments, with the names and defaults of the command line's options."""

import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main

import mezzotint
from mezzotint.cli.app import app
from mezzotint.cli.options import Asked
from mezzotint.errors import ConfigError
from mezzotint.evaluation import scores, texts
from mezzotint.jobs import convert, rotate
from mezzotint.recipes.options import Options
from mezzotint.recipes.request import make_request

MODEL = Path("model")
FUNCTIONS = [name for name in mezzotint.__all__ if inspect.isfunction(getattr(mezzotint, name))]
COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
# another value than the default for every option
GIVEN: dict[str, Any] = {
    "bits": 3,
    "size": "1MiB",
    "fits": 2**20,
    "context": 64,
    "tokens_per_second": 5,
    "settings": {"grid.group_size": 32},
    "keep": ["*.down_proj"],
    "engine": "vllm",
    "format": "gptq",
    "calibration": "text.txt",
    "samples": 4,
    "seqlen": 32,
    "field": "text",
    "lines": True,
    "packing": False,
    "imatrix": "imatrix.gguf",
    "seed": 7,
    "device": "cuda",
    "precision": "float32",
    "memory": "8GiB",
    "trust_remote_code": True,
}
# the budgets allocate bits, and the number of tokens in the cache counts with one of them only
BESIDE = {"context": {"fits": "1GiB"}}


def options_of(command: str) -> dict[str, Any]:
    """Names of a command's parameters, and their defaults."""
    return {parameter.name: parameter.default for parameter in COMMANDS[command].params}


def arguments_of(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def test_the_command_line_has_every_option() -> None:
    assert {option.name for option in fields(Asked)} == Options.__annotations__.keys() - {"engine"}
    for command in ("quantize", "plan"):
        # --set is called settings, --for is called engine
        assert options_of(command).keys() >= Options.__annotations__.keys()


def test_every_option_is_described() -> None:
    described = re.findall(r"^ {4,}(\w+): ", Options.__doc__ or "", re.MULTILINE)
    assert described == list(Options.__annotations__)
    assert described == list(GIVEN)


@pytest.mark.parametrize("name", GIVEN)
def test_every_option_reaches_the_request(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: name == "device")
    rest = BESIDE.get(name, {})
    assert make_request(MODEL, "rtn", **rest, **{name: GIVEN[name]}) != make_request(MODEL, "rtn", device="cpu", **rest)


def test_the_defaults_are_those_of_the_command_line() -> None:
    assert Asked().request(MODEL, "rtn", None) == make_request(MODEL, "rtn")


def test_the_command_line_makes_the_same_request() -> None:
    asked = Asked(bits=3.0, samples="4", settings=["grid.group_size=32"], keep=["*.o_proj"], memory="8GiB")
    options: Any = {"bits": 3, "samples": 4, "settings": {"grid.group_size": 32}, "keep": ("*.o_proj",)}
    assert asked.request(MODEL, "rtn", "vllm") == make_request(MODEL, "rtn", engine="vllm", memory=2**33, **options)


@pytest.mark.parametrize("function", [mezzotint.plan, make_request])
def test_an_unknown_option_is_a_type_error_with_a_suggestion(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"unknown option 'bit'\. Did you mean 'bits'\?"):
        function(MODEL, "rtn", bit=3)


def test_a_size_that_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match="Write for example 8GiB"):
        make_request(MODEL, "rtn", memory="much")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_named_typed_and_described(name: str) -> None:
    function = inspect.unwrap(getattr(mezzotint, name))
    documented = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters.values():
        assert argument.annotation is not argument.empty
        assert re.search(rf"^ +(\*\*)?{argument.name}: ", documented, re.MULTILINE), argument.name
        if argument.kind is argument.VAR_KEYWORD:
            # load hands arguments of transformers on, which only transformers knows
            assert argument.annotation == typing.Unpack[Options] or name == "load"


@pytest.mark.parametrize(
    ("public", "run"),
    [
        (mezzotint.evaluate, texts.evaluate),
        (mezzotint.evaluate_tasks, scores.evaluate_tasks),
        (mezzotint.convert, convert.convert),
    ],
)
def test_arguments_and_defaults_are_those_of_what_runs(public: Callable[..., Any], run: Callable[..., Any]) -> None:
    outside, inside = arguments_of(public), arguments_of(run)
    assert outside.keys() == inside.keys()
    # the device is found out outside, and functions cannot be compared
    same = outside.keys() - {"device", "progress", "step"}
    assert {name: outside[name] for name in same} == {name: inside[name] for name in same}


def test_rotations_have_the_same_defaults() -> None:
    chosen = {f.name: f.default for f in fields(rotate.Rotations) if f.default is not MISSING}
    assert chosen.items() <= arguments_of(mezzotint.rotate).items()
    assert chosen.items() <= options_of("rotate").items()


@pytest.mark.parametrize("command", ["evaluate", "convert", "rotate"])
def test_commands_have_the_same_defaults(command: str) -> None:
    typed, python = options_of(command), arguments_of(getattr(mezzotint, command))
    if command == "evaluate":
        python = {**arguments_of(mezzotint.evaluate_tasks), **python, "text": None, "tasks": None, "task_path": None}
    shared = typed.keys() & python.keys() - {"out", "model", "folder", "form"}
    assert shared >= {"trust_remote_code"}
    assert {name: typed[name] for name in shared} == {name: python[name] for name in shared}


def test_load_hands_on_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    loader = SimpleNamespace(from_pretrained=lambda _, **options: given.append(options))
    monkeypatch.setattr("transformers.AutoModelForCausalLM", loader)
    function = inspect.unwrap(mezzotint.load)  # what comes back is no model
    function("folder")
    function("folder", dtype="float32", device_map="auto", trust_remote_code=True, revision="main")
    assert given == [
        {"trust_remote_code": False},
        {"trust_remote_code": True, "dtype": "float32", "device_map": "auto", "revision": "main"},
    ]
