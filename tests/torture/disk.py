"""A disk that gets full at a random moment: a clear error, nothing lost that was there, and a rerun finishes."""

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

_PAGE = 4096
_MOST_LEFT = 24  # pages that are left free at most
_DISK = 64 << 20


def _prepare(folder: Path) -> None:
    photos = write_photos(folder / "photos")
    children.measure(lambda: extract_all(photos, folder / "calm" / "s.h5"), folder / "extraction.json")
    run = folder / "run"
    children.run([lambda: runs.prepare(run)], [None])
    children.measure(lambda: runs.train(run, run / "calm", resume=False), folder / "training.json")


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
        return "the right to mount a small disk (root has it)"


def _fill(disk: Path, left: int) -> Path:
    """Take all room but so many pages; the file that takes it."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        for _ in range(100):  # meanwhile somebody else writes
            free = shutil.disk_usage(disk).free - left * _PAGE
            with contextlib.suppress(OSError):
                if free > 0:
                    os.posix_fallocate(file.fileno(), 0, free)
                break
    return filler


def _run(folder: Path, rng: np.random.Generator) -> str:
    kind = "extraction" if rng.random() < 0.6 else "training"
    seconds, left = children.extent_of(folder / f"{kind}.json").seconds, int(rng.integers(_MOST_LEFT))
    with _small_disk(folder / "disk", _DISK) as disk:
        job, check = _jobs(folder, disk, kind)
        child = children.start(job)
        time.sleep(float(rng.uniform(0, seconds)))
        filler = _fill(disk, left)
        status = children.end(child)
        require(status in (children.WELL, children.WITH_AN_ERROR), f"{kind} ended with {status}")
        check()
        filler.unlink()
        children.run([job], [None])
        _compare(folder, disk, kind)
        shutil.rmtree(disk / "work")
    return f"{kind}: " + ("it was done already" if status == children.WELL else "an error, and finished with more room")


def _jobs(folder: Path, disk: Path, kind: str) -> tuple[Callable[[], object], Callable[[], None]]:
    """What writes on the disk, and what must hold of what it left there."""
    work = disk / "work"
    if kind == "extraction":
        output = work / "s.h5"

        def sound() -> None:
            for path in (work / "s").glob("[0-9]*.h5"):
                with ShardReader(path) as shard:
                    require(not shard.corrupted_rows(), f"{path.name} is damaged")
            require(not output.exists() or not verify_store(output).problems, "an index of what is not whole")

        return lambda: extract_all(folder / "photos", output), sound

    def loads() -> None:
        if (work / "checkpoints.json").exists():
            load_checkpoint(work, "last")

    return lambda: runs.train(folder / "run", work, resume=(work / "config.yaml").exists()), loads


def _compare(folder: Path, disk: Path, kind: str) -> None:
    if kind == "extraction":
        require(contents(disk / "work") == contents(folder / "calm"), "other bytes")
    else:
        runs.require_same_weights(disk / "work", folder / "run" / "calm")


PART = Part("a disk that gets full, in extraction and training", 100, 10, _prepare, _run, _missing)
