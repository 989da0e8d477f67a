"""extract-features: run the encoder once over every image of a split."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.annotations import load_split
from common.command import flag, pipeline_command, show_config
from common.config import PipelineConfig
from common.errors import EXIT_REJECTS, UserError

if TYPE_CHECKING:
    from extract.run import Job, Summary

EXAMPLES = """
extract-features --split train                                   (paths from pipeline.yaml)
extract-features --images photos/ --annotations captions.json --output features/train.h5
extract-features --images photos/ --output features/photos.h5    (a folder without captions)
extract-features --split val --limit 500 --weights random        (a quick try, nothing to download)
extract-features --split train --dry-run                         (what would be done)
"""


def _split_name(values: dict[str, Any]) -> str | None:
    """--split, or a name made from --output or --images."""
    if values["split"]:
        return str(values["split"])
    path = values["output"] or values["images"]
    return path.stem.replace(".", "-") if path is not None else None


def _split_keys(values: dict[str, Any]) -> dict[str, Any]:
    """--images, --annotations and --limit set the split's keys; a folder given alone has no captions."""
    name = _split_name(values)
    if name is None:
        return {}
    keys: dict[str, Any] = {}
    if values["images"] is not None:
        keys[f"data.splits.{name}"] = {"images": values["images"], "annotations": values["annotations"]}
    elif values["annotations"] is not None:
        keys[f"data.splits.{name}.annotations"] = values["annotations"]
    if values["limit"] is not None:
        keys[f"data.splits.{name}.limit"] = values["limit"]
    return keys


@pipeline_command("extract-features", EXAMPLES, _split_keys)
@click.option("--split", help="Name of the split: train, val, test, karpathy-train, ... or your own.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder with the images  [data.splits.<split>.images]")
@click.option(
    "--annotations", type=click.Path(path_type=Path),
    help="Captions file: COCO JSON, Karpathy's JSON, or CSV image,caption  [data.splits.<split>.annotations]",
)  # fmt: skip
@click.option("--limit", type=int, help="A seeded random subset of this many images  [data.splits.<split>.limit]")
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
def main(
    config: PipelineConfig, dry_run: bool, split: str | None, images: Path | None, annotations: Path | None,
    limit: int | None, output: Path | None, allow_rejects: bool,
) -> None:  # fmt: skip
    """Run a frozen CNN once over every image and store its grids.

    Writes the shards into a folder beside the index file, and the index last: when it is there, the store is
    complete. Killed at any moment, the same command finishes the work. Exit status: 0 complete, 3 complete but
    some images were rejected, 1 failure, 2 wrong use.
    """
    name = _split_name({"split": split, "output": output, "images": images})
    if name is None:
        raise UserError("which images? neither --split nor --images is given", "see extract-features --help")
    if name not in config.data.splits:
        known = ", ".join(config.data.splits) or "none"
        raise UserError(
            f"--split {name}: no such split in the configuration (known: {known})",
            "give --images DIR, or write the split into pipeline.yaml",
        )
    del annotations, limit  # in the configuration by now
    chosen = config.data.splits[name]
    output = output or config.data.features / f"{name}.h5"
    if output.suffix != ".h5":
        raise UserError(f"--output {output}: the index file must end in .h5", f"use --output {output}.h5")
    if not chosen.images.is_dir():
        raise UserError(f"{chosen.images}: no such folder of images", "check --images, or data.splits in pipeline.yaml")
    config = config.model_copy(update={"data": config.data.model_copy(update={"splits": {name: chosen}})})
    click.echo("configuration")
    show_config(config, "data", "extract")
    loaded = load_split(chosen, name, config.seed, config.data.max_bad)
    for line in loaded.problems.lines():
        click.echo(f"note: {chosen.annotations}: {line}", err=True)

    from extract.run import extract_features, prepare

    job = prepare(config, name, loaded.records, chosen.images, output)
    _announce(job)
    if dry_run:
        click.echo("dry run: nothing was written")
        return
    summary = extract_features(config, job)
    _report(job, summary)
    if summary.rejects and not allow_rejects:
        sys.exit(EXIT_REJECTS)


def _announce(job: Job) -> None:
    plan = job.plan
    row = 2 if plan.provenance["dtype"] == "float16" else 4
    for size in plan.provenance["grid_shape"]:
        row *= size
    click.echo(
        f"plan: {len(plan.images)} images -> {job.output} ({plan.shards} shards in {job.folder}, "
        f"{len(plan.images) * row / 2**30:.2f} GiB), {plan.provenance['encoder']} {plan.provenance['layer']}, "
        f"weights {job.identity.name}, {plan.provenance['precision']}"
    )
    if job.identity.random:
        click.secho(
            "WARNING: random weights. These features do not know what is in a photograph; they are for the demo and "
            "for tests, not for real captions. Use --weights imagenet for those.", fg="yellow", err=True,
        )  # fmt: skip


def _report(job: Job, summary: Summary) -> None:
    made = summary.shards - summary.done_before
    if made == 0 and summary.seconds == 0:
        click.echo(f"nothing to do: {job.output} is complete ({summary.images} images, {summary.shards} shards)")
    else:
        click.echo(
            f"done: {job.output}: {summary.images} images in {summary.shards} shards "
            f"({made} made now, {summary.done_before} were there), {summary.seconds:.1f} s"
        )
    if summary.rejects:
        click.echo(f"rejected images: {summary.rejects.total()} (their rows are kept, marked not valid)")
        for reason, count in summary.rejects.most_common():
            click.echo(f"  {count:6d}  {reason}")
