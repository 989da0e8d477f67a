"""extract-features, import-features and verify-features."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from common.annotations import captions_alone, load_split
from common.command import flag, pipeline_command, show_config
from common.config import PipelineConfig
from common.errors import EXIT_FAILURE, EXIT_REJECTS, UserError

if TYPE_CHECKING:
    from extract.run import Job, Summary

EXTRACT_EXAMPLES = """
extract-features --split train                                   (paths from pipeline.yaml)
extract-features --images photos/ --annotations captions.json --output features/train.h5
extract-features --images photos/ --output features/photos.h5    (a folder without captions)
extract-features --split val --limit 500 --weights random        (a quick try, nothing to download)
extract-features --split train --dry-run                         (what would be done)
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
    given = {key: value for key, value in (("annotations", annotations), ("limit", limit)) if value is not None}
    chosen = config.data.splits[name].model_copy(update=given)
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

    job = prepare(config, name, loaded.records, chosen.images, output, download=not dry_run)
    _announce(config, job)
    if dry_run:
        click.echo("dry run: nothing was written")
        return
    summary = extract_features(config, job)
    _report(job, summary)
    if summary.rejects and not allow_rejects:
        sys.exit(EXIT_REJECTS)


def _announce(config: PipelineConfig, job: Job) -> None:
    from extract.run import settled_plan

    plan = job.plan
    if (job.folder / "plan.json").exists():  # then it is only read, which a dry run may do
        plan = settled_plan(config, job)
        kept = [
            f"{name.replace('_', ' ')} {getattr(plan, name)}"
            for name in ("shard_size", "batch_size")
            if getattr(plan, name) != getattr(job.plan, name)
        ]
        if kept:
            click.echo(f"note: this store was begun with {' and '.join(kept)}, and that is kept", err=True)
        there = sum((job.folder / plan.shard_name(shard)).exists() for shard in range(plan.shards))
        click.echo(f"already there: {there} of {plan.shards} shards")
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
    made = summary.made
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
        click.echo(f"dry run: would check {features}: {len(plan.images)} rows in {plan.shards} shards")
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
