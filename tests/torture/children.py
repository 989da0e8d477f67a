"""Jobs in forked processes that are killed after a delay or at a file system operation.

The processes are forked, because a new process spends its first seconds importing torch, where a kill tests nothing.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gridcap.common.errors import GridcapError
from gridcap.common.files import write_json
from tests.torture.case import FailedError

SUCCESS, USER_ERROR, CRASH = 0, 70, 71  # exit statuses
SELF_KILLED = -1.0  # instead of a delay: the job kills itself, see `killed_at`
FILE_EVENTS = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}  # names of audit events
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # reported by the commands as errors with a hint


def start(job: Callable[[], object]) -> int:
    """Run a job in a forked process and return its id. It exits with SUCCESS, USER_ERROR, or CRASH."""
    if child := os.fork():
        return child
    status = CRASH
    try:
        job()
        status = SUCCESS
    except GridcapError as error:
        print(f"{error.message}\n  what to do: {error.hint}", file=sys.stderr, flush=True)
        status = USER_ERROR
    except OSError as error:
        status = USER_ERROR if error.errno in FULL_DISK else CRASH
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Wait for a process and return its exit status, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@dataclass(frozen=True)
class Extent:
    """Extent of an undisturbed job.

    Attributes:
        seconds: duration.
        events: number of events that `killed_at` counts.
    """

    seconds: float
    events: int


def measure(job: Callable[[], object], extent_file: Path) -> None:
    """Run a job undisturbed in a process and write its Extent to a file. Raises FailedError like `run`."""

    def measured() -> None:
        events: list[None] = []
        _watch(lambda: events.append(None))
        start = time.monotonic()
        job()
        write_json(extent_file, {"seconds": time.monotonic() - start, "events": len(events)})

    run([measured], [None])


def read_extent(extent_file: Path) -> Extent:
    """Read the result of `measure`."""
    return Extent(**json.loads(extent_file.read_text(encoding="utf-8")))


def _watch(on_event: Callable[[], object]) -> None:
    """Call `on_event` before every rename, removal, link, mkdir, truncation, and opening for writing from now on."""

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in FILE_EVENTS or (name == "open" and isinstance(arguments[2], int) and arguments[2] & WRITE_FLAGS):
            on_event()

    sys.addaudithook(hook)


def killed_at(job: Callable[[], object], event: int) -> Callable[[], object]:
    """Return a job that kills itself with SIGKILL right before its `event`-th file system operation, counted from 0."""
    remaining = [event]

    def count() -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        _watch(count)
        job()

    return killed


def run(jobs: Sequence[Callable[[], object]], delays: Sequence[float | None]) -> None:
    """Run each job in a process and kill it after its delay in seconds; None and SELF_KILLED do not kill it.

    Raises:
        FailedError: a job failed without being killed.
    """
    start_time = time.monotonic()
    children = {start(job): delay for job, delay in zip(jobs, delays, strict=True)}
    for child, delay in sorted(children.items(), key=lambda item: (item[1] is None, item[1])):
        if delay not in (None, SELF_KILLED):
            time.sleep(max(0.0, start_time + delay - time.monotonic()))
            os.kill(child, signal.SIGKILL)
    for child, delay in children.items():
        status = wait(child)
        if status != SUCCESS and not (delay is not None and status == -signal.SIGKILL):
            raise FailedError(f"a process exited with status {status}")
