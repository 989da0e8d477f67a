"""Graceful stop: signals that end a run are deferred until the current step is done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from gridcap.common.command.signals import detach_terminal

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


@contextlib.contextmanager
def defer_stop_signals() -> Iterator[Callable[[], Callable[[], None] | None]]:
    """Defer the first stop signal; a second one takes effect immediately.

    Yields:
        A function to call after each step. It returns None, or, after a signal, a function that raises the signal
        again with the original handlers.
    """
    received: list[int] = []
    original: dict[int, Any] = {}

    def defer(number: int, frame: FrameType | None) -> None:
        restore()
        received.append(number)
        if number == signal.SIGHUP:
            detach_terminal()

    def restore() -> None:
        for number, handler in original.items():
            signal.signal(number, handler)
        original.clear()

    def pending() -> Callable[[], None] | None:
        return (lambda: signal.raise_signal(received[0])) if received else None

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if callable(signal.getsignal(number)):  # keep SIG_IGN and SIG_DFL
                original[number] = signal.signal(number, defer)
    try:
        yield pending
    finally:
        restore()
