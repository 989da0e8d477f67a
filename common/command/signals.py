"""Stop signals end a command as cleanly as Ctrl-C does."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Iterator

from gridcap.common.errors import EXIT_INTERRUPTED

# Schedulers send SIGTERM or SIGUSR2 as a warning before they kill a process; a terminal that closes sends SIGHUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


class StopSignalError(KeyboardInterrupt):
    """A stop signal arrived. It is handled like Ctrl-C, except for the exit status."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_status_of(error: KeyboardInterrupt) -> int:
    """Return the exit status after Ctrl-C or a stop signal."""
    return 128 + error.number if isinstance(error, StopSignalError) else EXIT_INTERRUPTED


def detach_terminal() -> None:
    """Redirect output to a closed terminal to /dev/null, so that writing to it does not fail during the cleanup."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(devnull, descriptor)
    os.close(devnull)


@contextlib.contextmanager
def stop_signals_as_interrupts() -> Iterator[None]:
    """Raise StopSignalError in the body when a stop signal arrives. Does nothing outside the main thread."""

    def stop(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            detach_terminal()
        for other in STOP_SIGNALS:  # a second signal must not interrupt the cleanup
            signal.signal(other, signal.SIG_IGN)
        raise StopSignalError(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    previous = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
