"""The other ways to run an extraction: by several processes on this machine, or by jobs on a Slurm cluster."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
import torchvision

from gridcap.common.config import PipelineConfig
from gridcap.common.device import choose_batch_size
from gridcap.common.errors import EXIT_INVALID, GridcapError, UserError
from gridcap.common.progress import progress_bar
from gridcap.common.text import plural
from gridcap.extract.cluster import slurm
from gridcap.extract.cluster.processes import LocalProcesses
from gridcap.extract.cluster.share import Share
from gridcap.extract.job import Extraction
from gridcap.extract.plan import Plan
from gridcap.extract.run import extract_features
from gridcap.extract.summary import Summary


def count_processes(config: PipelineConfig, devices: str) -> int:
    """How many processes `--devices` means on this machine.

    Raises:
        UserError: several, and one device for all.
    """
    device = config.extract.device
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    count = max(1, gpus) if devices == "auto" else int(devices)
    if count > 1 and ":" in device:
        raise UserError(f"--devices {devices} --device {device}: one device for all", "leave --device away")
    return count


def threads_of(processes: int) -> int:
    """The threads of each of several processes on this machine's cores."""
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


def jobs_config(config: PipelineConfig, gpus: int | None) -> PipelineConfig:
    """The configuration that a cluster's jobs run with: what "auto" would leave to each node is settled here."""
    precision = config.extract.precision
    if precision == "auto":
        precision = "bfloat16" if gpus else "float32"
        older = "; GPUs from before 2020 want --precision float16" if gpus else ""
        click.echo(f"note: the jobs compute in {precision}{older}", err=True)
    return config.model_copy(update={"extract": config.extract.model_copy(update={"precision": precision})})


def planning_config(config: PipelineConfig) -> PipelineConfig:
    """The configuration to plan with here: the machine that submits may have no GPU, and needs none to plan."""
    precision = "float32" if config.extract.precision == "float16" else config.extract.precision
    stand_in = {"device": "cpu", "jpeg_decoder": "pillow", "precision": precision}
    return config.model_copy(update={"extract": config.extract.model_copy(update=stand_in)})


def jobs_plan(config: PipelineConfig, plan: Plan, gpus: int | None) -> Plan:
    """A plan that was made with `planning_config`, as the jobs would make it."""
    extract, provenance = config.extract, plan.provenance
    batch_size = choose_batch_size(extract.batch_size, bool(gpus))
    changed: dict[str, Any] = {"precision": extract.precision}
    if gpus:
        changed |= {"threads": None, "compile": extract.compile == "on"}
    if extract.jpeg_decoder == "nvjpeg":
        changed["preprocessing"] = {**provenance["preprocessing"], "decoder": "nvjpeg"}
        versions = {k: v for k, v in provenance["versions"].items() if k != "pillow"}
        changed["versions"] = {**versions, "nvjpeg": torchvision.__version__}
    return replace(plan, batch_size=batch_size, provenance={**provenance, **changed})


@dataclass(frozen=True)
class Submission:
    """Jobs to submit.

    Attributes:
        request: resources to request from Slurm.
        command: command of one job.
        wait: wait until the store is complete.
        report: called with the summary of a complete store.
    """

    request: slurm.SlurmRequest
    command: Sequence[str]
    wait: bool
    report: Callable[[Summary], None]


def submit_jobs(extraction: Extraction, submission: Submission, dry_run: bool) -> None:
    """Submit an extraction to Slurm.

    Args:
        extraction: the extraction.
        submission: the jobs.
        dry_run: print the job script and do nothing else.

    Raises:
        UserError: Slurm is not installed.
        GridcapError: Slurm rejects the job, or the jobs ended before the store was complete.
    """
    request = submission.request
    script = slurm.job_script(submission.command, request, extraction.folder, Path.cwd())
    path = slurm.slurm_folder(extraction.folder) / "job.sh"
    if dry_run:
        click.echo(f"dry run: nothing was written or submitted; {path} would be:\n{script}")
        return
    extraction = extraction.save()
    plan = extraction.plan
    existing = len(plan.existing_shards(extraction.folder))
    if existing == plan.shards:
        submission.report(extract_features(extraction, show_progress=False))
        return
    job_id = slurm.submit(script, extraction.folder)
    click.echo(
        f"submitted: job {job_id}, tasks 0-{request.workers - 1} of {path}\n"
        f"  watch:   squeue --jobs={job_id}; tail -f {path.parent}/{job_id}_*.log\n"
        f"  cancel:  scancel {job_id}\n"
        f"  the last job to finish writes {extraction.output}, which completes the store"
    )
    if not submission.wait:
        return
    start = time.perf_counter()
    try:
        slurm.follow(job_id, extraction.output, extraction.folder, plan)
    except KeyboardInterrupt as error:
        click.echo(f"\nno longer waiting; the jobs continue (scancel {job_id} cancels them)", err=True)
        sys.exit(128 + getattr(error, "number", signal.SIGINT))
    summary = extract_features(extraction, show_progress=False)
    seconds = time.perf_counter() - start
    submission.report(replace(summary, existing=existing, written=plan.shards - existing, seconds=seconds))
