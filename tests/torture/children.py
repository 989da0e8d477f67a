"""Jobs in forked processes, which may be killed: at a moment, or at a step of theirs on the disk.

Forked, since a process of its own spends its first seconds on loading torch, and a kill there shows nothing.
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

WELL, WITH_AN_ERROR, BADLY = 0, 70, 71
BY_ITSELF = -1.0  # in place of a moment: the job is one of `dying_at`
_EVENTS = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}  # as Python audits them
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
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
        print(f"{error.message}\n  what to do: {error.hint}", file=sys.stderr, flush=True)
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


@dataclass(frozen=True)
class Extent:
    """How far a job goes when nothing disturbs it.

    Attributes:
        seconds: that it takes.
        events: of those that `dying_at` counts.
    """

    seconds: float
    events: int


def measure(job: Callable[[], object], note: Path) -> None:
    """Run a job in a process that nothing disturbs, and keep its Extent in a file. Raises FailedError as `run`."""

    def measured() -> None:
        seen: list[None] = []
        _watch(lambda: seen.append(None))
        begin = time.monotonic()
        job()
        write_json(note, {"seconds": time.monotonic() - begin, "events": len(seen)})

    run([measured], [None])


def extent_of(note: Path) -> Extent:
    """What `measure` kept."""
    return Extent(**json.loads(note.read_text(encoding="utf-8")))


def _watch(on_event: Callable[[], object]) -> None:
    """Call it before this process names, removes, links, makes or opens for writing anything, for as long as it is."""

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in _EVENTS or (name == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING):
            on_event()

    sys.addaudithook(hook)


def dying_at(job: Callable[[], object], event: int) -> Callable[[], object]:
    """A job that is killed with SIGKILL when it is about to name, remove, link, make or open for writing something
    for the `event`-th time, from 0 on. If it never does, it ends well."""
    left = [event]

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying() -> None:
        _watch(count)
        job()

    return dying


def run(jobs: Sequence[Callable[[], object]], kills: Sequence[float | None]) -> None:
    """Run each job in a process, and kill it after so many seconds unless it is None or BY_ITSELF.

    Raises:
        FailedError: a job did not end well and was not killed.
    """
    begin = time.monotonic()
    children = {start(job): moment for job, moment in zip(jobs, kills, strict=True)}
    for child, moment in sorted(children.items(), key=lambda item: (item[1] is None, item[1])):
        if moment not in (None, BY_ITSELF):
            time.sleep(max(0.0, begin + moment - time.monotonic()))
            os.kill(child, signal.SIGKILL)
    for child, moment in children.items():
        status = end(child)
        if status != WELL and not (moment is not None and status == -signal.SIGKILL):
            raise FailedError(f"a process ended with {status}")
