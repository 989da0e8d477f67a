"""Leases: at most one process writes to a folder.

A lease is a file in the folder that names its holder. The holder updates the modification time of the file every few
seconds (the heartbeat). A lease is stale, and is taken over, if

* its holder ran on this machine and has ended, which is detected immediately; or
* its holder runs elsewhere and has shown no heartbeat for `STALE_AFTER` seconds. The heartbeat is observed instead of
  compared with a clock, because the clocks of the machines that share a network file system may differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gridcap.common.errors import FolderInUseError
from gridcap.common.files import publish_text, this_machine

LEASE_FILE = ".lease.json"
HEARTBEAT_INTERVAL = 10.0  # seconds
STALE_AFTER = 90.0  # seconds without a heartbeat
POLL_INTERVAL = 1.0  # seconds
ABANDONED_AFTER = 24 * 3600.0  # age in seconds that no difference between clocks explains

_ATTEMPTS = 100


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease.

    Attributes:
        token: unique id of the lease.
        host: host name, for messages.
        machine: identifies the kernel and the process namespace in which `pid` is valid.
        pid: process id.
        process_start: start time of the process in clock ticks since boot, or None if unknown. Process ids are reused.
        since: local time at which the lease was acquired, for messages.
        command: command line, for messages.
    """

    token: str
    host: str
    machine: str
    pid: int
    process_start: int | None
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, running since {self.since} ({self.command})"


class Lease:
    """A lease held by this process."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path, self._holder = path, holder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the lease is still held. Call this before writing results.

        A deleted lease file is restored.

        Raises:
            FolderInUseError: another process took over the lease, because this one was suspended for too long.
            OSError: the lease cannot be read.
        """
        if not self._path.exists() and publish_text(self._path, _to_json(self._holder)):
            return
        current = _read(self._path)
        if current is None or current.token != self._holder.token:
            raise FolderInUseError(
                f"{self._path.parent}: taken over by {current or 'another process'} while this process was suspended",
                "let the other process finish",
            )

    def release(self) -> None:
        """Stop the heartbeat and remove the lease, if it is still held by this process."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # a lease that remains is stale when this process has ended
            current = _read(self._path)
            if current is not None and current.token == self._holder.token:
                self._path.unlink()

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(HEARTBEAT_INTERVAL):
            with contextlib.suppress(OSError):  # a file system that is briefly unavailable
                current = _read(self._path)
                if current is not None and current.token != self._holder.token:
                    return  # `check` reports it
                os.utime(self._path)  # works on a full disk, too


@contextlib.contextmanager
def exclusive_folder(folder: Path, notify: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the lease of a folder for the duration of the block.

    The folder is created. If the block leaves it empty, a new folder is removed again.

    Args:
        folder: folder to write to.
        notify: receives a message when a stale lease is taken over, or when this process has to wait.

    Raises:
        FolderInUseError: another process writes to the folder.
        OSError: the folder cannot be written, or its lease cannot be read.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LEASE_FILE
    try:
        lease = Lease(path, _acquire(path, notify))
        try:
            yield lease
        finally:
            lease.release()
    finally:
        with contextlib.suppress(OSError):  # not empty
            for new in created:
                new.rmdir()


def _acquire(path: Path, notify: Callable[[str], None]) -> Holder:
    holder = Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process_start=_process_start(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=" ".join(sys.argv)[:200],
    )
    for _ in range(_ATTEMPTS):
        if not path.exists() and publish_text(path, _to_json(holder)):
            current = _read(path)  # on file systems without hard links, the last writer wins
            if current is not None and current.token == holder.token:
                return holder
            continue
        current = _read(path)
        if current is None and not path.exists():
            continue  # released in the meantime
        if not _is_stale(path, current, notify):
            raise FolderInUseError(
                f"{path.parent}: in use by {current}", "wait for it to finish, or choose another folder"
            )
        if _remove_stale(path, current):
            notify(f"{path.parent}: taking over from {current or 'an unknown process'}, which is no longer active")
    raise FolderInUseError(f"{path.parent}: several processes compete for this folder", "start only one of them")


def _is_stale(path: Path, current: Holder | None, notify: Callable[[str], None]) -> bool:
    """Return whether a lease is stale, observing its heartbeat if the holder runs elsewhere."""
    if current is not None and current.machine == _machine():
        return not _is_running(current)
    heartbeat = _heartbeat(path)
    if heartbeat is None or time.time() - heartbeat / 1e9 > ABANDONED_AFTER:
        return True
    notify(f"{path.parent}: in use by {current or 'an unknown process'}; waiting for its heartbeat")
    deadline = time.monotonic() + STALE_AFTER
    while time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL)
        if (latest := _heartbeat(path)) != heartbeat:
            return latest is None
    return True


def _remove_stale(path: Path, expected: Holder | None) -> bool:
    """Remove a stale lease, unless another process has replaced it in the meantime."""
    removed = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.rename(removed)
    except FileNotFoundError:
        return False
    try:
        if _read(removed) == expected:
            return True
        publish_text(path, removed.read_text(encoding="utf-8"))  # put the lease of the other process back
        return False
    finally:
        removed.unlink(missing_ok=True)


def _read(path: Path) -> Holder | None:
    """Return the holder that a lease names, or None if the file is missing or invalid.

    Raises:
        OSError: the file cannot be read, which does not mean that the lease is stale.
    """
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _to_json(holder: Holder) -> str:
    return json.dumps(asdict(holder), indent=2) + "\n"


def _heartbeat(path: Path) -> int | None:
    """Return the modification time of a lease in nanoseconds, or None if it is missing."""
    try:
        with open(path, "rb") as file:  # on NFS, opening a file refreshes its attributes
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _machine() -> str:
    """Return the identity of the booted kernel and of the process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{this_machine()}-{boot}"


def _is_running(holder: Holder) -> bool:
    """Return whether the process of a lease still exists on this machine."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return holder.process_start == _process_start(holder.pid)


def _process_start(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None if unknown, or -1 for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])
