"""Hypothesis strategies: the settings of every registered stage, and small linear layers for them.

A stage that is registered and not in `GRID_SETTINGS`, `ROUNDING_SETTINGS` or `TRANSFORM_SETTINGS` is tested with its
default settings; add a line to have its settings drawn too.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from math import lcm
from typing import Any

import torch
from hypothesis import strategies as st

from mezzotint.core.contracts import Grid
from mezzotint.errors import ConfigError
from mezzotint.registry import GRIDS, ROUNDINGS, TRANSFORMS
from mezzotint.testing.problems import OPTIONAL_SUMS, LinearProblem, ProblemSettings, make_problem

DTYPES = (torch.float32, torch.float64)
STATISTICS = frozenset({"gram"}) | OPTIONAL_SUMS
_MOST_COLUMNS = 40

# Values that every stage with a setting of that name must refuse.
BAD_VALUES: Mapping[str, tuple] = {
    "alpha": (-0.1, 1.5),
    "beta": (-0.1, 1.5),
    "bits": (1, 9),
    "block": (0, 3, -8),
    "block_size": (0, -8),
    "damping": (-1.0, float("nan")),
    "group_size": (0, -1),
    "range_power": (1.0, 2.2, 4.0, float("nan")),
    "steps": (0, -1),
    "strength": (-0.1, 1.5),
    "states": (8, 14),
    "tokens": (0, -8),
    "window": (0, 129),
}


# The same for stages that have values of their own.
OWN_BAD_VALUES: Mapping[str, Mapping[str, tuple]] = {"trellis": {"bits": (0.875, 3.3, 7.0)}}


def _uniform_grids() -> st.SearchStrategy[Grid]:
    return st.builds(
        GRIDS["uniform"],
        bits=st.integers(2, 8),
        group_size=st.sampled_from([None, "auto", 1, 3, 8, 16]),
        scale_per=st.sampled_from(["group", "row", "matrix"]),
        symmetric=st.booleans(),
        range=st.sampled_from(["minmax", "error", "weighted"]),
        range_power=st.sampled_from([2.0, 2.5, 3.0]),
        scale_dtype=st.sampled_from(["auto", "float16", "bfloat16", "float32"]),
    )


def _trellis_grids() -> st.SearchStrategy[Grid]:
    return st.builds(
        GRIDS["trellis"],
        bits=st.integers(8, 48).map(lambda rate: rate / 8),
        states=st.just(12),  # the other number of states is as good and fifteen times slower
        scale_per=st.sampled_from(["matrix", "row"]),
        window=st.sampled_from([32, 64]),  # narrower ones may close the path elsewhere
    )


def _lookup_grids() -> st.SearchStrategy[Grid]:
    any_bits = st.tuples(st.sampled_from(["gaussian", "even"]), st.integers(2, 8))
    return st.builds(
        lambda pair, **settings: GRIDS["lookup"](table=pair[0], bits=pair[1], **settings),
        any_bits | st.just(("nf4", 4)),
        group_size=st.sampled_from([None, "auto", 1, 3, 8, 16]),
        scale_per=st.sampled_from(["group", "row", "matrix"]),
        range=st.sampled_from(["rms", "absmax", "error", "weighted"]),
        scale_dtype=st.sampled_from(["auto", "float16", "bfloat16", "float32"]),
    )


def _vector_grids() -> st.SearchStrategy[Grid]:
    return st.builds(
        GRIDS["vector"],
        bits=st.integers(3, 12).map(lambda index_bits: index_bits / 2),
        group_size=st.sampled_from([None, "auto", 2, 6, 8, 16]),
        scale_per=st.sampled_from(["group", "row", "matrix"]),
        range=st.sampled_from(["rms", "absmax", "error", "weighted"]),
        scale_dtype=st.sampled_from(["auto", "float16", "bfloat16", "float32"]),
    )


def _gguf_grids() -> st.SearchStrategy[Grid]:
    narrow = st.sampled_from(["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"])
    wide = st.sampled_from(["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
    return st.builds(GRIDS["gguf"], type=narrow | wide, range=st.sampled_from(["error", "weighted"]))


def _gptq_settings() -> st.SearchStrategy[Any]:
    return st.builds(
        ROUNDINGS["gptq"],
        damping=st.sampled_from([0.001, 0.01, 0.1, 1.0]),
        order=st.sampled_from(["natural", "diagonal"]),
        block_size=st.sampled_from([3, 16, 128]),
    )


def _hadamard_settings() -> st.SearchStrategy[Any]:
    return st.builds(
        TRANSFORMS["hadamard"], block=st.sampled_from([1, 2, 16, 128]), sides=st.sampled_from(["both", "input"])
    )


def _awq_settings() -> st.SearchStrategy[Any]:
    return st.builds(
        TRANSFORMS["awq"], strength=st.sampled_from(["auto", 0.0, 0.5, 1.0]), steps=st.sampled_from([1, 2, 20])
    )


def _quip_settings() -> st.SearchStrategy[Any]:
    return st.builds(TRANSFORMS["quip"], matrices=st.sampled_from(["kronecker", "hadamard"]), rescale=st.booleans())


GRID_SETTINGS: Mapping[str, Callable[[], st.SearchStrategy[Grid]]] = {
    "uniform": _uniform_grids,
    "lookup": _lookup_grids,
    "vector": _vector_grids,
    "trellis": _trellis_grids,
    "gguf": _gguf_grids,
}
ROUNDING_SETTINGS: Mapping[str, Callable[[], st.SearchStrategy[Any]]] = {"gptq": _gptq_settings}
TRANSFORM_SETTINGS: Mapping[str, Callable[[], st.SearchStrategy[Any]]] = {
    "awq": _awq_settings,
    "hadamard": _hadamard_settings,
    "quip": _quip_settings,
}


def grids(name: str) -> st.SearchStrategy[Grid]:
    """Settings of the grid of that name."""
    return GRID_SETTINGS[name]() if name in GRID_SETTINGS else st.builds(GRIDS[name])


def roundings(name: str) -> st.SearchStrategy[Any]:
    """Settings of the rounding of that name."""
    return ROUNDING_SETTINGS[name]() if name in ROUNDING_SETTINGS else st.builds(ROUNDINGS[name])


def transforms(name: str) -> st.SearchStrategy[Any]:
    """Settings of the transform of that name."""
    return TRANSFORM_SETTINGS[name]() if name in TRANSFORM_SETTINGS else st.builds(TRANSFORMS[name])


@st.composite
def problem_settings(
    draw: Callable[..., Any], grid: st.SearchStrategy[Grid] | None = None, dtypes: tuple = DTYPES
) -> ProblemSettings:
    """Settings of a problem: one row, one column, ragged groups, dead and duplicated columns, zero rows, few tokens."""
    chosen = draw(_uniform_grids() if grid is None else grid)
    units = [lcm(t, m) for t, m in zip(chosen.tile, chosen.multiple, strict=True)]
    rows = draw(st.integers(1, 4)) * units[0]
    columns = draw(st.integers(1, max(1, _MOST_COLUMNS // units[1]))) * units[1]
    some_columns = st.lists(st.integers(0, columns - 1), max_size=2, unique=True)
    sources, copies = draw(some_columns), draw(some_columns)
    drawn = {
        "grid": chosen,
        "rows": rows,
        "columns": columns,
        "tokens": draw(st.sampled_from([2, columns, 3 * columns])),
        "seed": draw(st.integers(0, 2**20)),
        "dtype": draw(st.sampled_from(dtypes)),
        "dead_columns": tuple(draw(some_columns)),
        "zero_rows": tuple(draw(st.lists(st.integers(0, rows - 1), max_size=1))),
        "duplicates": tuple(zip(sources, copies, strict=False)),
    }
    with _random_left_alone():
        return ProblemSettings(**drawn)


def linear_problems(grid: st.SearchStrategy[Grid] | None = None, dtypes: tuple = DTYPES) -> st.SearchStrategy[Any]:
    """Linear layers to quantize (`LinearProblem`), on uniform grids unless told otherwise; see `problem_settings`."""

    def make(settings: ProblemSettings) -> LinearProblem:
        with _random_left_alone():
            return make_problem(settings)

    return problem_settings(grid, dtypes).map(make)


def bad_settings(stage: type) -> Iterator[dict[str, Any]]:
    """Settings that a stage must refuse, one at a time.

    Raises:
        LookupError: a setting that is a number has no line in `BAD_VALUES`.
    """
    for f in fields(stage):
        bad = OWN_BAD_VALUES.get(stage.kind, {}).get(f.name) or BAD_VALUES.get(f.name)
        if bad is not None:
            yield from ({f.name: value} for value in bad)
        elif type(f.default) in (int, float):
            raise LookupError(f"{stage.__name__}.{f.name} is a number; add values it must refuse to BAD_VALUES")


def assert_refused(stage: type, settings: Mapping[str, Any]) -> None:
    """The stage refuses one bad setting with a ConfigError that says its name, its value and the limit."""
    ((name, value),) = settings.items()
    try:
        stage(**settings)
    except ConfigError as error:
        _, found, rest = str(error).partition(f"{name} is {value}")
        if not found or not any(character.isdigit() for character in rest):
            raise AssertionError(f"the message must give the value and the limit: {error}") from error
        return
    raise AssertionError(f"{stage.__name__}({name}={value}) was accepted")


@contextmanager
def _random_left_alone() -> Iterator[None]:
    """Run-time type checkers look at a random element of a container; Hypothesis forbids that inside strategies."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
