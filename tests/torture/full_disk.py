"""A disk that fills up at a random time: a clear error, no loss of existing files, and a rerun that finishes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gridcap.common.store.shard_reader import ShardReader
from gridcap.extract.verify import verify_store
from gridcap.train.engine.checkpoint import load_checkpoint
from tests.torture import children, runs
from tests.torture.case import Part, contents, require
from tests.torture.stores import extract_all, write_photos

PAGE_BYTES = 4096
MAX_FREE_PAGES = 24
DISK_BYTES = 64 << 20


def _prepare(folder: Path) -> None:
    photos = write_photos(folder / "photos")
    children.measure(lambda: extract_all(photos, folder / "baseline" / "s.h5"), folder / "extraction.json")
    run = folder / "run"
    children.run([lambda: runs.prepare(run)], [None])
    children.measure(lambda: runs.train(run, run / "baseline", resume=False), folder / "training.json")


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _missing() -> str:
    try:
        with tempfile.TemporaryDirectory() as folder, _small_disk(Path(folder), 1 << 20):
            return ""
    except (OSError, subprocess.CalledProcessError):
        return "permission to mount a tmpfs (root)"


def _fill(disk: Path, free_pages: int) -> Path:
    """Fill the disk except for a number of pages and return the file that occupies it."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        for _ in range(100):  # the job writes at the same time
            free = shutil.disk_usage(disk).free - free_pages * PAGE_BYTES
            with contextlib.suppress(OSError):
                if free > 0:
                    os.posix_fallocate(file.fileno(), 0, free)
                break
    return filler


def _run(folder: Path, rng: np.random.Generator) -> str:
    kind = "extraction" if rng.random() < 0.6 else "training"
    seconds, free_pages = children.read_extent(folder / f"{kind}.json").seconds, int(rng.integers(MAX_FREE_PAGES))
    with _small_disk(folder / "disk", DISK_BYTES) as disk:
        job, check = _jobs(folder, disk, kind)
        child = children.start(job)
        time.sleep(float(rng.uniform(0, seconds)))
        filler = _fill(disk, free_pages)
        status = children.wait(child)
        require(status in (children.SUCCESS, children.USER_ERROR), f"{kind} exited with status {status}")
        check()
        filler.unlink()
        children.run([job], [None])
        _compare(folder, disk, kind)
        shutil.rmtree(disk / "work")
    return f"{kind}: " + (
        "finished before the disk was full" if status == children.SUCCESS else "error, finished after a rerun"
    )


def _jobs(folder: Path, disk: Path, kind: str) -> tuple[Callable[[], object], Callable[[], None]]:
    """Return the job that writes to the disk, and a check of the files that it left there."""
    work = disk / "work"
    if kind == "extraction":
        output = work / "s.h5"

        def check_store() -> None:
            for path in (work / "s").glob("[0-9]*.h5"):
                with ShardReader(path) as shard:
                    require(not shard.corrupted_rows(), f"{path.name} is corrupted")
            require(
                not output.exists() or not verify_store(output).problems,
                "the index exists, but the store is incomplete",
            )

        return lambda: extract_all(folder / "photos", output), check_store

    def check_checkpoint() -> None:
        if (work / "checkpoints.json").exists():
            load_checkpoint(work, "last")

    return lambda: runs.train(folder / "run", work, resume=(work / "config.yaml").exists()), check_checkpoint


def _compare(folder: Path, disk: Path, kind: str) -> None:
    if kind == "extraction":
        require(contents(disk / "work") == contents(folder / "baseline"), "the bytes differ")
    else:
        runs.require_same_weights(disk / "work", folder / "run" / "baseline")


PART = Part("full disk during extraction and training", 100, 10, _prepare, _run, _missing)
