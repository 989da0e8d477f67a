"""import-features, verify-features and inspect-features: what is done to a store as a whole."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import click

from gridcap.common.captions.split import captions_only, load_split
from gridcap.common.command import NO_SETTINGS, Uses, flag, pipeline_command, show_config
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import EXIT_FAILURE, UserError
from gridcap.common.progress import progress_bar

IMPORT_EXAMPLES = """
import-features tutorial_npy/ --annotations captions_train.json --output features/train.h5
import-features cocobu_att/ --split karpathy-train --annotations dataset_coco.json --output features/train.h5
import-features encoded_images.pkl --annotations captions.csv --output features/train.h5 --dtype float32
"""
VERIFY_EXAMPLES = """
verify-features features/train.h5
verify-features features/train.h5 --annotations captions_train.json
verify-features features/train.h5 --repair; extract-features --split train
"""
INSPECT_EXAMPLES = """
inspect-features features/train.h5
inspect-features features/train.h5 --rejected > to_mend.txt
inspect-features features/train.h5 --plot grids.png --images data/coco/train2014
"""


IMPORT_USES = Uses(("extract.dtype", "extract.shard_size", "data.max_invalid", "seed"), "data.max_invalid=5%")
VERIFY_USES = Uses(("data.max_invalid", "seed"), "data.max_invalid=5%")


@pipeline_command("import-features", IMPORT_EXAMPLES, uses=IMPORT_USES)
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
    from gridcap.extract.importers import features as importers

    show_config(config, "extract", full=dry_run)
    name = split or output.stem
    records = None
    if annotations is not None:
        loaded = load_split(captions_only(annotations), name, config.seed, config.data.max_invalid)
        for line in loaded.problems.lines():
            click.echo(f"note: {annotations}: {line}", err=True)
        records = loaded.records
    with progress_bar(unit="file", desc="open", leave=False) as bar:
        opened = importers.open_source(source, bar.update)
    pairs = importers.match_keys(opened, records)
    missing = len(records) - len(pairs) if records is not None else 0
    left_out = f"; {missing} images of {annotations} have no features" if missing else ""
    click.echo(f"{source}: {opened.layout}, {len(pairs)} of {len(opened.keys)} features to import{left_out}")
    if dry_run:
        click.echo("dry run: nothing was written")
        return
    with progress_bar(total=len(pairs), unit="image", desc=name) as bar:
        count = importers.import_features(
            opened, source.name, pairs, output, name, config.extract.dtype, config.extract.shard_size, bar.update
        )
    click.echo(f"done: {output}: {count} images")


@pipeline_command("verify-features", VERIFY_EXAMPLES, uses=VERIFY_USES)
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
    from gridcap.extract import verify

    show_config(config, "data", full=dry_run)
    wanted = None
    if annotations is not None:
        loaded = load_split(captions_only(annotations), features.stem, config.seed, config.data.max_invalid)
        wanted = {record.image_id for record in loaded.records}
    if dry_run:
        plan = verify.plan_of(features)
        click.echo(f"dry run: would check {features}: {plan.images} rows in {plan.shards} shards")
        return
    with progress_bar(unit="row", desc="verify", leave=False) as bar:
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
    elif any(problem.check != verify.CHECKS[-1] for problem in report.problems):
        click.echo("--repair removes what is broken, so that extract-features makes just that again")
    sys.exit(EXIT_FAILURE)


@pipeline_command("inspect-features", INSPECT_EXAMPLES, uses=NO_SETTINGS)
@click.argument("features", type=click.Path(path_type=Path))
@click.option("--rejected", is_flag=True, help="List the rejected images instead, a line each: file, tab, reason.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw a handful of images' grids to this picture.")
@click.option("--images", type=click.Path(path_type=Path), help="Image folder: --plot shows the photos beside.")
def inspect_features(
    config: PipelineConfig, dry_run: bool, features: Path, rejected: bool, plot: Path | None, images: Path | None
) -> None:
    """Show what is in a feature store: where it comes from, rows, rejects, values, size.

    The values are those of a sample of the rows. Exit status: 0 done, 2 not a sound store.
    """
    if plot is not None and plot.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--plot {plot}: not a kind of picture", "end it in .png, .pdf or .svg")
    if images is not None and plot is None:
        raise UserError(f"--images {images}: only with --plot", "add --plot grids.png, or leave it away")
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images}: no such folder", "give the folder that the features were extracted from")
    from gridcap.common.store.reader import FeatureStore
    from gridcap.extract import describe as inspect

    with FeatureStore(features) as store:
        if dry_run:
            click.echo(f"dry run: would look at {len(store)} rows of {features}")
            return
        if rejected:
            for row, reason in store.invalid_reasons.items():
                click.echo(f"{store.file_name[row]}\t{reason}")
            return
        for line in inspect.describe(store, inspect.summarize_store(store)):
            click.echo(line)
        if plot is not None and not store.valid.any():
            raise UserError(f"--plot {plot}: {features} has no valid image to draw", "leave --plot away")
        if plot is not None:
            drawn = inspect.plot_grids(store, plot, images)
            click.echo(f"drawn: {drawn} images in {plot}")
