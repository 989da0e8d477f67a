"""Process-wide settings of a command: memory allocator, OpenMP, and number of CPU threads."""

from __future__ import annotations

import ctypes
import os
import sys

from gridcap.common.resources import choose_threads
from gridcap.common.text import plural

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SPIN_COUNT = "30000"  # about 0.1 ms; GNU OpenMP's default is ten times as long


class _Threads:
    """The number of threads that the running command asks for; applied when torch is first used."""

    requested: int | None = None
    pending = False


def tune_process(threads: int | None = None) -> None:
    """Apply the settings. Call this once per command, before torch is imported: torch reads some of them on import.

    Args:
        threads: number of CPU threads; None: chosen by `choose_threads` when the command starts to compute.
    """
    keep_large_buffers()
    spin_briefly()
    _Threads.requested, _Threads.pending = threads, True


def apply_threads() -> None:
    """Set the number of CPU threads that was requested or is chosen now, and report the reason. Loads torch.

    Does nothing in a process that has not called `tune_process`, and on later calls.
    """
    if not _Threads.pending:
        return
    _Threads.pending = False
    choice = choose_threads(_Threads.requested, os.environ)
    if choice.count is None:
        return
    import torch

    torch.set_num_threads(choice.count)
    if choice.reason:
        threads = plural(choice.count, "CPU thread")
        print(f"note: using {threads}, because {choice.reason} (--threads overrides this)", file=sys.stderr)


def keep_large_buffers() -> bool:
    """Make glibc's malloc serve large blocks from the heap and keep freed memory.

    By default, glibc returns every large buffer to the kernel and faults it in again for the next batch, which halves
    the throughput of convolutions and of JPEG decoding on the CPU.

    Returns:
        Whether the allocator accepted the settings. Always False without glibc (macOS, musl).
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return bool(sum(mallopt(name, value) for name, value in settings) == len(settings))


def spin_briefly() -> None:
    """Make idle OpenMP threads yield their core after about 0.1 ms. OpenMP variables set by the user are kept.

    With the default (about 1 ms), the thread that prefetches the next batch finds no idle core: training waits twice as
    long for its batches and does not compute faster (2 cores, InceptionV3 grids, LSTM). Without any spinning
    (OMP_WAIT_POLICY=passive), a training step takes a third longer.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
