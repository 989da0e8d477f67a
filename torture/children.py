"""Jobs in forked processes, which may be killed.

Forked, since a process of its own spends its first seconds on loading torch, and a kill there shows nothing.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from common.errors import GridcapError
from torture.case import FailedError

WELL, WITH_AN_ERROR, BADLY = 0, 70, 71
_WORKS_AGAIN = (errno.ENOSPC, errno.EDQUOT)  # what the commands turn into an error with a next step


def start(job: Callable[[], object]) -> int:
    """Fork a process for a job; its id. It ends WELL, WITH_AN_ERROR made for users, or BADLY."""
    if child := os.fork():
        return child
    status = BADLY
    try:
        job()
        status = WELL
    except GridcapError as error:
        print(f"{error.what}\n  what to do: {error.hint}", file=sys.stderr, flush=True)
        status = WITH_AN_ERROR
    except OSError as error:
        status = WITH_AN_ERROR if error.errno in _WORKS_AGAIN else BADLY
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def end(child: int) -> int:
    """Wait for a process; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def seconds_of(job: Callable[[], object]) -> float:
    """Run a job in a process that nothing disturbs; how long it took. Raises FailedError as `run`."""
    begin = time.monotonic()
    run([job], [None])
    return time.monotonic() - begin


def run(jobs: Sequence[Callable[[], object]], kills: Sequence[float | None]) -> None:
    """Run each job in a process, and kill it after so many seconds unless it is None.

    Raises:
        FailedError: a job did not end well and was not killed.
    """
    begin = time.monotonic()
    children = {start(job): moment for job, moment in zip(jobs, kills, strict=True)}
    for child, moment in sorted(children.items(), key=lambda item: (item[1] is None, item[1])):
        if moment is not None:
            time.sleep(max(0.0, begin + moment - time.monotonic()))
            os.kill(child, signal.SIGKILL)
    for child, moment in children.items():
        status = end(child)
        if status != WELL and not (moment is not None and status == -signal.SIGKILL):
            raise FailedError(f"a process ended with {status}")
