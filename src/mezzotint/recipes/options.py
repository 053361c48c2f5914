"""Options of `quantize` and `plan`: their names and types, declared once for Python, the command line and requests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict


class Options(TypedDict, total=False):
    """Options of `quantize` and `plan`, all of which can be left out; the command line has them under the same names.

    Sizes are bytes, or text such as ``"1.5GiB"``.

    Attributes:
        bits: of one code; where bits are allocated, the average that is stored for a weight.
        size: of the folder; every matrix gets the best number of bits within it.
        fits: memory for weights, cache and activations; every matrix gets the best number of bits within it.
        context: with ``fits``, tokens that the cache must hold.
        tokens_per_second: speed of one sequence on this machine; every matrix gets the best number of bits for it.
        settings: dotted names of settings and their values, such as ``{"grid.group_size": 64}``.
        keep: globs; matrices whose name matches one stay as they are.
        engine: what will run the result, such as ``"vllm"``.
        format: of the result, where it is not the engine's usual one.
        calibration: ``"self"`` samples text from the model; else a file of text, or a data set by name.
        samples: calibration windows; None lets the plan choose.
        seqlen: tokens of a calibration window; None lets the plan choose.
        field: of a row of a .jsonl or .parquet file, which holds the text; None finds it.
        lines: a .txt file has one document a line.
        packing: documents follow each other in a window; False gives each a window, padded.
        imatrix: importance matrix of llama.cpp, which takes the place of calibration text.
        seed: of every random choice.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        precision: of products in calibration: ``"float32"``, ``"bfloat16"``, or ``"auto"`` (as the model is stored).
        memory: that the process may take; activations are spilled to disk past it.
        trust_remote_code: run Python code from the model folder.
    """

    bits: float | None
    size: int | str | None
    fits: int | str | None
    context: int | None
    tokens_per_second: float | None
    settings: Mapping[str, Any] | None
    keep: Sequence[str]
    engine: str | None
    format: str | None
    calibration: str | Path
    samples: int | None
    seqlen: int | None
    field: str | None
    lines: bool
    packing: bool
    imatrix: str | Path | None
    seed: int
    device: str
    precision: str
    memory: int | str | None
    trust_remote_code: bool
