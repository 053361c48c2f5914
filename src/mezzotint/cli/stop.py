"""Ctrl-C: the first asks to stop after the matrix that is being quantized, the second stops at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console


@contextmanager
def stopping(console: Console) -> Iterator[Callable[[Any], None]]:
    """Gives a listener that raises KeyboardInterrupt behind the matrix during which Ctrl-C was pressed.

    Signals reach the main thread only; in another one, nothing is changed.
    """
    pressed = False

    def press(*_: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)
        console.print("stopping after this matrix; Ctrl-C again stops at once.")

    def check(_: Any) -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
