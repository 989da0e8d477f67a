"""SIGKILL at random times and between file system operations until the work is done; then bytes are compared.

Kills one process, or some of three that share an extraction. The jobs start no processes themselves.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gridcap.extract.cluster.share import Share
from gridcap.extract.verify import verify_store
from gridcap.train.engine.checkpoint import load_checkpoint
from tests.torture import children, runs
from tests.torture.case import Part, contents, require
from tests.torture.stores import extract_all, write_photos


def _with_kill(
    job: Callable[[], object], extent: children.Extent, rng: np.random.Generator
) -> tuple[Callable[[], object], float]:
    """Return a job and the delay after which it is killed: random, or at a file system operation."""
    if rng.random() < 0.5:
        return job, float(rng.uniform(0, 1.2 * extent.seconds))
    return children.killed_at(job, int(rng.integers(extent.events))), children.SELF_KILLED


def _prepare_extraction(folder: Path) -> None:
    photos = write_photos(folder / "photos")
    children.measure(lambda: extract_all(photos, folder / "baseline" / "s.h5"), folder / "extent.json")


def _run_extraction(folder: Path, rng: np.random.Generator) -> str:
    """Run one kill; unfinished work continues in the next case."""
    photos, output = folder / "photos", folder / "killed" / "s.h5"
    extent, workers = children.read_extent(folder / "extent.json"), 3 if rng.random() < 0.4 else 1
    jobs = [(lambda i=i: extract_all(photos, output, Share(i, workers))) for i in range(workers)]
    kills = [
        _with_kill(job, extent, rng) if i == 0 or rng.random() < 0.5 else (job, None) for i, job in enumerate(jobs)
    ]
    children.run([job for job, _ in kills], [delay for _, delay in kills])
    if output.exists():
        problems = verify_store(output).problems
        require(not problems, f"the index exists, but the store is incomplete: {problems[:1]}")
    if rng.random() < 0.1 or output.exists():
        children.run([lambda: extract_all(photos, output)], [None])
        actual, expected = contents(folder / "killed"), contents(folder / "baseline")
        require(actual.keys() == expected.keys(), f"different files: {sorted(actual.keys() ^ expected.keys())}")
        require(actual == expected, "the bytes differ")
        shutil.rmtree(folder / "killed")
        return "killed, finished, same bytes"
    return "killed, to be continued"


def _prepare_training(folder: Path) -> None:
    children.run([lambda: runs.prepare(folder)], [None])
    children.measure(lambda: runs.train(folder, folder / "baseline", resume=False), folder / "extent.json")


def _run_training(folder: Path, rng: np.random.Generator) -> str:
    output, baseline = folder / "killed", folder / "baseline"

    def job() -> None:
        runs.train(folder, output, resume=(output / "config.yaml").exists())

    killed, delay = _with_kill(job, children.read_extent(folder / "extent.json"), rng)
    children.run([killed], [delay])
    if (output / "checkpoints.json").exists():
        load_checkpoint(output, "last")
    if rng.random() < 0.2:
        children.run([job], [None])
        runs.require_same_weights(output, baseline)
        leftovers = [path.name for path in output.rglob("*") if ".tmp" in path.name]
        require(not leftovers, f"temporary files remain: {leftovers}")
        shutil.rmtree(output)
        return "killed, resumed, same weights"
    return "killed, to be continued"


EXTRACTION = Part("extraction killed: one process, or some of three", 200, 15, _prepare_extraction, _run_extraction)
TRAINING = Part("training killed", 50, 6, _prepare_training, _run_training)
