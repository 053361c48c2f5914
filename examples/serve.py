"""Serve a folder with vLLM, or a .gguf file with llama.cpp, and ask the server for a few words.

    python examples/serve.py FOLDER_OR_GGUF [PROMPT]

Both speak the same protocol. vLLM loads compressed-tensors, llama.cpp loads GGUF; the server's program must be on PATH.
"""

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PORT = 8033
START_SECONDS = 600


def command(model: Path) -> list[str]:
    """What starts the server."""
    if model.suffix == ".gguf":
        return ["llama-server", "--model", str(model), "--port", str(PORT)]
    return ["vllm", "serve", str(model), "--port", str(PORT), "--served-model-name", "quantized"]


def ask(path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """One request to the server on this machine."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - a fixed address
        return json.loads(answer.read() or b"{}")


def wait_for(server: subprocess.Popen[bytes]) -> None:
    """Until the server answers.

    Raises:
        RuntimeError: it ended, or takes too long.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"{server.args} ended with {server.returncode}")
        try:
            ask("/v1/models")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError(f"the server did not answer within {START_SECONDS} s")


def main() -> None:
    """Start, ask, stop."""
    model = Path(sys.argv[1])
    prompt = sys.argv[2] if len(sys.argv) > 2 else "The three most important inventions in history are"
    program = command(model)
    if shutil.which(program[0]) is None:
        sys.exit(f"{program[0]} is not installed or not on PATH")
    print(" ".join(program))
    server = subprocess.Popen(program)  # noqa: S603
    try:
        wait_for(server)
        body = {"model": "quantized", "prompt": prompt, "max_tokens": 32, "temperature": 0}
        answer = ask("/v1/completions", body)
        print(prompt + answer["choices"][0]["text"])  # type: ignore[index]
    finally:
        server.terminate()
        server.wait(timeout=60)


if __name__ == "__main__":
    main()
