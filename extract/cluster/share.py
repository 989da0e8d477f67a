"""Which shards are mine: the work splits by itself from the environment, with no server and no lock."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from gridcap.common.errors import UserError


@dataclass(frozen=True)
class Share:
    """One worker's part of the shards: every `workers`-th, from its own number on.

    It depends on nothing but the two numbers, so that workers that start at different times agree.

    Attributes:
        worker: its number, from 0.
        workers: how many there are.
        source: where the two numbers came from, for the screen.
    """

    worker: int = 0
    workers: int = 1
    source: str = field(default="", compare=False)

    def of(self, shards: int) -> range:
        """The numbers of this worker's shards out of `shards`."""
        return range(self.worker, shards, self.workers)

    def divided(self, worker: int, workers: int, source: str) -> Share:
        """The part of this share that one of `workers` takes.

        The shards of all parts together are those of this share, whatever the other shares are divided by: tasks
        of one array may run on machines with different numbers of GPUs.
        """
        return Share(self.worker + self.workers * worker, self.workers * workers, source)

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        return f"worker {self.worker} of {self.workers}{source}"


WHOLE = Share()


def find_share(environ: Mapping[str, str], worker: int | None, workers: int | None) -> Share:
    """This process's share: from the flags, else from torchrun, Slurm or Kubernetes, else the whole.

    Args:
        environ: the environment variables.
        worker: of `--worker`.
        workers: of `--workers`; alone it serves Kubernetes, which tells a pod its number but not how many there are.

    Raises:
        UserError: a number without its partner, out of range or malformed, with the flag or variable that holds it.
    """
    if worker is not None:
        if workers is None:
            raise UserError(f"--worker {worker}: of how many?", "give --workers too")
        return _checked(worker, workers, "flags", f"--worker {worker} --workers {workers}")
    launcher = _torchrun(environ)
    array = _slurm_array(environ)
    step = _slurm_step(environ)
    if launcher is None and array is None and step is None:
        return _kubernetes(environ, workers)
    if workers is not None:
        raise UserError(
            f"--workers {workers}: which of them is this one?",
            "give --worker too, or leave both away: Slurm or torchrun has already numbered this process",
        )
    inner = launcher or step
    if array is None:
        return inner or WHOLE
    return array.divided(inner.worker, inner.workers, f"{array.source}, {inner.source}") if inner else array


def local_device(environ: Mapping[str, str], device: str, gpus: int) -> str:
    """The device of one of several processes on a machine: each the next GPU, in a circle.

    Args:
        environ: the environment variables, where torchrun, Slurm or `--devices` numbered the machine's processes.
        device: as configured; only a choice that is left open ("auto", "cuda") is made here.
        gpus: how many this process can see.
    """
    local = local_number(environ)
    if local is None or gpus < 2 or device not in ("auto", "cuda"):
        return device
    return f"cuda:{local % gpus}"


def local_number(environ: Mapping[str, str]) -> int | None:
    """The number of this process among those of one launcher on this machine; None if it was started alone.

    Raises:
        UserError: the variable that holds it is malformed.
    """
    number = _number(environ, "LOCAL_RANK")
    return _number(environ, "SLURM_LOCALID") if number is None and "SLURM_STEP_ID" in environ else number


def _torchrun(environ: Mapping[str, str]) -> Share | None:
    rank, world = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if rank is None and world is None:
        return None
    if rank is None or world is None:
        missing, there = ("RANK", "WORLD_SIZE") if rank is None else ("WORLD_SIZE", "RANK")
        raise UserError(
            f"{there}={environ[there]} is set and {missing} is not: torchrun sets both",
            f"unset {there}, or say the share with --worker and --workers",
        )
    return _checked(rank, world, "torchrun", f"RANK={rank} WORLD_SIZE={world}")


def _slurm_array(environ: Mapping[str, str]) -> Share | None:
    task, count = _number(environ, "SLURM_ARRAY_TASK_ID"), _number(environ, "SLURM_ARRAY_TASK_COUNT")
    if task is None:
        return None
    if count is None:
        raise UserError(
            f"SLURM_ARRAY_TASK_ID={task} is set and SLURM_ARRAY_TASK_COUNT is not",
            "say the share with --worker and --workers",
        )
    first = _number(environ, "SLURM_ARRAY_TASK_MIN") or 0
    step = _number(environ, "SLURM_ARRAY_TASK_STEP") or 1
    index, rest = divmod(task - first, step)
    if rest or not 0 <= index < count:  # --array=0,5,7: Slurm does not tell a task what the others' numbers are
        raise UserError(
            f"SLURM_ARRAY_TASK_ID={task}: the array's {count} numbers are not in even steps of {step} from {first}",
            f"submit it with --array=0-{count - 1}, or say the share with --worker and --workers",
        )
    return Share(index, count, "Slurm array")


def _slurm_step(environ: Mapping[str, str]) -> Share | None:
    """From srun. A batch script without it is one process, however many tasks were asked for."""
    if "SLURM_STEP_ID" not in environ:
        return None
    task, tasks = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    if task is None or tasks is None:
        return None
    return _checked(task, tasks, "Slurm tasks", f"SLURM_PROCID={task} SLURM_STEP_NUM_TASKS={tasks}")


def _kubernetes(environ: Mapping[str, str], workers: int | None) -> Share:
    index = _number(environ, "JOB_COMPLETION_INDEX")
    if index is None:
        if workers is not None:
            raise UserError(f"--workers {workers}: which of them is this one?", "give --worker too, from 0")
        return WHOLE
    if workers is None:
        raise UserError(
            f"JOB_COMPLETION_INDEX={index}: Kubernetes does not say of how many",
            "give --workers with the number that stands under completions in the job",
        )
    return _checked(index, workers, "Kubernetes", f"JOB_COMPLETION_INDEX={index} --workers {workers}")


def _checked(worker: int, workers: int, source: str, shown: str) -> Share:
    if not 0 <= worker < workers:
        raise UserError(f"{shown}: no such worker", "workers are numbered from 0 to one less than how many there are")
    return Share(worker, workers, source)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            f"{name}={text!r}: not a whole number", f"unset {name}, or say the share with --worker and --workers"
        )
    return int(text)


class LocalWorkers:
    """Several processes of one command on this machine: what they print, how they are stopped, how they end.

    They are plain processes, not torchrun's: torchrun kills all when one ends with a status other than 0, 3 among
    them, ends with 1 whatever theirs was, answers Ctrl-C with a traceback, and needs a port; our workers have
    nothing to say to each other.
    """

    def __init__(self, command: Sequence[str], share: Share, workers: int, threads: int | None) -> None:
        """Start them.

        Args:
            command: of one worker; `--worker` and `--workers` are added.
            share: what they divide between them.
            workers: how many to start.
            threads: that each computes with; None leaves it to torch. OMP_NUM_THREADS in the environment goes over it.
        """
        environ = dict(os.environ)
        if threads is not None:
            environ.setdefault("OMP_NUM_THREADS", str(threads))
        self._printing = threading.Lock()
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        try:
            for local in range(workers):
                self._start(command, share.divided(local, workers, ""), {**environ, "LOCAL_RANK": str(local)})
        except BaseException:
            self.stop(signal.SIGTERM)
            raise

    def _start(self, command: Sequence[str], part: Share, environ: dict[str, str]) -> None:
        process = subprocess.Popen(
            [*command, "--worker", str(part.worker), "--workers", str(part.workers)],
            env={**environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A session of its own: Ctrl-C in the terminal then reaches them once, through `stop`, not twice.
            start_new_session=True,
        )
        self._processes.append(process)
        assert process.stdout is not None
        reader = threading.Thread(target=self._relay, args=(part.worker, process.stdout), daemon=True)
        reader.start()
        self._readers.append(reader)

    def _relay(self, worker: int, lines: IO[str]) -> None:
        from tqdm import tqdm

        with lines:
            for line in lines:
                with self._printing:
                    tqdm.write(f"[{worker}] {line.rstrip()}")

    def running(self) -> bool:
        """Whether any is still running."""
        return any(process.poll() is None for process in self._processes)

    def wait(self) -> list[int]:
        """Wait for all to end; their exit statuses, in order, with all they printed shown."""
        statuses = [process.wait() for process in self._processes]
        for reader in self._readers:
            reader.join()
        return statuses

    def stop(self, number: signal.Signals) -> None:
        """Send all the signal, and wait until they have ended; a second Ctrl-C meanwhile kills them."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
        try:
            self.wait()
        finally:
            for process in self._processes:
                process.kill()
