"""Ctrl-C: the first asks to stop after the matrix that is being quantized, the second, or SIGTERM, stops at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from mezzotint.errors import RankError


@contextmanager
def stopping(console: Console) -> Iterator[Callable[[Any], None]]:
    """Gives a listener that raises KeyboardInterrupt behind the matrix during which Ctrl-C was pressed.

    Signals reach the main thread only; in another one, nothing is changed. A signal that is ignored (``nohup``, jobs in
    the background of a script) stays so. Of several ranks only the first has a listener: the others stop because it
    does.
    """
    pressed = False

    def press(*_: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        console.print("stopping after this matrix; Ctrl-C again stops at once.")

    def at_once(*_: Any) -> None:
        raise KeyboardInterrupt

    def check(_: Any) -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    handlers = {signal.SIGINT: press, signal.SIGTERM: at_once}
    heard = [number for number in handlers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handlers[number]) for number in heard}
    try:
        yield check
    except RankError:
        if pressed:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No SIGTERM while the last words are said: where one rank has died, torchrun ends the others within moments."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
