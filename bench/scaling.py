"""Time and memory of extraction and of a training epoch as functions of the number of images.

The CNN is replaced by a fake encoder that returns grids of the real shape faster than images can be read and written,
so that all queues are full: the memory of the CNN depends only on the batch size, and running it would take hours.

The smaller stores are trained for more epochs, so that all runs take the same number of steps: the buffers of torch and
glibc grow during the first few hundred steps, until each has been used for its largest batch.
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
from bench.measure import Row, call_in_process
from gridcap.common.process import tune_process

MAX_FACTOR = 16


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Measure seconds and MiB for 1x, 4x, and 16x as many images."""
    images = 64 if quick else 256
    for task in ("extraction", "training epoch"):
        results = []
        for factor in (1, 4, MAX_FACTOR):
            folder = work / f"{task.replace(' ', '-')}-{factor}"
            folder.mkdir()
            if task == "extraction":
                results.append(call_in_process("bench.scaling:extraction", folder, images * factor))
            else:
                results.append(call_in_process("bench.scaling:epoch", folder, images * factor, MAX_FACTOR // factor))
            shutil.rmtree(folder)
        seconds, memory = zip(*results, strict=True)
        yield Row(
            "scaling",
            f"{task}: time for 16x the images / (16 x time for 1x)",
            "fraction",
            [seconds[2] / (16 * seconds[0])],
            targets={"maximum": 1.1},
            note=f"{images}, {4 * images}, {16 * images} images: " + ", ".join(f"{s:.1f} s" for s in seconds),
        )
        yield Row(
            "scaling",
            f"{task}: memory for 16x the images / memory for 1x",
            "fraction",
            [memory[2] / memory[0]],
            targets={"maximum": 1.1},
            note=", ".join(f"{m:.0f} MiB" for m in memory),
        )


class FakeEncoder:
    """Encoder that returns constant grids of the real shape."""

    side = 299
    grid_shape = (8, 8, 2048)
    gpu_seconds = None

    def __init__(self, *_: Any) -> None:
        pass

    def submit(self, images: np.ndarray, batch_size: int | None = None) -> Any:
        """Return the same grid for every image of a batch."""
        from gridcap.extract.staging import PendingGrids

        return PendingGrids(lambda: np.full((len(images), *self.grid_shape), images.mean() / 255, np.float16))


def extraction(folder: str, images: int) -> tuple[float, float]:
    """Return seconds and peak memory in MiB of extraction with the fake encoder."""
    tune_process()
    from gridcap.common.captions.images import SourceImages
    from gridcap.common.config import load_config
    from gridcap.extract.job import ExtractionRequest, prepare
    from gridcap.extract.run import extract_features

    photos = make_photos(Path(folder) / "photos", images)
    setattr(gridcap.extract.encoding, "GridEncoder", FakeEncoder)  # noqa: B010 (mypy rejects the assignment)
    config = load_config(None, {"extract.weights": "random", "extract.device": "cpu"})
    request = ExtractionRequest(config, "scaling", SourceImages(photos), photos, Path(folder) / "scaling.h5")
    start = time.perf_counter()
    extract_features(prepare(request), show_progress=False)
    return time.perf_counter() - start, _peak_memory()


def epoch(folder: str, images: int, epochs: int) -> tuple[float, float]:
    """Return the mean seconds per epoch of a small decoder, and the peak memory in MiB."""
    store = make_store(Path(folder) / "train.h5", images)
    captions = make_captions(Path(folder) / "captions.json", images)
    seconds, memory = call_in_process("bench.scaling:train_epochs", store, captions, Path(folder) / "run", epochs)
    return seconds, memory


def train_epochs(store_file: str, captions: str, run: str, epochs: int) -> tuple[float, float]:
    """Like `epoch`, for an existing store."""
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
    return sum(float(row["seconds"]) for row in rows) / epochs, _peak_memory()


def _peak_memory() -> float:
    """Return the peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
