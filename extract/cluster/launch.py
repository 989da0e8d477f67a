"""Extraction with several processes on this machine (`--devices`)."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gridcap.common.config import PipelineConfig
from gridcap.common.errors import EXIT_INVALID, GridcapError, UserError
from gridcap.common.progress import progress_bar
from gridcap.common.text import plural
from gridcap.extract.cluster.processes import LocalProcesses
from gridcap.extract.cluster.share import Share
from gridcap.extract.job import Extraction
from gridcap.extract.run import extract_features
from gridcap.extract.summary import Summary


def count_processes(config: PipelineConfig, devices: str) -> int:
    """Return the number of processes that `--devices` selects on this machine.

    Raises:
        UserError: several processes would share one device.
    """
    device = config.extract.device
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    count = max(1, gpus) if devices == "auto" else int(devices)
    if count > 1 and ":" in device:
        raise UserError(f"--devices {devices} --device {device}: several processes on one device", "omit --device")
    return count


def threads_of(processes: int) -> int:
    """Return the number of threads per process if several processes divide the cores of this machine."""
    return max(1, torch.get_num_threads() // processes)


@dataclass(frozen=True)
class LocalRun:
    """A share of an extraction, to be divided among processes on this machine.

    Attributes:
        share: shards to write.
        processes: number of processes.
        command: command of one process; its rank and world size are added.
    """

    share: Share
    processes: int
    command: Sequence[str]


def extract_by_processes(extraction: Extraction, local: LocalRun, retry: bool) -> Summary:
    """Extract a share with several processes on this machine.

    Args:
        extraction: the extraction, whose plan is on disk.
        local: the share and its processes.
        retry: read invalid images again.

    Raises:
        GridcapError: a process failed; its output has been shown.
    """
    plan = extraction.plan
    own = local.share.of(plan.shards)
    existing = _count(extraction, own)
    start = time.perf_counter()
    if existing < len(own) or retry:
        on_cpu = extraction.config.extract.device == "cpu" or not torch.cuda.is_available()
        threads = threads_of(local.processes) if on_cpu else None
        processes = LocalProcesses(local.command, local.share, local.processes, threads)
        failed = [
            f"[{local.share.subdivide(i, local.processes, '').rank}] with status {status}"
            for i, status in enumerate(_wait_with_progress(processes, extraction, own))
            if status not in (0, EXIT_INVALID)
        ]
        if failed:
            raise GridcapError(
                f"{len(failed)} of {plural(local.processes, 'process', 'processes')} failed: {', '.join(failed)}",
                "see their messages above; rerun the command to write the missing shards",
            )
    written = _count(extraction, own) - existing
    seconds = time.perf_counter() - start
    if len(plan.existing_shards(extraction.folder)) < plan.shards:
        return Summary(plan.images, plan.shards, existing, written, complete=False, seconds=seconds)
    summary = extract_features(extraction, show_progress=False)
    if written or retry:
        return replace(summary, existing=plan.shards - written, written=written, seconds=seconds)
    return summary


def _count(extraction: Extraction, shards: range) -> int:
    """Count the existing shards among `shards`."""
    return sum(shard in shards for shard in extraction.plan.existing_shards(extraction.folder))


def _wait_with_progress(processes: LocalProcesses, extraction: Extraction, own: range) -> list[int]:
    """Wait for the processes, with a progress bar over their shards, and return their exit statuses."""
    try:
        with progress_bar(total=len(own), unit="shard", desc=extraction.plan.split, disable=None) as bar:
            while processes.running():
                bar.update(_count(extraction, own) - bar.n)
                time.sleep(1)
            bar.update(_count(extraction, own) - bar.n)
        return processes.wait()
    except KeyboardInterrupt as error:
        processes.stop(signal.Signals(getattr(error, "number", signal.SIGINT)))
        raise
    except BaseException:
        processes.stop(signal.SIGTERM)
        raise
