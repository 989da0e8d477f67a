"""Extraction with Slurm jobs (`--submit slurm`): planning on the submitting machine, submission, and waiting."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torchvision

from gridcap.common.config import PipelineConfig
from gridcap.common.device import choose_batch_size
from gridcap.extract.cluster import slurm
from gridcap.extract.cluster.job_script import SlurmRequest, job_script, slurm_folder
from gridcap.extract.job import Extraction
from gridcap.extract.plan import Plan
from gridcap.extract.run import extract_features
from gridcap.extract.summary import Summary


def jobs_config(config: PipelineConfig, gpus: int | None) -> PipelineConfig:
    """Return the configuration of the jobs, in which "auto" does not depend on the node."""
    precision = config.extract.precision
    if precision == "auto":
        precision = "bfloat16" if gpus else "float32"
        older = "; pass --precision float16 for GPUs released before 2020" if gpus else ""
        click.echo(f"note: the jobs use {precision}{older}", err=True)
    return config.model_copy(update={"extract": config.extract.model_copy(update={"precision": precision})})


def planning_config(config: PipelineConfig) -> PipelineConfig:
    """Return the configuration for planning on the submitting machine, which may not have a GPU."""
    precision = "float32" if config.extract.precision == "float16" else config.extract.precision
    decoder = "pillow" if config.extract.jpeg_decoder == "nvjpeg" else config.extract.jpeg_decoder
    cpu_settings = {"device": "cpu", "jpeg_decoder": decoder, "precision": precision}
    return config.model_copy(update={"extract": config.extract.model_copy(update=cpu_settings)})


def jobs_plan(config: PipelineConfig, plan: Plan, gpus: int | None) -> Plan:
    """Adapt a plan created with `planning_config` to the settings of the jobs."""
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

    request: SlurmRequest
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
    script = job_script(submission.command, request, extraction.folder, Path.cwd())
    path = slurm_folder(extraction.folder) / "job.sh"
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
        f"submitted: job {job_id}, tasks 0-{request.num_jobs - 1} of {path}\n"
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
