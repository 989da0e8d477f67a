"""Memory of an extraction against the number of images: reading, queues and writing are real, the CNN is not.

    python -m bench.memory --folder /tmp/memory

The CNN's own memory depends on the batch alone, and it would take hours. What stands in for it returns grids of
the real shape and size, faster than the rest can read and write, so that the queues are as full as they get.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

import extract.worker
from common.allocator import keep_large_buffers
from common.annotations import FolderImages
from common.config import load_config
from extract.encoder import PendingGrids
from extract.run import extract_features, prepare

PHOTOS = 50  # different ones; the rest are links to them


class StandIn:
    """Grids of the real shape, of nothing."""

    side = 299
    grid_shape = (8, 8, 2048)

    def __init__(self, *_: Any) -> None:
        pass

    def submit(self, images: np.ndarray) -> PendingGrids:
        """The same grid for every image of a batch."""
        return PendingGrids(lambda: np.full((len(images), *self.grid_shape), images.mean() / 255, np.float16))


def make_photos(folder: Path, count: int) -> None:
    """`count` JPEG files of 640 x 480."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:06}.jpg"
        if i < PHOTOS:
            noise = rng.integers(0, 256, (48, 64, 3), np.uint8)
            Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=95)
        else:
            path.hardlink_to(folder / f"{i % PHOTOS:06}.jpg")


def extract_once(folder: Path) -> None:
    """Extract, in this process; prints its largest memory."""
    keep_large_buffers()
    extract.worker.GridEncoder = StandIn  # type: ignore[assignment, misc]
    config = load_config(None, {"extract.weights": "random", "extract.device": "cpu"})
    job = prepare(config, "memory", FolderImages(folder / "photos"), folder / "photos", folder / "memory.h5")
    begin = time.perf_counter()
    summary = extract_features(config, job, progress=False)
    seconds = time.perf_counter() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    click.echo(json.dumps({"MiB": memory, "seconds": seconds, "images": summary.images}))


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="A folder for photographs and features.")
@click.option("--images", multiple=True, type=int, default=(1000, 4000, 10000), show_default=True)
@click.option("--once", is_flag=True, hidden=True)
def main(folder: Path, images: tuple[int, ...], once: bool) -> None:
    """Extract features of some numbers of images, each in a process of its own."""
    if once:
        extract_once(folder)
        return
    click.echo(f"{'images':>8}{'MiB':>8}{'images/s':>10}")
    for count in images:
        work = folder / str(count)
        make_photos(work / "photos", count)
        command = [sys.executable, "-m", "bench.memory", "--once", "--folder", str(work)]
        got = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        click.echo(f"{got['images']:8d}{got['MiB']:8.0f}{got['images'] / got['seconds']:10.1f}")
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
