"""Ranks of one run as processes of a test; a server that has imported everything forks them."""

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import distributed

import sums
from mezzotint.process.ranks import Ranks
from runs import quantized

Work = Callable[..., Any]


def _rank(number: int, size: int, folder: str, seconds: float, work: Work, arguments: tuple[Any, ...]) -> None:
    sums.set_up()
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(size)}
    # a file, not a port: nothing else on the machine can be in the way
    store = distributed.FileStore(f"{folder}/store", size)
    distributed.init_process_group(
        "gloo", store=store, rank=number, world_size=size, timeout=timedelta(seconds=seconds)
    )
    result: Any = None
    try:
        result = work(Ranks(number, size), *arguments)
    except Exception as error:
        result = error
    torch.save(result, f"{folder}/{number}.tmp")
    Path(folder, f"{number}.tmp").rename(Path(folder, str(number)))
    os._exit(0)  # without goodbye to ranks that may be gone


def started(target: Callable[..., None], *arguments: Any) -> Any:
    """A process, forked by a server that has imported everything and opened a model (`warm`)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs.warm"])
    process = context.Process(target=target, args=arguments)
    # the server does not take over sys.path (CPython 3.11)
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(Path(__file__).parent)}):
        process.start()
    return process


def together(size: int, work: Work, *arguments: Any, seconds: float = 60) -> list[Any]:
    """What every rank makes of ``work(ranks, *arguments)``: its result, its exception, or None where it died."""
    with TemporaryDirectory() as folder:
        processes = [started(_rank, number, size, folder, seconds, work, arguments) for number in range(size)]
        for process in processes:
            process.join(300)
            assert process.exitcode is not None, "a rank hangs"
        answers = [Path(folder, str(number)) for number in range(size)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in answers]


def quantized_together(_: Ranks, jobs: list[tuple[Path, Path, Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Several runs one after another, each ``(model, out, recipe, options)``."""
    return [quantized(model, out, recipe, **options) for model, out, recipe, options in jobs]
