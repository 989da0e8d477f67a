"""The command `gridcap download`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gridcap.common.command import NO_SETTINGS, pipeline_command
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import DownloadError, UserError
from gridcap.common.text import plural
from gridcap.extract.download.datasets import NAMES, OTHERS, Dataset, coco

EXAMPLES = """
gridcap download flickr8k                     (1 GB into data/flickr8k)
gridcap download coco --limit 10000           (10,000 / 2,000 / 2,000 images of COCO 2014, one by one: 2 GB)
gridcap download coco --karpathy              (all of COCO 2014, 20 GB, and Karpathy's splits)
gridcap download coco --year 2017 --splits val --output /data/coco
gridcap download nocaps                       (the validation split)
gridcap download coco --mirror http://mirror.example.org/coco   (zips/train2014.zip, ... below it)
"""
PARTS = ("train", "val")
MAX_SHOWN = 5  # failed images


@dataclass(frozen=True)
class DownloadRequest:
    """The arguments of one `gridcap download` call."""

    name: str
    year: str | None
    splits: str | None
    output: Path | None
    annotations_only: bool
    karpathy: bool
    limit: int | None
    mirror: str | None
    keep_archives: bool

    def dataset(self) -> Dataset:
        """Return the requested dataset.

        Raises:
            UserError: an option does not exist for this dataset, or a split is unknown.
        """
        if self.name == "coco":
            return coco(self.year or "2014", self._parts(), self.karpathy, self.limit)
        given: dict[str, object] = {"--year": self.year, "--splits": self.splits, "--karpathy": self.karpathy}
        if self.name != "nocaps":
            given |= {"--limit": self.limit}
        if useless := [flag for flag, value in given.items() if value]:
            raise UserError(f"{useless[0]} cannot be used with {self.name}", f"omit {useless[0]}")
        return OTHERS[self.name]()

    def _parts(self) -> tuple[str, ...]:
        parts = tuple(dict.fromkeys(name.strip() for name in (self.splits or "train,val").split(",")))
        if unknown := [name for name in parts if name not in PARTS]:
            raise UserError(
                f"--splits {self.splits}: COCO has no captions for {unknown[0]!r}", "use train, val, or both"
            )
        return parts


@pipeline_command("download", EXAMPLES, uses=NO_SETTINGS)
@click.argument("name", type=click.Choice(NAMES))
@click.option("--year", type=click.Choice(["2014", "2017"]), help="COCO release  [default: 2014]")
@click.option("--splits", help="COCO images: train, val, or both  [default: train,val]")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="folder for images and captions  [default: data/NAME]",
)
@click.option("--annotations-only", is_flag=True, help="download the captions but no images")
@click.option("--karpathy", is_flag=True, help="also download Karpathy's splits of COCO 2014 (dataset_coco.json)")
@click.option(
    "--limit",
    type=click.IntRange(1),
    help="download only a random subset of this many training images, and a fifth of it for each of val and test "
    "(coco), or of this many images (nocaps)",
)
@click.option("--mirror", help="address of a mirror to use instead of the official servers")
@click.option("--keep-archives", is_flag=True, help="keep the archives after unpacking")
def main(config: PipelineConfig, dry_run: bool, **options: Any) -> None:
    """Download, verify, and unpack a dataset.

    Also writes a pipeline.yaml with the paths and splits of the dataset into its folder, for --config. If interrupted,
    rerun the command to resume. Exit status: 0 complete, 1 failure, 2 usage error.
    """
    from gridcap.extract.download.archives import check_space, download, space_needed
    from gridcap.extract.download.files import download_annotations, download_split_images, write_pipeline

    request = DownloadRequest(**options)
    dataset, mirror = request.dataset(), request.mirror
    output = request.output or Path("data") / request.name
    archives = [*dataset.annotations, *(() if request.annotations_only else dataset.images)]
    click.echo(f"{dataset.name}: {dataset.terms}")
    for archive in archives:
        state = "already unpacked" if archive.is_unpacked(output) else f"{archive.approximate_size / 1e9:.2f} GB"
        click.echo(f"  {archive.url(mirror)}: {state}")
    for url in dataset.annotation_files.values():
        click.echo(f"  {url}")
    if not dataset.images:
        click.echo("  images: one by one")
    check_space(archives, output, request.keep_archives)
    if dry_run:
        needed = space_needed(archives, output, request.keep_archives)
        click.echo(f"dry run: would download into {output}, using up to {needed / 1e9:.1f} GB for archives")
        return
    count = sum(download(archive, output, mirror, request.keep_archives) for archive in archives)
    download_annotations(dataset, output, mirror)
    pipeline = write_pipeline(dataset, output, request.limit if request.name == "nocaps" else None)
    failed: dict[Path, str] = {}
    if not dataset.images and not request.annotations_only:
        downloaded, failed = download_split_images(dataset, pipeline, output, mirror, config.seed)
        count += downloaded
    for file, reason in list(failed.items())[:MAX_SHOWN]:
        click.echo(f"failed: {file}: {reason}", err=True)
    if failed:
        raise DownloadError(
            f"{output}: {plural(len(failed), 'image')} could not be downloaded",
            "rerun the command to retry them; extract-features treats missing images as invalid",
        )
    click.echo(f"done: {output}: {plural(count, 'file')} written" if count else f"done: {output}: already complete")
    for split in dataset.splits:
        click.echo(f"next: extract-features --config {pipeline} --split {split}")
