"""CPU cores, threads, and memory that this process may use: affinity, cgroup limits, and load.

Linux; elsewhere, all cores, and an unknown amount of memory.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
LOAD_WINDOW = 0.2  # seconds over which the load is measured
PHOTO_BYTES = 3 * 24_000_000  # of a decoded photo of 24 megapixels, which each decoding thread holds
BUFFER_SHARE = 4  # buffers of one kind use at most this fraction (1/4) of the available memory
# Folder of cgroup v2 or v1: limit, current usage, and the field of memory.stat with reclaimable page cache.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_cores() -> int:
    """Return the number of cores that this process may use: its CPU affinity, limited by its cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota() -> float | None:
    """Return the CPU quota of this process's cgroup in cores; None if there is none."""
    quotas = [quota for folder in _cgroup_folders("cpu") if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def available_memory() -> int | None:
    """Return the bytes of memory that this process may still allocate; None if unknown.

    The free memory of the machine, or what a limit of the process's cgroup (container, Slurm) leaves, if that is less.
    Page cache counts as free.
    """
    free = [value for folder in _cgroup_folders("memory") if (value := _free_memory_of(folder)) is not None]
    if (machine := _free_memory_of_machine()) is not None:
        free.append(machine)
    return min(free, default=None)


def fit_in_memory(count: int, size: int) -> int:
    """Return how many buffers to use: `count`, or fewer, but at least one, in a quarter of the available memory.

    Args:
        count: desired number of buffers.
        size: bytes of one buffer.
    """
    available = available_memory()
    return count if available is None else max(1, min(count, available // BUFFER_SHARE // max(1, size)))


def _free_memory_of(folder: Path) -> int | None:
    """Return the bytes that the limit of one cgroup leaves; None if it has no limit."""
    for limit, usage, cache in _MEMORY_FILES:
        try:
            total = int((folder / limit).read_text())  # "max" is not a number
            used = int((folder / usage).read_text())
        except (OSError, ValueError):
            continue
        return max(0, total - max(0, used - _read_field(folder / "memory.stat", cache)))
    return None


def _free_memory_of_machine() -> int | None:
    kibibytes = _read_field(_PROC / "meminfo", "MemAvailable:")
    return kibibytes * 1024 if kibibytes else None


def _read_field(file: Path, name: str) -> int:
    """Return the value of a line "name value ..."; 0 if there is none."""
    try:
        return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[:1] == [name]), 0)
    except (OSError, ValueError, IndexError):
        return 0


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of its ancestors that have a controller, for cgroup v1 and v2."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUP_ROOT / controllers if controllers else _CGROUP_ROOT
        folder = root / path.lstrip("/")
        # In a container, the path may be that of the host; then the root is the container's own group.
        yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(root))


def _quota_of(folder: Path) -> float | None:
    """Return the quota of one cgroup in cores; None if it has none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def cores_used_by_others(seconds: float = LOAD_WINDOW) -> float:
    """Measure how many of the cores available to this process other processes use. Sleeps for the given time."""
    busy, own = _busy_seconds(), sum(os.times()[:2])
    start = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - start
    after = _busy_seconds()
    if busy is None or after is None:
        return 0.0
    return max(0.0, (after - busy - (sum(os.times()[:2]) - own)) / elapsed)


def _busy_seconds() -> float | None:
    """Return the time for which the cores of this process' affinity have been busy, summed; None if unknown."""
    try:
        lines = (_PROC / "stat").read_text().splitlines()
        ticks = os.sysconf("SC_CLK_TCK")
        own = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, ValueError, AttributeError):
        return None
    busy = 0
    for line in lines:
        name, *values = line.split()
        if name in own:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, values[:8])
            busy += user + nice + system + irq + softirq + steal
    return busy / ticks


@dataclass(frozen=True)
class ThreadChoice:
    """The number of CPU threads of this process.

    Attributes:
        count: number of threads; None: the choice is left to torch.
        reason: why, if that is worth reporting; else empty.
    """

    count: int | None
    reason: str = ""


def choose_threads(requested: int | None, environ: Mapping[str, str]) -> ThreadChoice:
    """Choose the number of CPU threads.

    The request of the user comes first, then OMP_NUM_THREADS. Otherwise every available core gets a thread, except for
    those that other processes keep busy: with one of two cores taken, training ran at 14 images/s with two threads
    and at 52 with one, because each parallel region waits for the delayed thread.

    Args:
        requested: value of --threads.
        environ: environment variables.
    """
    if requested is not None:
        return ThreadChoice(requested)
    if environ.get("OMP_NUM_THREADS"):
        return ThreadChoice(None)
    cores = available_cores()
    quota = cpu_quota()
    limit = "" if quota is None or quota > cores else f"the CPU quota is {quota:g} core{'' if quota == 1 else 's'}"
    if cores == 1:
        return ThreadChoice(1, limit)
    busy = round(cores_used_by_others())
    if busy == 0:
        return ThreadChoice(cores, limit)
    load = f"other processes use {min(busy, cores)} of {cores} cores"
    return ThreadChoice(max(1, cores - busy), load)
