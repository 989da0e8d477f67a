"""Stopping between two steps: the signal that ends a run waits until the step in hand is done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@contextlib.contextmanager
def defer_stop_signals() -> Iterator[Callable[[], Callable[[], None] | None]]:
    """Hold back the first signal that asks to stop; a second one acts at once.

    Yields:
        A function for the end of each step: None, or, when a signal has come, what raises as the signal would have.
    """
    held: list[tuple[int, FrameType | None]] = []
    before: dict[int, Any] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        restore()
        held.append((number, frame))

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def pending() -> Callable[[], None] | None:
        return None if not held else lambda: signal.raise_signal(held[0][0])

    if threading.current_thread() is threading.main_thread():
        for number in _STOPPING:
            if callable(signal.getsignal(number)):  # what is ignored, or ends the process by itself, stays so
                before[number] = signal.signal(number, hold)
    try:
        yield pending
    finally:
        restore()
