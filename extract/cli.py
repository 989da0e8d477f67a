"""The extract-features command."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gridcap.common.command import Uses, flag, pipeline_command, show_config, subset_options
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import EXIT_INVALID
from gridcap.common.text import plural
from gridcap.extract.cluster.share import Share
from gridcap.extract.options import (
    SLURM_OPTIONS,
    ExtractOptions,
    SplitImages,
    SplitSelection,
    load_images,
    repeat_command,
    select_split,
    split_keys,
    with_local_device,
)

if TYPE_CHECKING:
    from gridcap.extract.job import Extraction
    from gridcap.extract.summary import Summary

EXAMPLES = """
extract-features --split train                                   (paths from pipeline.yaml)
extract-features --images photos/ --annotations captions.json --output features/train.h5
extract-features --images photos/ --output features/photos.h5    (a folder without captions)
extract-features --split val --limit 500 --weights random        (a quick test without downloads)
extract-features --split train --append                          (add images that are new in the folder or list)
extract-features --split train --dry-run                         (show the plan)
extract-features --split train --devices auto                    (all GPUs of this machine)
extract-features --split train --submit slurm --num-jobs 8 --partition gpu --time 2:00:00 --gpus-per-task 1 --wait
"""


def _check_devices(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and value != "auto" and not (value.isascii() and value.isdigit() and int(value) > 0):
        raise click.BadParameter("must be auto or a positive number")
    return value


USES = Uses(("data", "extract", "seed"), "extract.resize_mode=crop")


@pipeline_command("extract-features", EXAMPLES, split_keys, uses=USES)
@click.option("--split", help="name of the split: train, val, test, karpathy-train, ..., or a new name")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="folder, list (.txt, .csv), .zip, .tar, or .parquet file of the images, or a URL  "
    "[data.splits.<split>.images]",
)
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    help="captions file: COCO or Karpathy JSON, table, JSON Lines, Parquet, ...  [data.splits.<split>.annotations]",
)
@subset_options
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="index file of the store  [default: <data.features_dir>/<split>.h5]",
)
@flag("--encoder", "extract.encoder")
@flag("--weights", "extract.weights")
@flag("--precision", "extract.precision")
@flag("--dtype", "extract.dtype")
@flag("--shard-size", "extract.shard_size")
@flag("--batch-size", "extract.batch_size")
@flag("--num-workers", "extract.num_workers")
@flag("--device", "extract.device")
@flag("--max-invalid", "data.max_invalid")
@flag("--image-column", "data.image_column")
@flag("--caption-column", "data.caption_column")
@flag("--views", "extract.views")
@flag("--layer", "extract.layer")
@flag("--image-size", "extract.image_size")
@flag("--compile", "extract.compile")
@flag("--jpeg-decoder", "extract.jpeg_decoder")
@click.option("--append", is_flag=True, help="add images that are new in the list as new shards")
@click.option("--retry-invalid", is_flag=True, help="read the invalid images of complete shards again")
@click.option("--allow-invalid", is_flag=True, help="exit with status 0 instead of 3 if some images are invalid")
@click.option(
    "--rank",
    type=int,
    help="rank of this process among those that share the work, from 0  [default: from torchrun, Slurm, or Kubernetes]",
)
@click.option("--world-size", type=int, help="number of processes that share the work")
@click.option(
    "--devices",
    metavar="auto|N",
    callback=_check_devices,
    help="start N processes on this machine that share the work; auto: one per GPU",
)
@click.option("--submit", type=click.Choice(["slurm"]), help="write a job script and submit it as a job array")
@click.option("--num-jobs", type=click.IntRange(min=1), help="with --submit: number of jobs in the array")
@click.option("--partition", help="with --submit: partition of the jobs")
@click.option("--time", help="with --submit: time limit per job, such as 2:00:00; a job that reaches it is requeued")
@click.option("--gpus-per-task", type=click.IntRange(min=1), help="with --submit: GPUs per job")
@click.option("--cpus-per-task", type=click.IntRange(min=1), help="with --submit: CPU cores per job")
@click.option("--mem", help="with --submit: memory per job, such as 16G")
@click.option("--wait", is_flag=True, help="with --submit: wait until the store is complete")
@click.option("--brief", is_flag=True, hidden=True, help="print results only, for the processes of --devices")
def main(config: PipelineConfig, dry_run: bool, **values: Any) -> None:
    """Extract the feature grid of every image with a frozen CNN.

    Writes shards into a folder next to the index file, and the index last: if the index exists, the store is complete.
    An interrupted run resumes when the command is rerun. Several processes share the work if torchrun, Slurm,
    Kubernetes, or --rank numbers them; the last process to finish writes the index. Exit status: 0 if the store or the
    share of this process is complete, 3 if the store is complete but some images are invalid, 1 failure, 2 usage
    error, 130, 143, or 140 if stopped by Ctrl-C, SIGTERM, or SIGUSR2.
    """
    options = ExtractOptions(**values)
    share = options.find_share(os.environ)
    selection = select_split(config, options)
    if not options.is_quiet(os.environ):
        show_config(selection.config, "data", "extract", full=dry_run)
    if options.submit is None:
        _extract(selection, options, share, dry_run)
    else:
        _submit(selection, options, dry_run)


def _extract(selection: SplitSelection, options: ExtractOptions, share: Share, dry_run: bool) -> None:
    """Extract on this machine."""
    from gridcap.extract.cluster import launch
    from gridcap.extract.job import ExtractionRequest, prepare
    from gridcap.extract.messages import print_result
    from gridcap.extract.run import extract_features

    source = load_images(selection)
    config, quiet = with_local_device(selection.config), options.is_quiet(os.environ)
    processes = 1 if options.devices is None else launch.count_processes(config, options.devices)
    request = ExtractionRequest(
        config,
        selection.name,
        source.records,
        selection.split.images,
        selection.output,
        append=options.append,
        replace_empty=share.world_size == 1,
        dry_run=dry_run,
        threads=launch.threads_of(processes) if processes > 1 else None,
    )
    extraction = prepare(request)
    if not quiet:
        _print_plan(selection, source, extraction)
    if share.world_size > 1:
        own = len(share.of(extraction.plan.shards))
        click.echo(f"{share}: {own} of {plural(extraction.plan.shards, 'shard')}")
    if dry_run:
        click.echo("dry run: nothing was written")
        return
    extraction = extraction.save()
    if processes > 1:
        command = repeat_command(("devices", "rank", "world_size", "brief"), "--brief")
        local = launch.LocalRun(share, processes, command)
        summary = launch.extract_by_processes(extraction, local, options.retry_invalid)
    else:
        # In logs or on one terminal, the progress bars of several processes would be unreadable.
        show_progress = not quiet and (share.world_size == 1 or sys.stderr.isatty())
        summary = extract_features(extraction, share, options.retry_invalid, show_progress)
    print_result(extraction, summary, options.brief)
    _exit(summary, options)


def _submit(selection: SplitSelection, options: ExtractOptions, dry_run: bool) -> None:
    """Submit the work as an array of Slurm jobs."""
    from gridcap.extract.cluster import submit
    from gridcap.extract.cluster.job_script import SlurmRequest
    from gridcap.extract.job import ExtractionRequest, prepare
    from gridcap.extract.messages import print_result

    source, gpus = load_images(selection), options.gpus_per_task
    config = submit.jobs_config(selection.config, gpus)
    request = ExtractionRequest(
        submit.planning_config(config),
        selection.name,
        source.records,
        selection.split.images,
        selection.output,
        append=options.append,
        replace_empty=True,
        dry_run=dry_run,
        threads=options.cpus_per_task or 1,
        adapt_plan=lambda plan: submit.jobs_plan(config, plan, gpus),
    )
    extraction = replace(prepare(request), config=config)
    if not options.is_quiet(os.environ):
        _print_plan(selection, source, extraction)
    assert options.num_jobs is not None
    shards = extraction.plan.shards
    num_jobs = min(options.num_jobs, shards)
    if num_jobs < options.num_jobs:
        click.echo(f"note: {plural(shards, 'shard')} need only {plural(num_jobs, 'job')}", err=True)
    more = ["--precision", config.extract.precision]
    if (gpus or 1) > 1 and options.devices is None:
        more += ["--devices", "auto"]
    command = repeat_command(("submit", "dry_run", "precision", *SLURM_OPTIONS), *more)
    slurm = SlurmRequest(num_jobs, options.partition, options.time, gpus, options.cpus_per_task, options.mem)

    def report(summary: Summary) -> None:
        print_result(extraction, summary)
        _exit(summary, options)

    submission = submit.Submission(slurm, command, options.wait, report)
    submit.submit_jobs(extraction, submission, dry_run)


def _print_plan(selection: SplitSelection, source: SplitImages, extraction: Extraction) -> None:
    from gridcap.extract.messages import print_notes, print_plan

    print_notes(selection.split.annotations or selection.split.images, source)
    print_plan(extraction)


def _exit(summary: Summary, options: ExtractOptions) -> None:
    """Exit with the status for invalid images if the store is complete.

    A process that does not complete the store exits with 0: torchrun would stop the others on any other status.
    """
    if summary.invalid and summary.complete and not options.allow_invalid and not options.brief:
        sys.exit(EXIT_INVALID)
