"""Ctrl-C: the first asks whatever runs to stop where nothing is lost, the second stops it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STDERR = 2  # the file descriptor

_asked = threading.Event()


@contextmanager
def heard() -> Iterator[None]:
    """Turns the first Ctrl-C into a request, which `check` raises; a second interrupts as usual.

    An exception would lose the buffers that a step has just taken, and one that is raised
    while XLA compiles ends in a segmentation fault when Python exits (jaxlib 0.10.2).
    """
    _asked.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    before = signal.getsignal(signal.SIGINT)

    def request(*_: Any) -> None:
        _asked.set()
        signal.signal(signal.SIGINT, before)
        # Not print: it may be what the signal has interrupted.
        os.write(STDERR, b"\nstopping after this step (Ctrl-C again: at once)\n")

    signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _asked.clear()


def asked() -> bool:
    """Whether Ctrl-C was pressed."""
    return _asked.is_set()


def check() -> None:
    """Raises KeyboardInterrupt where one was asked for: called where stopping loses nothing."""
    if asked():
        raise KeyboardInterrupt
