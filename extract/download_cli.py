"""The command `gridcap download`."""

from __future__ import annotations

from pathlib import Path

import click

from gridcap.common.command import NO_SETTINGS, pipeline_command
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import UserError

EXAMPLES = """
gridcap download --karpathy   (COCO 2014 and Karpathy's splits into data/coco)
gridcap download --year 2017 --splits val --to /data/coco
gridcap download --annotations-only
gridcap download --mirror http://mirror.example.org/coco   (zips/train2014.zip, ... below it)
"""
_SPLITS = ("train", "val")


@pipeline_command("download", EXAMPLES, uses=NO_SETTINGS)
@click.option("--year", type=click.Choice(["2014", "2017"]), default="2014", show_default=True, help="Of COCO.")
@click.option("--splits", default="train,val", show_default=True, help="Whose images: train, val, or both.")
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("data/coco"),
    show_default=True,
    help="Folder for images and annotations.",
)
@click.option("--annotations-only", is_flag=True, help="The captions, without any image.")
@click.option("--karpathy", is_flag=True, help="Karpathy's splits of COCO 2014 too: annotations/dataset_coco.json.")
@click.option("--mirror", help="Fetch everything below this address instead of the official ones.")
@click.option("--keep-archives", is_flag=True, help="Keep the zip files after they are unpacked.")
def main(
    config: PipelineConfig,
    dry_run: bool,
    year: str,
    splits: str,
    to: Path,
    annotations_only: bool,
    karpathy: bool,
    mirror: str | None,
    keep_archives: bool,
) -> None:
    """Download COCO's images and captions, check and unpack them.

    Stopped at any moment, the same command goes on where it was. Exit status: 0 all is there, 1 failure, 2 wrong use.
    """
    from gridcap.extract.coco import check_space, choose, download, space_needed

    del config  # COCO's places are the defaults of pipeline.yaml
    names = tuple(dict.fromkeys(name.strip() for name in splits.split(",")))
    if unknown := [name for name in names if name not in _SPLITS]:
        raise UserError(f"--splits {splits}: there is no {unknown[0]!r} with captions", "choose from train,val")
    archives = choose(year, names, annotations_only, karpathy)
    for archive in archives:
        state = "there already" if archive.is_there(to) else f"{archive.size / 1e9:.2f} GB"
        click.echo(f"  {archive.remote(mirror).url}: {state}")
    check_space(archives, to, keep_archives)
    if dry_run:
        needed = space_needed(archives, to, keep_archives)
        click.echo(f"dry run: would download and unpack this into {to}; takes at most {needed / 1e9:.1f} GB of disk")
        return
    unpacked = sum(download(archive, to, mirror, keep_archives) for archive in archives)
    click.echo(f"done: {to}: {unpacked} files unpacked" if unpacked else f"done: {to}: all was there")
