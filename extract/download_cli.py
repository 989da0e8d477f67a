"""The command `gridcap download`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gridcap.common.command import NO_SETTINGS, pipeline_command
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import UserError
from gridcap.common.text import plural

EXAMPLES = """
gridcap download --karpathy   (COCO 2014 and Karpathy's splits into data/coco)
gridcap download --year 2017 --splits val --output /data/coco
gridcap download --annotations-only
gridcap download --mirror http://mirror.example.org/coco   (zips/train2014.zip, ... below it)
"""
SPLITS = ("train", "val")


@dataclass(frozen=True)
class DownloadRequest:
    """The options of one `gridcap download` call."""

    year: str
    splits: str
    output: Path
    annotations_only: bool
    karpathy: bool
    mirror: str | None
    keep_archives: bool

    def split_names(self) -> tuple[str, ...]:
        """Return the unique names in `splits`.

        Raises:
            UserError: unknown name.
        """
        names = tuple(dict.fromkeys(name.strip() for name in self.splits.split(",")))
        if unknown := [name for name in names if name not in SPLITS]:
            raise UserError(
                f"--splits {self.splits}: COCO has no captions for {unknown[0]!r}", "use train, val, or both"
            )
        return names


@pipeline_command("download", EXAMPLES, uses=NO_SETTINGS)
@click.option("--year", type=click.Choice(["2014", "2017"]), default="2014", show_default=True, help="COCO release")
@click.option("--splits", default="train,val", show_default=True, help="image splits: train, val, or both")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("data/coco"),
    show_default=True,
    help="folder for images and annotations",
)
@click.option("--annotations-only", is_flag=True, help="download the captions but no images")
@click.option("--karpathy", is_flag=True, help="also download Karpathy's splits of COCO 2014 (dataset_coco.json)")
@click.option("--mirror", help="address of a mirror to use instead of the official servers")
@click.option("--keep-archives", is_flag=True, help="keep the zip files after unpacking")
def main(config: PipelineConfig, dry_run: bool, **options: Any) -> None:
    """Download, verify, and unpack the images and captions of COCO.

    If interrupted, rerun the command to resume. Exit status: 0 complete, 1 failure, 2 usage error.
    """
    from gridcap.extract.coco import check_space, download, select_archives, space_needed

    del config  # the default output is where the built-in configuration looks for COCO
    request = DownloadRequest(**options)
    output, mirror = request.output, request.mirror
    archives = select_archives(request.year, request.split_names(), request.annotations_only, request.karpathy)
    for archive in archives:
        state = "already unpacked" if archive.is_unpacked(output) else f"{archive.size / 1e9:.2f} GB"
        click.echo(f"  {archive.remote(mirror).url}: {state}")
    check_space(archives, output, request.keep_archives)
    if dry_run:
        needed = space_needed(archives, output, request.keep_archives)
        click.echo(f"dry run: would download and unpack into {output}, using up to {needed / 1e9:.1f} GB")
        return
    count = sum(download(archive, output, mirror, request.keep_archives) for archive in archives)
    click.echo(f"done: {output}: {plural(count, 'file')} unpacked" if count else f"done: {output}: already complete")
