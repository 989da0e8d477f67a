"""SIGKILL at random moments and between any two steps on the disk, until the work is done; then bytes are compared.

Of one process, or of some of three that share the work. Neither job has processes of its own beneath it.
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


def _killed(
    job: Callable[[], object], extent: children.Extent, rng: np.random.Generator
) -> tuple[Callable[[], object], float]:
    """A job and the moment at which it is to be killed: a random one, or between two steps on the disk."""
    if rng.random() < 0.5:
        return job, float(rng.uniform(0, 1.2 * extent.seconds))
    return children.dying_at(job, int(rng.integers(extent.events))), children.BY_ITSELF


def _prepare_extraction(folder: Path) -> None:
    photos = write_photos(folder / "photos")
    children.measure(lambda: extract_all(photos, folder / "calm" / "s.h5"), folder / "extent.json")


def _run_extraction(folder: Path, rng: np.random.Generator) -> str:
    """One kill: work that is not finished goes on in the next case."""
    photos, output = folder / "photos", folder / "rough" / "s.h5"
    extent, workers = children.extent_of(folder / "extent.json"), 3 if rng.random() < 0.4 else 1
    jobs = [(lambda i=i: extract_all(photos, output, Share(i, workers))) for i in range(workers)]
    killed = [_killed(job, extent, rng) if i == 0 or rng.random() < 0.5 else (job, None) for i, job in enumerate(jobs)]
    children.run([job for job, _ in killed], [moment for _, moment in killed])
    if output.exists():
        problems = verify_store(output).problems
        require(not problems, f"an index stands beside what is not whole: {problems[:1]}")
    if rng.random() < 0.1 or output.exists():
        children.run([lambda: extract_all(photos, output)], [None])
        found, expected = contents(folder / "rough"), contents(folder / "calm")
        require(found.keys() == expected.keys(), f"other files: {sorted(found.keys() ^ expected.keys())}")
        require(found == expected, "other bytes")
        shutil.rmtree(folder / "rough")
        return "killed, run to its end, the same bytes"
    return "killed, to go on"


def _prepare_training(folder: Path) -> None:
    children.run([lambda: runs.prepare(folder)], [None])
    children.measure(lambda: runs.train(folder, folder / "calm", resume=False), folder / "extent.json")


def _run_training(folder: Path, rng: np.random.Generator) -> str:
    rough, calm = folder / "rough", folder / "calm"

    def job() -> None:
        runs.train(folder, rough, resume=(rough / "config.yaml").exists())

    killed, moment = _killed(job, children.extent_of(folder / "extent.json"), rng)
    children.run([killed], [moment])
    if (rough / "checkpoints.json").exists():
        load_checkpoint(rough, "last")
    if rng.random() < 0.2:
        children.run([job], [None])
        runs.require_same_weights(rough, calm)
        left = [path.name for path in rough.rglob("*") if ".tmp" in path.name]
        require(not left, f"left behind: {left}")
        shutil.rmtree(rough)
        return "killed, resumed to its end, the same weights"
    return "killed, to go on"


EXTRACTION = Part("extraction killed, one process or some of three", 200, 15, _prepare_extraction, _run_extraction)
TRAINING = Part("training killed", 50, 6, _prepare_training, _run_training)
