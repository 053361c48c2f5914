"""Programs that run inside the environments of engines, which have nothing of these tests."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LIMIT = 600  # seconds, for a worker as for a server to start
Ask = Callable[[str, Mapping[str, object]], dict[str, Any]]


def needs(variable: str, what: str) -> list[pytest.MarkDecorator]:
    """Marks of tests that run in an engine's environment, whose python the variable names."""
    absent = os.environ.get(variable) is None
    return [pytest.mark.engine, pytest.mark.skipif(absent, reason=f"{variable} names no python that has {what}")]


def run_worker(python: str | None, worker: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """What a worker prints behind ``RESULT``, as JSON."""
    done = subprocess.run(
        [str(python), str(worker), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return json.loads(_results(done.stdout)[-1])


def version_of(python: str, package: str) -> str:
    """Of a package in the environment of a python."""
    asks = f"from importlib.metadata import version; print('RESULT ' + version({package!r}))"
    done = subprocess.run([python, "-c", asks], capture_output=True, text=True, check=True, timeout=LIMIT)
    return _results(done.stdout)[-1]


@contextlib.contextmanager
def served(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Iterator[Ask]:
    """A server of OpenAI's protocol while it runs; asks it by path and body.

    Args:
        command: ``{port}`` in a word becomes a free one.
        log: takes what it prints.
        env: added to the environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ask(path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return json.loads(answer.read())

    with log.open("wb") as file:
        server = subprocess.Popen(
            [word.replace("{port}", str(port)) for word in command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # it starts processes of its own, which end with it
        )
        try:
            end = time.monotonic() + LIMIT
            while True:
                assert server.poll() is None, log.read_text(errors="replace")[-4000:]
                assert time.monotonic() < end, f"no answer within {LIMIT} s"
                try:
                    ask("/v1/models")
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.5)
            yield ask
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _results(output: str) -> list[str]:
    return [line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT ")]
