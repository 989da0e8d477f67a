"""Several processes of one command on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import IO

from gridcap.extract.cluster.share import Share


class LocalProcesses:
    """Processes that divide one share: start, relay of their output, stop, exit statuses.

    torchrun is not used: it kills all processes when one exits with a nonzero status (including 3, "some images are
    invalid"), always exits with 1 itself, prints a traceback on Ctrl-C, and needs a port. Extraction processes do not
    communicate.

    Args:
        command: command of one process; `--rank` and `--world-size` are appended.
        share: the share to divide.
        count: number of processes.
        threads: OpenMP threads per process; None keeps torch's default. OMP_NUM_THREADS overrides it.
    """

    def __init__(self, command: Sequence[str], share: Share, count: int, threads: int | None) -> None:
        environ = dict(os.environ)
        if threads is not None:
            environ.setdefault("OMP_NUM_THREADS", str(threads))
        self._print_lock = threading.Lock()
        self._processes: list[subprocess.Popen[str]] = []
        self._relays: list[threading.Thread] = []
        try:
            for local_rank in range(count):
                part = share.subdivide(local_rank, count, "")
                self._start(command, part, {**environ, "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(count)})
        except BaseException:
            self.stop(signal.SIGTERM)
            raise

    def _start(self, command: Sequence[str], part: Share, environ: dict[str, str]) -> None:
        process = subprocess.Popen(
            [*command, "--rank", str(part.rank), "--world-size", str(part.world_size)],
            env={**environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # In a session of its own, a process receives Ctrl-C once, through `stop`, and not from the terminal too.
            start_new_session=True,
        )
        self._processes.append(process)
        assert process.stdout is not None
        relay = threading.Thread(target=self._relay, args=(part.rank, process.stdout), daemon=True)
        relay.start()
        self._relays.append(relay)

    def _relay(self, rank: int, lines: IO[str]) -> None:
        from tqdm import tqdm

        with lines:
            for line in lines:
                with self._print_lock:
                    tqdm.write(f"[{rank}] {line.rstrip()}")

    def running(self) -> bool:
        """Return whether any process is still running."""
        return any(process.poll() is None for process in self._processes)

    def wait(self) -> list[int]:
        """Wait for all processes and return their exit statuses in rank order, after printing all their output."""
        statuses = [process.wait() for process in self._processes]
        for relay in self._relays:
            relay.join()
        return statuses

    def stop(self, signum: signal.Signals) -> None:
        """Send a signal to all processes and wait until they exit; a second Ctrl-C meanwhile kills them."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signum)
        try:
            self.wait()
        finally:
            for process in self._processes:
                process.kill()
