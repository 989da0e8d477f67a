"""extract-features."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gridcap.common.captions.split import split_images
from gridcap.common.command import flag, pipeline_command, show_config
from gridcap.common.config import PipelineConfig, SplitConfig
from gridcap.common.errors import EXIT_INVALID, GridcapError, UserError
from gridcap.extract.cluster.share import WHOLE, find_share, local_device, local_rank

if TYPE_CHECKING:
    from gridcap.extract.plan import Plan
    from gridcap.extract.worker import Job, Summary

EXTRACT_EXAMPLES = """
extract-features --split train                                   (paths from pipeline.yaml)
extract-features --images photos/ --annotations captions.json --output features/train.h5
extract-features --images photos/ --output features/photos.h5    (a folder without captions)
extract-features --split val --limit 500 --weights random        (a quick try, nothing to download)
extract-features --split train --append                          (images that were added to the folder or list)
extract-features --split train --dry-run                         (what would be done)
extract-features --split train --devices auto                    (every GPU of this machine)
extract-features --split train --submit slurm --num-jobs 8 --partition gpu --time 2:00:00 --gpus-per-task 1 --wait
"""


def _split_name(values: dict[str, Any]) -> str | None:
    """--split, or a name made from --output or --images; of a new split without dots, which would part keys."""
    if values["split"]:
        name = str(values["split"])
    elif values["output"] is not None:
        name = values["output"].stem
    elif values["images"] is not None:
        name = values["images"].resolve().name
    else:
        return None
    return name if values["images"] is None else name.replace(".", "-")


def _split_keys(values: dict[str, Any]) -> dict[str, Any]:
    """With --split, --images moves that split's images; without, it makes a split of its own."""
    if values["images"] is None:
        return {}
    key = f"data.splits.{_split_name(values)}"
    if values["split"]:
        return {f"{key}.images": values["images"]}
    return {key: {"images": values["images"], "annotations": values["annotations"]}}


def _checked_devices(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and value != "auto" and not (value.isascii() and value.isdigit() and int(value) > 0):
        raise click.BadParameter("must be auto, or a number from 1")
    return value


@pipeline_command("extract-features", EXTRACT_EXAMPLES, _split_keys)
@click.option("--split", help="Name of the split: train, val, test, karpathy-train, ... or your own.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder with the images  [data.splits.<split>.images]")
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    help="Captions file: COCO JSON, Karpathy's JSON, or CSV image,caption  [data.splits.<split>.annotations]",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="A seeded random subset of this many images  [data.splits.<split>.limit]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="The store's index file  [default: <data.features_dir>/<split>.h5]",
)
@flag("--encoder", "extract.encoder")
@flag("--weights", "extract.weights")
@flag("--precision", "extract.precision")
@flag("--dtype", "extract.dtype")
@flag("--shard-size", "extract.shard_size")
@flag("--batch-size", "extract.batch_size")
@flag("--device", "extract.device")
@flag("--max-invalid", "data.max_invalid")
@flag("--views", "extract.views")
@flag("--compile", "extract.compile")
@flag("--jpeg-decoder", "extract.jpeg_decoder")
@click.option("--append", is_flag=True, help="Add the images that are new in the list as new shards.")
@click.option("--retry-invalid", is_flag=True, help="Try images again that were rejected before, and just those.")
@click.option("--allow-invalid", is_flag=True, help="Exit with 0, not 3, when some images were rejected.")
@click.option(
    "--rank",
    type=int,
    help="Rank of this process among those that share the work, from 0  [default: from torchrun, Slurm or Kubernetes]",
)
@click.option("--world-size", type=int, help="Number of processes that share the work.")
@click.option(
    "--devices",
    metavar="auto|N",
    callback=_checked_devices,
    help="Start N processes on this machine that share the work; auto: one for each GPU.",
)
@click.option("--submit", type=click.Choice(["slurm"]), help="Run as an array of jobs: writes the script, submits it.")
@click.option("--num-jobs", type=click.IntRange(min=1), help="With --submit: number of jobs in the array.")
@click.option("--partition", help="Slurm partition of the jobs.")
@click.option("--time", help="Time limit of a job, as 2:00:00; a job that reaches it is requeued.")
@click.option("--gpus-per-task", type=click.IntRange(min=1), help="GPUs of each job.")
@click.option("--cpus-per-task", type=click.IntRange(min=1), help="Cores of each job.")
@click.option("--mem", help="Memory of each job, as 16G.")
@click.option("--wait", is_flag=True, help="With --submit: follow the jobs until the store is complete.")
@click.option("--brief", is_flag=True, hidden=True, help="Say only what happens: --devices says the rest once.")
def main(
    config: PipelineConfig,
    dry_run: bool,
    split: str | None,
    images: Path | None,
    annotations: Path | None,
    limit: int | None,
    output: Path | None,
    append: bool,
    retry_invalid: bool,
    allow_invalid: bool,
    rank: int | None,
    world_size: int | None,
    num_jobs: int | None,
    devices: str | None,
    submit: str | None,
    brief: bool,
    wait: bool,
    **slurm: Any,
) -> None:
    """Run a frozen CNN once over every image and store its grids.

    Writes the shards into a folder beside the index file, and the index last: when it is there, the store is
    complete. Killed at any moment, the same command finishes the work. Several workers share it when torchrun,
    Slurm, Kubernetes or --rank numbers them; whoever finishes last writes the index. Exit status: 0 complete, or
    this worker's share done; 3 complete but some images were rejected; 1 failure; 2 wrong use; 130, 143 or 140
    stopped by Ctrl-C, SIGTERM or SIGUSR2.
    """
    share = WHOLE
    if submit is None:
        _refuse_slurm_options(wait, {**slurm, "num_jobs": num_jobs})
        share = find_share(os.environ, rank, world_size)
    elif rank is not None or world_size is not None:
        raise UserError("--rank and --world-size: not with --submit", "omit them; pass --num-jobs")
    elif num_jobs is None:
        raise UserError("--submit slurm: the number of jobs is missing", "pass --num-jobs")
    elif retry_invalid:
        raise UserError("--retry-invalid: not with --submit", "run it here: it reads just the rejected images")
    config, name, chosen, output = _chosen(config, split, images, annotations, limit, output)
    quiet = brief or bool(local_rank(os.environ))
    if not quiet:
        click.echo("configuration")
        show_config(config, "data", "extract")
    records, problems = split_images(chosen, name, config.seed, config.data.max_invalid, config.data.follow_links)

    from gridcap.extract.cluster import launch
    from gridcap.extract.run import extract_features, prepare, settled_plan

    processes = 1
    threads = None
    if submit is not None:
        config = launch.jobs_config(config, slurm["gpus_per_task"])
        threads = slurm["cpus_per_task"] or 1
    else:
        config = _with_local_device(config)
        processes = 1 if devices is None else launch.count_processes(config, devices)
        threads = launch.threads_of(processes) if processes > 1 else None
    planned_with = config if submit is None else launch.planning_config(config)
    job = prepare(planned_with, name, records, chosen.images, output, dry_run, threads)
    if submit is not None:
        job = replace(job, plan=launch.jobs_plan(config, job.plan, slurm["gpus_per_task"]))
    plan = _known_plan(config, job, append)
    if not quiet:
        for line in problems.lines():
            click.echo(f"note: {chosen.annotations or chosen.images}: {line}", err=True)
        _announce(job, plan)
    if submit is not None:
        assert num_jobs is not None
        _submit(config, job, plan, num_jobs, devices, slurm, wait, dry_run, append, allow_invalid)
        return
    if share.world_size > 1:
        click.echo(f"{share}: {len(share.of(plan.shards))} of {plan.shards} shards are mine")
    if dry_run:
        click.echo("dry run: nothing was written")
        return
    plan = settled_plan(config, job, append)
    if processes > 1:
        command = _command_again(frozenset(("devices", "rank", "world_size", "brief")), "--brief")
        summary = launch.extract_by_processes(config, job, plan, share, processes, command, append, retry_invalid)
    else:
        # A bar for each of several processes on one terminal, or in logs, could not be read.
        alone = share.world_size == 1 or sys.stderr.isatty()
        summary = extract_features(config, job, share, alone and not quiet, append, retry_invalid)
    _end(job, plan, summary, allow_invalid, brief)


def _submit(
    config: PipelineConfig,
    job: Job,
    plan: Plan,
    num_jobs: int,
    devices: str | None,
    slurm: dict[str, Any],
    wait: bool,
    dry_run: bool,
    append: bool,
    allow_invalid: bool,
) -> None:
    """Give the work to an array of jobs."""
    from gridcap.extract.cluster import launch
    from gridcap.extract.cluster.slurm import SlurmRequest

    jobs = min(num_jobs, plan.shards)
    if jobs < num_jobs:
        click.echo(f"note: there are only {plan.shards} shards, so {jobs} jobs are enough", err=True)
    more = ["--precision", config.extract.precision]
    if (slurm["gpus_per_task"] or 1) > 1 and devices is None:
        more += ["--devices", "auto"]
    command = _command_again(frozenset(("submit", "num_jobs", "wait", "dry_run", "precision", *slurm)), *more)

    def end(summary: Summary) -> None:
        _end(job, plan, summary, allow_invalid)

    request = SlurmRequest(jobs, **slurm)
    launch.submit_jobs(config, job, plan, request, command, wait, dry_run, append, end)


def _chosen(
    config: PipelineConfig,
    split: str | None,
    images: Path | None,
    annotations: Path | None,
    limit: int | None,
    output: Path | None,
) -> tuple[PipelineConfig, str, SplitConfig, Path]:
    """The configuration with just the chosen split, the split's name, the split, and the index file."""
    name = _split_name({"split": split, "output": output, "images": images})
    if name is None:
        raise UserError("which images? neither --split nor --images is given", "see extract-features --help")
    if name not in config.data.splits:
        known = ", ".join(config.data.splits) or "none"
        raise UserError(
            f"--split {name}: no such split in the configuration (known: {known})",
            "give --images DIR, or write the split into pipeline.yaml",
        )
    given = {key: value for key, value in (("annotations", annotations), ("limit", limit)) if value is not None}
    chosen = config.data.splits[name].model_copy(update=given)
    output = output or config.data.features_dir / f"{name}.h5"
    if output.suffix != ".h5":
        raise UserError(
            f"--output {output}: the index file must end in .h5", f"use --output {output.with_suffix('.h5')}"
        )
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder, and the index is a file", "choose another --output")
    if not chosen.images.is_dir():
        what = "is a file, not a folder of images" if chosen.images.is_file() else "no such folder of images"
        raise UserError(f"{chosen.images}: {what}", "check --images, or data.splits in pipeline.yaml")
    data = config.data.model_copy(update={"splits": {name: chosen}})
    return config.model_copy(update={"data": data}), name, chosen, output


def _known_plan(config: PipelineConfig, job: Job, append: bool) -> Plan:
    """The plan on disk, with what is to be appended; the job's own if there is none. Nothing is written yet."""
    from gridcap.extract.plan import FILE
    from gridcap.extract.run import settled_plan

    if not (job.folder / FILE).exists():
        return job.plan
    return settled_plan(config, job, append, write=False)


def _announce(job: Job, plan: Plan) -> None:
    from gridcap.extract.plan import read_plan
    from gridcap.extract.run import survey

    found, provenance = survey(job, plan), plan.provenance
    arithmetic = [str(provenance["precision"])]
    arithmetic += ["compiled"] if provenance["compile"] else []
    arithmetic += [f"{provenance['threads']} threads"] if provenance["threads"] else []
    several = len(provenance["views"]) > 1
    click.echo(
        f"plan: {plan.images} images -> {job.output} ({plan.shards} shards in {job.folder}), "
        f"{provenance['encoder']} {provenance['layer']}, weights {job.identity.name}, {', '.join(arithmetic)}, "
        f"stored as {provenance['dtype']}" + (f", views {' and '.join(provenance['views'])}" if several else "")
    )
    if plan is not job.plan:
        kept = [
            f"{name.replace('_', ' ')} {getattr(plan, name)}"
            for name in ("shard_size", "batch_size")
            if getattr(plan, name) != getattr(job.plan, name)
        ]
        if provenance["threads"] != job.plan.provenance["threads"]:
            kept.append(f"{provenance['threads']} threads, where this machine has {job.plan.provenance['threads']}")
        if kept:
            click.echo(f"note: this store was begun with {' and '.join(kept)}, and that is kept", err=True)
        if more := plan.images - read_plan(job.folder).images:
            click.echo(f"to append: {more} images to the {plan.images - more} of before")
        click.echo(f"already there: {len(found.there)} of {plan.shards} shards")
    if len(found.there) < plan.shards:
        click.echo(
            f"to make: {plan.shards - len(found.there)} shards, {found.needed / 2**20:,.0f} MiB; "
            f"{found.free / 2**30:.1f} GiB are free there"
        )
    if job.identity.random:
        click.secho(
            "WARNING: random weights. These features do not know what is in a photo; they are for the demo and "
            "for tests, not for real captions. Use --weights imagenet for those.",
            fg="yellow",
            err=True,
        )


def _end(job: Job, plan: Plan, summary: Summary, allow_invalid: bool, brief: bool = False) -> None:
    """Say what was done; end with the status for rejects if the store is complete and has some."""
    if brief:
        click.echo(f"share done: {summary.made} shards made now, {summary.done_before} were there")
        return
    if not summary.complete:
        # Status 0 even with rejects: the store is not complete, and torchrun would kill the others for anything else.
        missing = plan.shards - len(plan.existing_shards(job.folder))
        click.echo(
            f"my share is done: {summary.done_before + summary.made} shards ({summary.made} made now, "
            f"{summary.done_before} were there), {summary.seconds:.1f} s; {missing} shards of other workers are still "
            f"missing; whoever finishes last writes the index"
        )
    elif summary.made == 0 and summary.seconds == 0:
        click.echo(f"nothing to do: {job.output} is complete ({summary.images} images, {summary.shards} shards)")
    else:
        click.echo(
            f"done: {job.output}: {summary.images} images in {summary.shards} shards "
            f"({summary.made} made now, {summary.shards - summary.made} were there), {summary.seconds:.1f} s"
        )
    if summary.running:
        click.echo(
            f"  {summary.encoded / summary.running:.1f} images/s; the encoder waited for images or for the disk "
            f"{summary.waiting / summary.running:.1%} of the time"
        )
    if summary.retried:
        click.echo(f"retried: {summary.retried} images that were rejected before are good now")
    if summary.rejects:
        click.echo(f"rejected images: {summary.rejects.total()} (their rows are kept, marked not valid)")
        for reason, count in summary.rejects.most_common():
            shown = ", ".join(summary.examples.get(reason, []))
            more = ", ..." if count > len(summary.examples.get(reason, [])) and shown else ""
            click.echo(f"  {count:6d}  {reason}" + (f"  ({shown}{more})" if shown else ""))
        if summary.complete and not allow_invalid:
            sys.exit(EXIT_INVALID)


def _refuse_slurm_options(wait: bool, slurm: dict[str, Any]) -> None:
    given = [name for name, value in {**slurm, "wait": wait or None}.items() if value is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{flags}: only with --submit slurm", "add --submit slurm, or leave it away")


def _with_local_device(config: PipelineConfig) -> PipelineConfig:
    """The configuration with the GPU of this process, if it is one of several on this machine."""
    if local_rank(os.environ) is None:
        return config  # without loading torch to count GPUs
    import torch

    device = local_device(os.environ, config.extract.device, torch.cuda.device_count())
    return config.model_copy(update={"extract": config.extract.model_copy(update={"device": device})})


def _command_again(without: frozenset[str], *more: str) -> list[str]:
    """This very command, as words for another process: what was given on the command line, without some options."""
    program = shutil.which("extract-features", path=f"{sysconfig.get_path('scripts')}:{os.environ.get('PATH', '')}")
    if program is None:
        raise GridcapError("extract-features: not found where Python keeps programs", "install gridcap with pip")
    context = click.get_current_context()
    words = [sys.executable, program]
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if name in without or not given or not isinstance(parameter, click.Option):
            continue
        values = context.params[name] if parameter.multiple else [context.params[name]]
        for value in values:
            words += [parameter.opts[0]] if parameter.is_flag else [parameter.opts[0], str(value)]
    return [*words, *more]
