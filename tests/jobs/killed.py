"""Runs in processes of their own that kill themselves at a chosen operation on a file, or at a chosen step.

A server that has imported everything forks them, so that a kill costs no import.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mezzotint
import sums
from mezzotint.errors import RankError
from mezzotint.process.ranks import Ranks
from mezzotint.storage import keeper
from runs import TEXT, TINY_LLAMA
from together import started, together

ARGUMENTS: dict[str, Any] = {"calibration": TEXT, "samples": 8, "seqlen": 32, "device": "cpu", "bits": 3}
_AUDITED = {
    "open": "open", "os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "rmdir",
    "os.truncate": "truncate",
}  # fmt: skip
_CALLED = ("fsync", "pwrite", "posix_fallocate", "copy_file_range")
_WRITES = os.O_WRONLY | os.O_RDWR


class Operations:
    """Names the operations on files below a folder, in their order; ends the process at one of them.

    Their names: ``rename out.partial/work/state.json.tmp``, ``fsync``, ``step curvature``. An operation that writes is
    cut off in its middle.

    Args:
        folder: the others are not counted.
        last: glob of names, and which of those that match is the last; None is none.
    """

    def __init__(self, folder: Path, last: tuple[str, int] | None) -> None:
        self.names: list[str] = []
        self._folder = f"{folder}/"
        self._pattern, self._left = last or ("", 0)

    def install(self) -> None:
        """For the rest of the process."""
        sys.addaudithook(self._audited)
        for name in _CALLED:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def step(self, event: Any) -> None:
        """A listener."""
        self._one(f"step {event.stage}")

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        kind = _AUDITED.get(event)
        if kind is None or not isinstance(arguments[0], str | os.PathLike):
            return
        path = str(Path(arguments[0]).absolute())
        if path.startswith(self._folder) and (kind != "open" or arguments[2] & _WRITES):
            self._one(f"{kind} {path.removeprefix(self._folder)}")

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            if name == "pwrite" and self._is_last("pwrite"):
                call(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
            self._one(name)
            return call(*arguments)

        return counted

    def _is_last(self, name: str) -> bool:
        return self._left == 1 and fnmatchcase(name, self._pattern)

    def _one(self, name: str) -> None:
        if self._is_last(name):
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= fnmatchcase(name, self._pattern)
        self.names.append(name)


def _work(kind: str, out: Path, arguments: dict[str, Any], last: tuple[str, int] | None, told: Any) -> None:
    sums.set_up()
    keeper.OVERHEAD = float("inf")  # save after every group: every kind of operation comes
    operations = Operations(out.parent, last)
    operations.install()
    try:
        if kind == "quantize":
            options = ARGUMENTS | arguments
            model, recipe = options.pop("model", TINY_LLAMA), options.pop("recipe", "default")
            mezzotint.quantize(model, recipe, out=out, resume=True, listener=operations.step, **options)
        elif kind == "rotate":
            mezzotint.rotate(arguments.pop("model"), out=out, resume=True)
        else:

            def step(*_: int) -> None:
                operations.step(SimpleNamespace(stage="converting"))

            mezzotint.convert(arguments.pop("model"), arguments.pop("form"), out=out, resume=True, step=step)
    except mezzotint.errors.MezzotintError as error:
        told.put(repr(error))
        raise SystemExit(1) from error
    told.put(operations.names)


def _ranked(ranks: Ranks, out: Path, arguments: dict[str, Any], last: tuple[str, int] | None, number: int) -> list[str]:
    """A rank of a run, of which one kills itself."""
    keeper.OVERHEAD = float("inf")
    operations = Operations(out.parent, last if ranks.number == number else None)
    operations.install()
    options = ARGUMENTS | arguments
    model, recipe = options.pop("model", TINY_LLAMA), options.pop("recipe", "default")
    mezzotint.quantize(model, recipe, out=out, resume=True, listener=operations.step, **options)
    return operations.names


def finished_together(out: Path, **arguments: Any) -> list[list[str]]:
    """As `finished`, by two ranks; gives the operations of each."""
    answers = together(2, _ranked, out, arguments, None, 0)
    for answer in answers:
        assert isinstance(answer, list), answer
    return answers


def killed_together(out: Path, pattern: str, count: int, number: int, **arguments: Any) -> bool:
    """As `killed`, by two ranks of which one is killed."""
    answers = together(2, _ranked, out, arguments, (pattern, count), number)
    assert all(answer is None or isinstance(answer, list | RankError) for answer in answers), answers
    return answers[number] is None


def _start(*arguments: Any) -> tuple[BaseProcess, Any]:
    told = multiprocessing.get_context("forkserver").Queue()
    return started(_work, *arguments, told), told


def finished(out: Path, kind: str = "quantize", **arguments: Any) -> list[str]:
    """Run to the end, from what lies beside ``out``; gives the operations."""
    process, told = _start(kind, out, arguments, None)
    answer = told.get(timeout=300)
    process.join(60)
    assert process.exitcode == 0, answer
    return answer


def killed(out: Path, pattern: str, count: int = 1, kind: str = "quantize", **arguments: Any) -> bool:
    """Continue a run up to an operation, and kill it there; False if it ended before."""
    process, told = _start(kind, out, arguments, (pattern, count))
    process.join(300)
    if process.exitcode == -signal.SIGKILL:
        return True
    answer = told.get(timeout=10)
    assert process.exitcode == 0, answer
    return False
