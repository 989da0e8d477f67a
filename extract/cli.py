"""extract-features, import-features and verify-features."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from common.annotations import captions_alone, load_split
from common.command import flag, pipeline_command, show_config
from common.config import PipelineConfig
from common.errors import EXIT_FAILURE, EXIT_REJECTS, GridcapError, UserError
from extract.cluster import WHOLE, LocalWorkers, Share, find_share, local_device, local_number

if TYPE_CHECKING:
    from common.annotations import ImageRecord
    from extract.plan import Plan
    from extract.worker import Job, Summary

EXTRACT_EXAMPLES = """
extract-features --split train                                   (paths from pipeline.yaml)
extract-features --images photos/ --annotations captions.json --output features/train.h5
extract-features --images photos/ --output features/photos.h5    (a folder without captions)
extract-features --split val --limit 500 --weights random        (a quick try, nothing to download)
extract-features --split train --dry-run                         (what would be done)
extract-features --split train --devices auto                    (every GPU of this machine)
extract-features --split train --submit slurm --workers 8 --partition gpu --time 2:00:00 --gpus-per-task 1 --wait
"""
IMPORT_EXAMPLES = """
import-features tutorial_npy/ --annotations captions_train.json --output features/train.h5
import-features cocobu_att/ --split karpathy-train --annotations dataset_coco.json --output features/train.h5
import-features encoded_images.pkl --annotations captions.csv --output features/train.h5 --dtype float32
"""
VERIFY_EXAMPLES = """
verify-features features/train.h5
verify-features features/train.h5 --annotations captions_train.json
verify-features features/train.h5 --repair && extract-features --split train
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
    "--annotations", type=click.Path(path_type=Path),
    help="Captions file: COCO JSON, Karpathy's JSON, or CSV image,caption  [data.splits.<split>.annotations]",
)  # fmt: skip
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="A seeded random subset of this many images  [data.splits.<split>.limit]",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="The store's index file  [default: <data.features>/<split>.h5]"
)
@flag("--encoder", "extract.encoder")
@flag("--weights", "extract.weights")
@flag("--precision", "extract.precision")
@flag("--dtype", "extract.dtype")
@flag("--shard-size", "extract.shard_size")
@flag("--batch-size", "extract.batch_size")
@flag("--device", "extract.device")
@flag("--max-bad", "data.max_bad")
@click.option("--allow-rejects", is_flag=True, help="Exit with 0, not 3, when some images were rejected.")
@click.option(
    "--worker",
    type=int,
    help="Make only this worker's share of the shards, from 0  [default: from torchrun, Slurm or Kubernetes]",
)
@click.option("--workers", type=int, help="How many workers share the work; with --submit, how many to start.")
@click.option(
    "--devices", metavar="auto|N", callback=_checked_devices,
    help="Start N processes on this machine that share the work; auto: one for each GPU.",
)  # fmt: skip
@click.option("--submit", type=click.Choice(["slurm"]), help="Run as an array of jobs: writes the script, submits it.")
@click.option("--partition", help="Slurm partition of the jobs.")
@click.option("--time", help="Time limit of a job, as 2:00:00; a job that reaches it is requeued.")
@click.option("--gpus-per-task", type=click.IntRange(min=1), help="GPUs of each job.")
@click.option("--cpus-per-task", type=click.IntRange(min=1), help="Cores of each job.")
@click.option("--mem", help="Memory of each job, as 16G.")
@click.option("--wait", is_flag=True, help="With --submit: follow the jobs until the store is complete.")
@click.option("--brief", is_flag=True, hidden=True, help="Say only what happens: --devices says the rest once.")
def main(
    config: PipelineConfig, dry_run: bool, split: str | None, images: Path | None, annotations: Path | None,
    limit: int | None, output: Path | None, allow_rejects: bool, worker: int | None, workers: int | None,
    devices: str | None, submit: str | None, brief: bool, wait: bool, **slurm: Any,
) -> None:  # fmt: skip
    """Run a frozen CNN once over every image and store its grids.

    Writes the shards into a folder beside the index file, and the index last: when it is there, the store is
    complete. Killed at any moment, the same command finishes the work. Several workers share it when torchrun,
    Slurm, Kubernetes or --worker numbers them; whoever finishes last writes the index. Exit status: 0 complete, or
    this worker's share done; 3 complete but some images were rejected; 1 failure; 2 wrong use.
    """
    share = WHOLE
    if submit is None:
        _refuse_slurm_options(wait, slurm)
        share = find_share(os.environ, worker, workers)
    elif worker is not None or workers is None or workers < 1:
        raise UserError(
            "--submit slurm: how many jobs?", "give --workers with their number; each finds its own --worker"
        )
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
    output = output or config.data.features / f"{name}.h5"
    if output.suffix != ".h5":
        raise UserError(f"--output {output}: the index file must end in .h5", f"use --output {output}.h5")
    if not chosen.images.is_dir():
        raise UserError(f"{chosen.images}: no such folder of images", "check --images, or data.splits in pipeline.yaml")
    config = config.model_copy(update={"data": config.data.model_copy(update={"splits": {name: chosen}})})
    quiet = brief or bool(local_number(os.environ))
    if not quiet:
        click.echo("configuration")
        show_config(config, "data", "extract")
    loaded = load_split(chosen, name, config.seed, config.data.max_bad)
    for line in loaded.problems.lines() if not quiet else ():
        click.echo(f"note: {chosen.annotations}: {line}", err=True)

    from extract.run import extract_features, prepare

    if submit is not None:
        assert workers is not None
        _submit(config, name, loaded.records, output, workers, devices, slurm, wait, dry_run, allow_rejects)
        return
    config = _with_local_device(config)
    job = prepare(config, name, loaded.records, chosen.images, output, dry_run=dry_run)
    plan = _known_plan(config, job)
    if not quiet:
        _announce(job, plan)
    if share.workers > 1:
        click.echo(f"{share}: {len(share.of(plan.shards))} of {plan.shards} shards are mine")
    processes = 1 if devices is None else _processes(config, devices)
    if dry_run:
        click.echo("dry run: nothing was written")
        return
    if processes > 1:
        summary = _on_devices(config, job, share, processes)
    else:
        # A bar for each of several processes on one terminal, or in logs, could not be read.
        alone = share.workers == 1 or sys.stderr.isatty()
        summary = extract_features(config, job, share, progress=alone and not quiet)
    _end(job, plan, summary, allow_rejects)


def _known_plan(config: PipelineConfig, job: Job) -> Plan:
    """The plan on disk, which is only read, as a dry run may; the job's own if there is none."""
    from extract.plan import FILE
    from extract.run import settled_plan

    return settled_plan(config, job) if (job.folder / FILE).exists() else job.plan


def _announce(job: Job, plan: Plan) -> None:
    if plan is not job.plan:
        kept = [
            f"{name.replace('_', ' ')} {getattr(plan, name)}"
            for name in ("shard_size", "batch_size")
            if getattr(plan, name) != getattr(job.plan, name)
        ]
        if kept:
            click.echo(f"note: this store was begun with {' and '.join(kept)}, and that is kept", err=True)
        there = len(plan.shards_there(job.folder))
        click.echo(f"already there: {there} of {plan.shards} shards")
    row = 2 if plan.provenance["dtype"] == "float16" else 4
    for size in plan.provenance["grid_shape"]:
        row *= size
    click.echo(
        f"plan: {plan.images} images -> {job.output} ({plan.shards} shards in {job.folder}, "
        f"{plan.images * row / 2**30:.2f} GiB), {plan.provenance['encoder']} {plan.provenance['layer']}, "
        f"weights {job.identity.name}, {plan.provenance['precision']}"
    )
    if job.identity.random:
        click.secho(
            "WARNING: random weights. These features do not know what is in a photograph; they are for the demo and "
            "for tests, not for real captions. Use --weights imagenet for those.", fg="yellow", err=True,
        )  # fmt: skip


def _end(job: Job, plan: Plan, summary: Summary, allow_rejects: bool) -> None:
    """Say what was done; end with the status for rejects if the store is complete and has some."""
    if not summary.complete:
        # Status 0 even with rejects: the store is not complete, and torchrun would kill the others for anything else.
        missing = plan.shards - len(plan.shards_there(job.folder))
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
    if summary.rejects:
        click.echo(f"rejected images: {summary.rejects.total()} (their rows are kept, marked not valid)")
        for reason, count in summary.rejects.most_common():
            click.echo(f"  {count:6d}  {reason}")
        if summary.complete and not allow_rejects:
            sys.exit(EXIT_REJECTS)


def _refuse_slurm_options(wait: bool, slurm: dict[str, Any]) -> None:
    given = [name for name, value in {**slurm, "wait": wait or None}.items() if value is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{flags}: only with --submit slurm", "add --submit slurm, or leave it away")


def _with_local_device(config: PipelineConfig) -> PipelineConfig:
    """The configuration with the GPU of this process, if it is one of several on this machine."""
    if local_number(os.environ) is None:
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


def _processes(config: PipelineConfig, devices: str) -> int:
    """How many processes `--devices` means on this machine."""
    import torch

    device = config.extract.device
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    count = max(1, gpus) if devices == "auto" else int(devices)
    if count > 1 and ":" in device:
        raise UserError(f"--devices {devices} --device {device}: one device for all", "leave --device away")
    return count


def _on_devices(config: PipelineConfig, job: Job, share: Share, processes: int) -> Summary:
    """Make a share with several processes on this machine."""
    import torch

    from extract.run import extract_features, settled_plan
    from extract.worker import Summary

    plan = settled_plan(config, job)  # now, so that what is wrong is said once
    mine = share.of(plan.shards)
    before = _count(job, plan, mine)
    begin = time.perf_counter()
    if before < len(mine):
        on_cpu = config.extract.device == "cpu" or not torch.cuda.is_available()
        threads = max(1, torch.get_num_threads() // processes) if on_cpu else None
        command = _command_again(frozenset(("devices", "worker", "workers", "brief")), "--brief")
        statuses = _run_workers(LocalWorkers(command, share, processes, threads), job, plan, mine)
        failed = [
            f"[{share.divided(i, processes, '').worker}] with status {status}"
            for i, status in enumerate(statuses) if status not in (0, EXIT_REJECTS)
        ]  # fmt: skip
        if failed:
            raise GridcapError(
                f"{len(failed)} of {processes} processes failed: {', '.join(failed)}",
                "see their lines above; the same command again makes just what is missing",
            )
    made = _count(job, plan, mine) - before
    seconds = time.perf_counter() - begin
    if len(plan.shards_there(job.folder)) < plan.shards:
        return Summary(plan.images, plan.shards, before, made, complete=False, seconds=seconds)
    summary = extract_features(config, job, progress=False)
    return replace(summary, done_before=plan.shards - made, made=made, seconds=seconds) if made else summary


def _count(job: Job, plan: Plan, shards: range) -> int:
    """How many of these shards are there."""
    return sum(shard in shards for shard in plan.shards_there(job.folder))


def _run_workers(workers: LocalWorkers, job: Job, plan: Plan, mine: range) -> list[int]:
    try:
        with tqdm(total=len(mine), unit="shard", desc=plan.split, disable=None) as bar:
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


def _submit(
    config: PipelineConfig, name: str, records: list[ImageRecord], output: Path, workers: int, devices: str | None,
    slurm: dict[str, Any], wait: bool, dry_run: bool, allow_rejects: bool,
) -> None:  # fmt: skip
    """Give the work to Slurm, and see it to its end if asked to."""
    from extract import submit
    from extract.run import extract_features, prepare, settled_plan

    gpus = slurm["gpus_per_task"]
    # What the jobs compute in is settled here: left open, each would choose for itself.
    precision = config.extract.precision
    if precision == "auto":
        precision = "bfloat16" if gpus else "float32"
        older = "; GPUs from before 2020 want --precision float16" if gpus else ""
        click.echo(f"note: the jobs compute in {precision}{older}", err=True)
    # The machine that submits may have no GPU, and needs none to plan.
    stand_in = "float32" if precision == "float16" else precision
    extract = config.extract.model_copy(update={"device": "cpu", "precision": stand_in})
    config = config.model_copy(update={"extract": extract})
    job = prepare(config, name, records, config.data.splits[name].images, output, dry_run=dry_run)
    provenance = {**job.plan.provenance, "precision": precision}
    job = replace(job, plan=replace(job.plan, provenance=provenance))
    plan = _known_plan(config, job)
    _announce(job, plan)
    jobs = min(workers, plan.shards)
    if jobs < workers:
        click.echo(f"note: there are only {plan.shards} shards, so {jobs} jobs are enough", err=True)
    more = ["--precision", precision]
    if (gpus or 1) > 1 and devices is None:
        more += ["--devices", "auto"]
    command = _command_again(frozenset(("submit", "workers", "wait", "dry_run", "precision", *slurm)), *more)
    script = submit.job_script(command, submit.SlurmRequest(jobs, **slurm), job.folder, Path.cwd())
    path = submit.slurm_folder(job.folder) / "job.sh"
    if dry_run:
        click.echo(f"dry run: nothing was written or submitted; this would be {path}:\n{script}")
        return
    plan = settled_plan(config, job)
    before = len(plan.shards_there(job.folder))
    if output.exists() and before == plan.shards:
        _end(job, plan, extract_features(config, job, progress=False), allow_rejects)
        return
    number = submit.submit(script, job.folder)
    click.echo(
        f"submitted: job {number}, tasks 0-{jobs - 1} of {path}\n"
        f"  watch:   squeue --jobs={number}; tail -f {path.parent}/{number}_*.log\n"
        f"  cancel:  scancel {number}\n"
        f"  when {output} is there, the store is complete"
    )
    if not wait:
        return
    begin = time.perf_counter()
    try:
        submit.follow(number, output, job.folder, plan)
    except KeyboardInterrupt as stop:
        click.echo(f"\nno longer waiting: the jobs go on without this command (scancel {number} ends them)", err=True)
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))
    summary = extract_features(config, job, progress=False)  # says what is in it
    made = plan.shards - before
    summary = replace(summary, done_before=before, made=made, seconds=time.perf_counter() - begin)
    _end(job, plan, summary, allow_rejects)


@pipeline_command("import-features", IMPORT_EXAMPLES)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The store's index file, ending in .h5.")
@click.option(
    "--annotations", type=click.Path(path_type=Path), help="Captions file of these images: COCO, Karpathy, CSV."
)
@click.option("--split", help="Name of the split  [default: from --output]")
@flag("--dtype", "extract.dtype")
@flag("--shard-size", "extract.shard_size")
def import_features(
    config: PipelineConfig, dry_run: bool, source: Path, output: Path, annotations: Path | None, split: str | None
) -> None:
    """Turn features that other programs made into a feature store.

    SOURCE is a folder of .npy files (TensorFlow's tutorial) or .npz files (an image id each, the array under
    `feat`), a pickled dict of arrays, an HDF5 file with a dataset an image (<id>_grids, <id>_features), or an
    .npz or HDF5 file with the arrays `features` and `file_name` or `image_id`. Grids are (row, column, channel),
    (cells, channel) or pooled (channel,). Exit status: 0 done, 1 failure, 2 wrong use.
    """
    if output.suffix != ".h5":
        raise UserError(f"--output {output}: the index file must end in .h5", f"use --output {output}.h5")
    from extract import importers

    click.echo("configuration")
    show_config(config, "extract")
    name = split or output.stem
    records = None
    if annotations is not None:
        loaded = load_split(captions_alone(annotations), name, config.seed, config.data.max_bad)
        for line in loaded.problems.lines():
            click.echo(f"note: {annotations}: {line}", err=True)
        records = loaded.records
    with tqdm(unit="file", desc="open", leave=False) as bar:
        opened = importers.open_source(source, bar.update)
    pairs = importers.match_keys(opened, records)
    missing = len(records) - len(pairs) if records is not None else 0
    left_out = f"; {missing} images of {annotations} have no features" if missing else ""
    click.echo(f"{source}: {opened.layout}, {len(pairs)} of {len(opened.keys)} features to import{left_out}")
    if dry_run:
        click.echo("dry run: nothing was written")
        return
    with tqdm(total=len(pairs), unit="image", desc=name) as bar:
        count = importers.import_features(
            opened, source.name, pairs, output, name, config.extract.dtype, config.extract.shard_size, bar.update
        )
    click.echo(f"done: {output}: {count} images")


@pipeline_command("verify-features", VERIFY_EXAMPLES)
@click.argument("features", type=click.Path(path_type=Path))
@click.option(
    "--annotations", type=click.Path(path_type=Path), help="Captions file whose images the store should have."
)
@click.option("--repair", is_flag=True, help="Remove what is broken, so that extract-features makes just that again.")
def verify_features(
    config: PipelineConfig, dry_run: bool, features: Path, annotations: Path | None, repair: bool
) -> None:
    """Check every byte of a feature store against its checksums, and every row against sense.

    Exit status: 0 sound, 1 something is broken or missing, 2 wrong use.
    """
    from extract import verify

    click.echo("configuration")
    show_config(config, "data")
    wanted = None
    if annotations is not None:
        loaded = load_split(captions_alone(annotations), features.stem, config.seed, config.data.max_bad)
        wanted = {record.image_id for record in loaded.records}
    if dry_run:
        plan = verify.plan_of(features)
        click.echo(f"dry run: would check {features}: {plan.images} rows in {plan.shards} shards")
        return
    with tqdm(unit="row", desc="verify", leave=False) as bar:
        report = verify.verify_store(features, wanted, bar.update)
    problems = Counter(problem.check for problem in report.problems)
    click.echo(f"{'check':<32}{'checked':>10}{'problems':>10}")
    for check in verify.CHECKS:
        if report.checked[check]:
            click.echo(f"  {check:<30}{report.checked[check]:10d}{problems[check]:10d}")
    for problem in report.problems:
        click.echo(f"problem: {problem.shard or features}: {problem.check}: {problem.detail}", err=True)
    if not report.problems:
        click.echo(f"sound: {features}: {report.rows} rows, {report.valid} valid")
        return
    if repair:
        for path in verify.repair(features, report):
            click.echo(f"removed: {path}")
        click.echo("now run the same extract-features command again: it makes just what is missing")
    else:
        click.echo("--repair removes what is broken, so that extract-features makes just that again")
    sys.exit(EXIT_FAILURE)
