"""Stop signals end a command as cleanly as Ctrl-C does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from gridcap.common.errors import EXIT_INTERRUPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # schedulers send them as a warning before they kill a process


class StopSignalError(KeyboardInterrupt):
    """A stop signal arrived. It is handled like Ctrl-C, except for the exit status."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_status_of(error: KeyboardInterrupt) -> int:
    """Return the exit status after Ctrl-C or a stop signal."""
    return 128 + error.number if isinstance(error, StopSignalError) else EXIT_INTERRUPTED


@contextlib.contextmanager
def stop_signals_as_interrupts() -> Iterator[None]:
    """Raise StopSignalError in the body when a stop signal arrives. Does nothing outside the main thread."""

    def stop(number: int, frame: object) -> None:
        for other in STOP_SIGNALS:  # a second signal must not interrupt the cleanup
            signal.signal(other, signal.SIG_IGN)
        raise StopSignalError(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
