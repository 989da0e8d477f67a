"""The commands `gridcap import`, `gridcap verify`, and `gridcap inspect`, which work on whole stores."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gridcap.common.captions.records import ImageRecord
from gridcap.common.captions.split import captions_only, columns_of, load_split
from gridcap.common.command import Uses, flag, pipeline_command, reject_ignored, show_config
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import EXIT_FAILURE, PathError, UserError
from gridcap.common.files import check_writable
from gridcap.common.progress import progress_bar
from gridcap.common.text import escape_line, plural

if TYPE_CHECKING:
    from gridcap.extract.importers.layout import Layout
    from gridcap.extract.verify import Report

IMPORT_EXAMPLES = """
gridcap import tutorial_npy/ --annotations captions_train.json --output features/train.h5
gridcap import grid_features.h5 --split karpathy-train --annotations dataset_coco.json --output features/train.h5
gridcap import encoded_images.pkl --annotations captions.csv --output features/train.h5 --dtype float32
gridcap import resnet_chw.h5 --layout chw --output features/train.h5
"""
VERIFY_EXAMPLES = """
gridcap verify features/train.h5
gridcap verify features/train.h5 --annotations captions_train.json
gridcap verify features/train.h5 --repair; gridcap extract --split train
"""
INSPECT_EXAMPLES = """
gridcap inspect features/train.h5
gridcap inspect features/train.h5 --invalid > invalid.txt
gridcap inspect captions.csv
gridcap inspect dataset_coco.json --split karpathy-val
gridcap inspect features/train.h5 --plot grids.png --images data/coco/train2014
"""
PICTURE_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")
CAPTIONS_USES = ("data.max_invalid", "data.image_column", "data.caption_column", "seed")
IMPORT_USES = Uses(("extract.dtype", "extract.shard_size", *CAPTIONS_USES), "data.max_invalid=5%")
INSPECT_USES = Uses(("data.image_column", "data.caption_column"), "data.image_column=photo")
VERIFY_USES = Uses(CAPTIONS_USES, "data.max_invalid=5%")


@dataclass(frozen=True)
class _ImportOptions:
    """Options of `gridcap import`."""

    source: Path
    output: Path
    annotations: Path | None
    split: str | None
    layout: Layout | None


@pipeline_command("import", IMPORT_EXAMPLES, uses=IMPORT_USES)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="index file of the store, ending in .h5")
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    help="captions file of the images; see docs/captions.md",
)
@click.option("--split", help="name of the split  [default: the name of --output]")
@click.option(
    "--layout",
    type=click.Choice(["hwc", "chw", "nc", "c"]),
    help="axes of the arrays: rows, columns, channels (hwc); channels first (chw); cells, channels (nc); channels (c)  "
    "[default: hwc, nc, or c, by the number of axes]",
)
@flag("--image-column", "data.image_column")
@flag("--caption-column", "data.caption_column")
@flag("--dtype", "extract.dtype")
@flag("--shard-size", "extract.shard_size")
def import_features(config: PipelineConfig, dry_run: bool, **values: Any) -> None:
    """Import features written by other programs into a feature store.

    SOURCE is a folder of .npy files (TensorFlow's tutorial) or .npz files (named by image id, with the array `feat`),
    a pickled dict of arrays, an HDF5 file with one dataset per image (<id>, <id>_grids, <id>_features), or an .npz or
    HDF5 file with the arrays `features` and `file_name` or `image_id`. Every image needs a grid of the same shape.
    Exit status: 0 success, 1 failure, 2 usage error.
    """
    options = _ImportOptions(**values)
    output = options.output
    if output.suffix != ".h5":
        raise UserError(
            f"--output {output}: the index file must end in .h5", f"pass --output {output.with_suffix('.h5')}"
        )
    from gridcap.extract.importers.features import ImportRequest, import_features
    from gridcap.extract.importers.matching import match_keys
    from gridcap.extract.importers.sources import open_source

    show_config(config, "extract", full=dry_run)
    split = options.split or output.stem
    records = None if options.annotations is None else _load_records(config, options.annotations, split)
    with progress_bar(unit="file", desc="open", leave=False) as bar:
        source = open_source(options.source, bar.update, lambda message: click.secho(f"WARNING: {message}", err=True))
    pairs = match_keys(source, records)
    missing = len(records) - len(pairs) if records is not None else 0
    note = f"; {plural(missing, 'image')} of {options.annotations} without features" if missing else ""
    click.echo(f"{options.source}: {source.kind}, importing {len(pairs)} of {plural(len(source.keys), 'image')}{note}")
    extract = config.extract
    request = ImportRequest(
        source, pairs, options.source.name, output, split, extract.dtype, extract.shard_size, options.layout
    )
    if dry_run:
        click.echo("dry run: nothing was written")
        return
    with progress_bar(total=len(pairs), unit="image", desc=split) as bar:
        count = import_features(request, bar.update, lambda message: click.echo(f"note: {message}", err=True))
    click.echo(f"done: {output}: {plural(count, 'image')}")


def _load_records(config: PipelineConfig, annotations: Path, split: str) -> Sequence[ImageRecord]:
    """Read the images of a captions file and print notes about its problems."""
    loaded = load_split(
        captions_only(annotations), split, config.seed, config.data.max_invalid, columns=columns_of(config.data)
    )
    for line in loaded.problems.lines():
        click.echo(f"note: {annotations}: {line}", err=True)
    return loaded.records


@pipeline_command("verify", VERIFY_EXAMPLES, uses=VERIFY_USES)
@click.argument("features", type=click.Path(path_type=Path))
@click.option("--annotations", type=click.Path(path_type=Path), help="captions file with the expected images")
@flag("--image-column", "data.image_column")
@flag("--caption-column", "data.caption_column")
@click.option("--repair", is_flag=True, help="delete corrupted files, so that a rerun of the extraction recreates them")
def verify_features(
    config: PipelineConfig, dry_run: bool, features: Path, annotations: Path | None, repair: bool
) -> None:
    """Verify the checksums and the rows of a feature store.

    Exit status: 0 no problems, 1 corrupted or incomplete, 2 usage error.
    """
    from gridcap.extract.repair import find_corrupted, repair_store
    from gridcap.extract.verify import CAPTIONS_CHECK, NONZERO_CHECK, plan_of, verify_store

    show_config(config, "data", full=dry_run)
    image_ids = None
    if annotations is not None:
        image_ids = {record.image_id for record in _load_records(config, annotations, features.stem)}
    plan = plan_of(features)
    if dry_run:
        click.echo(
            f"dry run: {features} would be verified: {plural(plan.images, 'row')} in {plural(plan.shards, 'shard')}"
        )
        return
    with progress_bar(total=plan.images, unit="row", desc="verify", leave=False) as bar:
        report = verify_store(features, image_ids, bar.update)
    _print_report(features, report)
    if not report.problems:
        return
    rerun = "import" if plan.provenance.get("encoder") == "imported" else "extract"
    corrupted = repair_store(features, report) if repair else find_corrupted(features, report)
    if repair:
        for path in corrupted:
            click.echo(f"deleted: {path}")
    if corrupted and not repair:
        files = plural(len(corrupted), "corrupted file")
        click.echo(f"--repair deletes {files}; rerunning gridcap {rerun} then recreates what is missing")
    elif any(problem.check not in (CAPTIONS_CHECK, NONZERO_CHECK) for problem in report.problems):
        click.echo(f"rerun the gridcap {rerun} command that wrote the store: it writes what is missing")
    sys.exit(EXIT_FAILURE)


def _print_report(features: Path, report: Report) -> None:
    """Print a table of the checks, then the problems."""
    from gridcap.extract.verify import CHECKS

    problems = Counter(problem.check for problem in report.problems)
    click.echo(f"{'check':<32}{'checked':>10}{'problems':>10}")
    for check in CHECKS:
        if report.checked[check]:
            click.echo(f"  {check:<30}{report.checked[check]:10d}{problems[check]:10d}")
    for problem in report.problems:
        click.echo(f"problem: {problem.shard or features}: {problem.check}: {escape_line(problem.detail)}", err=True)
    if not report.problems:
        click.echo(f"no problems: {features}: {plural(report.rows, 'row')}, {report.valid:,} valid")


@pipeline_command("inspect", INSPECT_EXAMPLES, uses=INSPECT_USES)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--invalid", is_flag=True, help="list the invalid images only, one per line: file name, tab, reason")
@click.option("--plot", type=click.Path(path_type=Path), help="plot the grids of a few images to this file")
@click.option("--images", type=click.Path(path_type=Path), help="with --plot: image folder, to show the photos")
@click.option("--split", help="captions file: part of it to describe  [default: train]")
@flag("--image-column", "data.image_column")
@flag("--caption-column", "data.caption_column")
def inspect_features(config: PipelineConfig, dry_run: bool, path: Path, split: str | None, **values: Any) -> None:
    """Describe a feature store or a captions file.

    Statistics of a store are computed from a sample of the rows. Exit status: 0 success, 1 failure, 2 usage error.
    """
    invalid, plot, images = values["invalid"], values["plot"], values["images"]
    if path.suffix.lower() != ".h5" and path.exists():
        if invalid or plot is not None or images is not None:
            raise UserError(f"{path}: --invalid, --plot, and --images are for feature stores", "omit them")
        _inspect_captions(config, dry_run, path, split or "train")
        return
    if split is not None:
        raise UserError(f"--split {split}: only for captions files", "omit it")
    reject_ignored(["data.image_column", "data.caption_column"], "on a feature store", "omit it")
    _check_plot_options(invalid, plot, images)
    _inspect_store(path, dry_run, invalid, plot, images)


def _inspect_captions(config: PipelineConfig, dry_run: bool, path: Path, split: str) -> None:
    from gridcap.common.captions.describe import describe_captions

    if dry_run:
        click.echo(f"dry run: {path} would be inspected")
        return
    for line in describe_captions(path, split, columns_of(config.data)):
        click.echo(line)


def _inspect_store(features: Path, dry_run: bool, invalid: bool, plot: Path | None, images: Path | None) -> None:
    from gridcap.common.store.reader import FeatureStore
    from gridcap.extract.describe import describe, file_limit_warning, summarize_store
    from gridcap.extract.plot import plot_grids

    with FeatureStore(features) as store:
        if dry_run:
            click.echo(f"dry run: {features} would be inspected: {plural(len(store), 'row')}")
            return
        if invalid:
            for row, reason in store.invalid_reasons.items():
                click.echo(f"{escape_line(store.file_name[row])}\t{escape_line(reason)}")
            return
        check_writable(plot)
        for line in describe(store, summarize_store(store)):
            click.echo(line)
        if warning := file_limit_warning(store):
            click.secho(warning, fg="yellow", err=True)
        if plot is None:
            return
        if not store.valid.any():
            raise UserError(f"--plot {plot}: {features} contains no valid image", "omit --plot")
        count, unreadable = plot_grids(store, plot, images)
        click.echo(f"plotted {plural(count, 'image')}: {plot}")
        if unreadable:
            message = f"WARNING: {plural(unreadable, 'photo')} of {count} missing or invalid in {images}, shown in gray"
            click.secho(message, fg="yellow", err=True)


def _check_plot_options(invalid: bool, plot: Path | None, images: Path | None) -> None:
    """Raise UserError for options that contradict each other, and PathError if there is no image folder."""
    if plot is not None and invalid:
        raise UserError(f"--plot {plot}: ignored with --invalid", "omit one of them")
    if plot is not None and plot.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--plot {plot}: unsupported file type", f"use {', '.join(PICTURE_SUFFIXES)}")
    if images is not None and plot is None:
        raise UserError(f"--images {images}: only used with --plot", "add --plot grids.png, or omit --images")
    if images is not None and not images.is_dir():
        problem = "not a folder" if images.exists() else "no such folder"
        raise PathError(f"--images {images}: {problem}", "pass the folder that the features were extracted from")
