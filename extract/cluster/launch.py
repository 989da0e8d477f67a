"""The other ways to run an extraction: by several processes on this machine, or by jobs on a Slurm cluster."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import torchvision

from gridcap.common.config import PipelineConfig
from gridcap.common.device import choose_batch_size
from gridcap.common.errors import EXIT_INVALID, GridcapError, UserError
from gridcap.common.progress import progress_bar
from gridcap.extract.cluster import slurm as submit
from gridcap.extract.cluster.processes import LocalProcesses
from gridcap.extract.cluster.share import Share
from gridcap.extract.plan import Plan
from gridcap.extract.run import extract_features, settled_plan
from gridcap.extract.worker import Job, Summary


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


def extract_by_processes(
    config: PipelineConfig,
    job: Job,
    plan: Plan,
    share: Share,
    processes: int,
    command: Sequence[str],
    append: bool,
    retry: bool,
) -> Summary:
    """Make a share with several processes on this machine.

    Args:
        config, job, plan, share, append, retry: as for `extract_features`; the plan is settled.
        processes: how many.
        command: of one of them; its share is added.

    Raises:
        GridcapError: a process failed; what it said was shown.
    """
    mine = share.of(plan.shards)
    before = _count(job, plan, mine)
    begin = time.perf_counter()
    if before < len(mine) or retry:
        on_cpu = config.extract.device == "cpu" or not torch.cuda.is_available()
        threads = threads_of(processes) if on_cpu else None
        statuses = _run_workers(LocalProcesses(command, share, processes, threads), job, plan, mine)
        failed = [
            f"[{share.subdivide(i, processes, '').rank}] with status {status}"
            for i, status in enumerate(statuses)
            if status not in (0, EXIT_INVALID)
        ]
        if failed:
            raise GridcapError(
                f"{len(failed)} of {processes} processes failed: {', '.join(failed)}",
                "see their lines above; the same command again makes just what is missing",
            )
    made = _count(job, plan, mine) - before
    seconds = time.perf_counter() - begin
    if len(plan.existing_shards(job.folder)) < plan.shards:
        return Summary(plan.images, plan.shards, before, made, complete=False, seconds=seconds)
    summary = extract_features(config, job, progress=False, append=append)
    return replace(summary, done_before=plan.shards - made, made=made, seconds=seconds) if made or retry else summary


def _count(job: Job, plan: Plan, shards: range) -> int:
    """How many of these shards are there."""
    return sum(shard in shards for shard in plan.existing_shards(job.folder))


def _run_workers(workers: LocalProcesses, job: Job, plan: Plan, mine: range) -> list[int]:
    try:
        with progress_bar(total=len(mine), unit="shard", desc=plan.split, disable=None) as bar:
            while workers.running():
                bar.update(_count(job, plan, mine) - bar.n)
                time.sleep(1)
            bar.update(_count(job, plan, mine) - bar.n)
        return workers.wait()
    except KeyboardInterrupt as stop:
        workers.stop(signal.Signals(getattr(stop, "number", signal.SIGINT)))
        raise
    except BaseException:
        workers.stop(signal.SIGTERM)
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
    stand_in = {"device": "cpu", "decoder": "pillow", "precision": precision}
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


def submit_jobs(
    config: PipelineConfig,
    job: Job,
    plan: Plan,
    request: submit.SlurmRequest,
    command: Sequence[str],
    wait: bool,
    dry_run: bool,
    append: bool,
    end: Callable[[Summary], None],
) -> None:
    """Give the work to Slurm, and see it to its end if asked to.

    Args:
        config, job, plan, append: as for `extract_features`.
        request: what to ask of Slurm.
        command: of one job.
        wait: follow the jobs until the store is complete.
        dry_run: show the script and do nothing.
        end: says what is in a complete store.

    Raises:
        UserError: there is no Slurm here.
        GridcapError: Slurm refuses, or the jobs ended before the store was complete.
    """
    script = submit.job_script(command, request, job.folder, Path.cwd())
    path = submit.slurm_folder(job.folder) / "job.sh"
    if dry_run:
        click.echo(f"dry run: nothing was written or submitted; this would be {path}:\n{script}")
        return
    plan = settled_plan(config, job, append)
    before = len(plan.existing_shards(job.folder))
    if before == plan.shards:
        end(extract_features(config, job, progress=False, append=append))
        return
    number = submit.submit(script, job.folder)
    click.echo(
        f"submitted: job {number}, tasks 0-{request.workers - 1} of {path}\n"
        f"  watch:   squeue --jobs={number}; tail -f {path.parent}/{number}_*.log\n"
        f"  cancel:  scancel {number}\n"
        f"  when all its shards are there, {job.output} is written and the store is complete"
    )
    if not wait:
        return
    begin = time.perf_counter()
    try:
        submit.follow(number, job.output, job.folder, plan)
    except KeyboardInterrupt as stop:
        click.echo(f"\nno longer waiting: the jobs go on without this command (scancel {number} ends them)", err=True)
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))
    summary = extract_features(config, job, progress=False, append=append)  # says what is in it
    end(replace(summary, done_before=before, made=plan.shards - before, seconds=time.perf_counter() - begin))
