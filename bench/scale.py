"""Cost of planning, resuming, and indexing very large stores, simulated without features.

    python -m bench.scale --images 100000000 --folder /tmp/scale

Every step runs in its own process and reports its duration and peak memory. The simulated shards consist of headers
only. The measured steps read nothing else of a shard, so they take the same time for complete shards on the same disk.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from gridcap.common.files import publish_text
from gridcap.common.store.header import HEADER_BYTES
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_format import ShardInfo
from gridcap.extract.cluster.share import Share
from gridcap.extract.manifest import ImageList
from gridcap.extract.plan import FILE, Plan, read_plan, store_folder, write_planned_index
from gridcap.extract.planning import PlanRequest, load_or_create_plan

PROCESSES = 64
PROVENANCE = {
    "encoder": "inception_v3",
    "layer": "Mixed_7c",
    "weights": {"name": "none", "sha256": "", "random": True},
    "preprocessing": {},
    "grid_shape": [8, 8, 2048],
    "dtype": "float16",
    "precision": "float32",
    "compile": False,
    "views": ["original"],
    "versions": {},
}


@dataclass(frozen=True)
class Names:
    """A list of `count` images, generated during iteration."""

    count: int

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for i in range(self.count):
            yield i, f"{i // 1_000_000:03}/{i // 1000 % 1000:03}/{i:012}.jpg"


def make_plan(output: Path, images: int, shard_size: int) -> str:
    """First process: list the images and write the plan."""
    folder = store_folder(output)
    plan = Plan("scale", shard_size, 32, PROVENANCE, (ImageList.from_images(Names(images), shard_size, folder),))
    publish_text(folder / FILE, plan.to_json())
    return (
        f"{plan.shards} shards; image manifest {(folder / plan.lists[0].file).stat().st_size / 1e9:.2f} GB, plan.json "
        + (f"{(folder / FILE).stat().st_size / 1e6:.1f} MB")
    )


def start_worker(output: Path, images: int, shard_size: int) -> str:
    """Further processes: list the images, compare them with the plan, and select their shards."""
    requested = Plan("scale", shard_size, 32, PROVENANCE, (ImageList.from_images(Names(images), shard_size),))
    plan = load_or_create_plan(PlanRequest(requested, Names(images), store_folder(output)))
    mine = Share(7, PROCESSES).of(plan.shards)
    first = plan.images_of(mine[0], store_folder(output))
    return f"{len(mine)} shards for 1 of {PROCESSES} processes; the first image is {first[0][1]}"


def fake_shards(output: Path, images: int, shard_size: int) -> str:
    """Setup, not part of Gridcap: write header-only files instead of shards."""
    folder, plan = store_folder(output), read_plan(store_folder(output))
    for shard in range(plan.shards):
        path = folder / plan.shard_name(shard)
        path.parent.mkdir(exist_ok=True)
        info = ShardInfo(shard, plan.digest(), len(plan.rows_of(shard)), 0, HEADER_BYTES, f"{shard:064x}")
        path.write_bytes(info.to_bytes())
    return f"{plan.shards} files"


def resume(output: Path, images: int, shard_size: int) -> str:
    """Rerun: find the missing shards, here every tenth."""
    folder, plan = store_folder(output), read_plan(store_folder(output))
    missing = [folder / plan.shard_name(shard) for shard in range(0, plan.shards, 10)]
    for path in missing:
        path.rename(path.with_suffix(".missing"))
    start = time.perf_counter()
    existing = plan.existing_shards(folder)
    seconds = time.perf_counter() - start
    for path in missing:
        path.with_suffix(".missing").rename(path)
    assert len(existing) == plan.shards - len(missing)
    return f"{len(missing)} missing shards, found in {seconds:.2f} s"


def index(output: Path, images: int, shard_size: int) -> str:
    """Last process: read all headers and write the index."""
    write_planned_index(output, read_plan(store_folder(output)))
    return f"{output.stat().st_size / 1e9:.2f} GB"


def open_store(output: Path, images: int, shard_size: int) -> str:
    """Reader: open the store, which reads all shard headers, and find an image by its id."""
    with FeatureStore(output) as store:
        last_id, last = store.image_id[-1], len(store) - 1
        opened = time.perf_counter()
        assert store.row_of_image(int(last_id)) == last
        seconds = time.perf_counter() - opened
        return f"{len(store)} rows; ids sorted for lookup in {seconds:.1f} s; the last image is {store.file_name[last]}"


STEPS: dict[str, Callable[[Path, int, int], str]] = {
    step.__name__: step for step in (make_plan, start_worker, fake_shards, resume, index, open_store)
}


@click.command()
@click.option(
    "--images", type=click.IntRange(min=1), default=100_000_000, show_default=True, help="number of images in the plan"
)
@click.option("--shard-size", type=click.IntRange(min=1), default=1024, show_default=True, help="images per shard")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="empty output folder")
@click.option("--step", type=click.Choice(list(STEPS)), help="run only this step, in this process")
def main(images: int, shard_size: int, folder: Path, step: str | None) -> None:
    """Simulate a store of many images without features, step by step."""
    output = folder / "scale.h5"
    if step is not None:
        start = time.perf_counter()
        message = STEPS[step](output, images, shard_size)
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        click.echo(json.dumps({"seconds": seconds, "MiB": memory, "message": message}))
        return
    if folder.exists() and any(folder.iterdir()):
        raise click.UsageError(f"{folder} is not empty")
    click.echo(f"{'step':<14}{'seconds':>10}{'MiB':>8}  ({images:,} images, shards of {shard_size})")
    for name in STEPS:
        command = [sys.executable, "-m", "bench.scale", "--step", name, "--folder", str(folder)]
        command += ["--images", str(images), "--shard-size", str(shard_size)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        result = json.loads(run.stdout)
        click.echo(f"{name:<14}{result['seconds']:>10.1f}{result['MiB']:>8.0f}  {result['message']}")


if __name__ == "__main__":
    main()
