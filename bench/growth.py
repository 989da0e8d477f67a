"""Time and memory against the number of images: of extraction, its CNN left out, and of an epoch of training.

The CNN's own memory depends on the batch alone, and it would take hours. What stands in for it returns grids of
the real shape and size, faster than the rest can read and write, so that the queues are as full as they get.

Fewer rows are trained on in more epochs, so that all take as many steps: torch's and glibc's own buffers grow for some
hundred steps, whatever is trained on, until each has met its largest batch.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import gridcap.extract.encoding
from bench.inputs import make_captions, make_photos, make_store
from bench.measure import Row, fresh
from gridcap.common.process import tune_process

_MOST = 16


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Seconds and MiB at 1 x, 4 x and 16 x as many rows: the note says how straight and how flat."""
    for what, one in (("extraction", 64 if quick else 256), ("an epoch", 64 if quick else 256)):
        found = []
        for times in (1, 4, _MOST):
            folder = work / f"{what}-{times}"
            folder.mkdir()
            if what == "extraction":
                found.append(fresh("bench.growth:extraction", folder, one * times))
            else:
                found.append(fresh("bench.growth:epoch", folder, one * times, _MOST // times))
            shutil.rmtree(folder)
        seconds, memory = [f[0] for f in found], [f[1] for f in found]
        yield Row(
            "growth",
            f"{what}: seconds of 16 x the rows, over 16 x those of 1 x",
            "share",
            [seconds[2] / (16 * seconds[0])],
            wanted={"at most": 1.1},
            note=f"{one}, {4 * one}, {16 * one} rows: " + ", ".join(f"{s:.1f} s" for s in seconds),
        )
        yield Row(
            "growth",
            f"{what}: memory of 16 x the rows, over that of 1 x",
            "share",
            [memory[2] / memory[0]],
            wanted={"at most": 1.1},
            note=", ".join(f"{m:.0f} MiB" for m in memory),
        )


class StandIn:
    """Grids of the real shape, of nothing."""

    side = 299
    grid_shape = (8, 8, 2048)

    def __init__(self, *_: Any) -> None:
        pass

    def submit(self, images: np.ndarray) -> Any:
        """The same grid for every image of a batch."""
        from gridcap.extract.staging import PendingGrids

        return PendingGrids(lambda: np.full((len(images), *self.grid_shape), images.mean() / 255, np.float16))


def extraction(folder: str, images: int) -> tuple[float, float]:
    """Seconds and MiB of reading and writing so many images."""
    tune_process()
    from gridcap.common.captions.folder import FolderImages
    from gridcap.common.config import load_config
    from gridcap.extract.job import ExtractionRequest, prepare
    from gridcap.extract.run import extract_features

    photos = make_photos(Path(folder) / "photos", images)
    setattr(gridcap.extract.encoding, "GridEncoder", StandIn)  # noqa: B010 (mypy would not have it otherwise)
    config = load_config(None, {"extract.weights": "random", "extract.device": "cpu"})
    request = ExtractionRequest(config, "growth", FolderImages(photos), photos, Path(folder) / "growth.h5")
    begin = time.perf_counter()
    extract_features(prepare(request), show_progress=False)
    return time.perf_counter() - begin, _memory()


def epoch(folder: str, images: int, epochs: int) -> tuple[float, float]:
    """Mean seconds of an epoch over so many images, of a small decoder, and MiB after so many epochs."""
    store = make_store(Path(folder) / "train.h5", images)
    captions = make_captions(Path(folder) / "captions.json", images)
    seconds, memory = fresh("bench.growth:epochs_of", store, captions, Path(folder) / "run", epochs)
    return seconds, memory


def epochs_of(store_file: str, captions: str, run: str, epochs: int) -> tuple[float, float]:
    """The same, of a store that is there."""
    tune_process()
    from gridcap.common.config import load_config
    from gridcap.common.store.reader import FeatureStore
    from gridcap.train.data.inputs import join_captions
    from gridcap.train.engine.loop import fit

    decoder = {"family": "lstm", "embed_size": 64, "hidden_size": 64}
    config = load_config(None, {"train.decoder": decoder, "train.output": run, "train.epochs": epochs})
    with FeatureStore(Path(store_file)) as store:
        data = join_captions(store, Path(captions), [config], "train", "--annotations").data
        rows = fit(config, data, None, resume=False, progress=False)
    return sum(float(row["seconds"]) for row in rows) / epochs, _memory()


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
