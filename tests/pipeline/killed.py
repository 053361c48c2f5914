"""Runs in processes of their own that can be killed; a server that has imported everything forks them."""

import multiprocessing
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import mezzotint
import sums
from pipeline.runs import TEXT, TINY_LLAMA

ARGUMENTS: dict[str, Any] = {"calibration": TEXT, "samples": 8, "seqlen": 32, "device": "cpu", "bits": 3}


def _quantize(out: Path, overrides: dict[str, Any], failed: Any) -> None:
    sums.set_up()
    model, recipe = overrides.pop("model", TINY_LLAMA), overrides.pop("recipe", "loaq-gptq")
    try:
        mezzotint.quantize(model, recipe, out=out, resume=True, **ARGUMENTS | overrides)
    except mezzotint.errors.MezzotintError as error:
        failed.put(str(error))
        raise SystemExit(1) from error


def start(out: Path, **overrides: Any) -> tuple[BaseProcess, Any]:
    """A run that continues what lies beside ``out``; gives its process, and a queue with its message if it fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mezzotint.errors", "mezzotint.pipeline.run"])
    failed = context.Queue()
    process = context.Process(target=_quantize, args=(out, overrides, failed))
    process.start()
    return process, failed


def finished(out: Path, **overrides: Any) -> float:
    """Run to the end; gives the seconds it took."""
    started = time.perf_counter()
    process, failed = start(out, **overrides)
    process.join(300)
    assert process.exitcode == 0, failed.get(timeout=10)
    return time.perf_counter() - started


def killed(out: Path, after: float, **overrides: Any) -> bool:
    """Start a run and kill it after some seconds; False if it was finished before."""
    process, failed = start(out, **overrides)
    process.join(after)
    alive = process.exitcode is None
    process.kill()
    process.join(60)
    if not alive:
        assert process.exitcode == 0, failed.get(timeout=10)
        return False
    assert process.exitcode == -signal.SIGKILL
    return True
