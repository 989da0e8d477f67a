"""Stages of the extraction, each alone: CPU time per image, decoders, writes, and the pipeline without an encoder."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import Row, call_in_process, run_rounds
from gridcap.common.process import tune_process
from gridcap.common.resources import available_cores

SIDE = 299
BATCH = 32
REPEATS = 5  # the minimum is reported: on a shared machine, others lengthen some of the repeats
SHARD_ROWS, SHARDS = 256, 4
PILLOW, TURBO, TORCHVISION = "pillow", "turbo", "torchvision"


def measure_stages(photos: Path, work: Path, quick: bool) -> Iterator[Row]:
    """Measure the stages on the CPU, with the photos of the extraction benchmark; each row in one process, in turns."""
    rounds = 1 if quick else 3
    rates = call_in_process("bench.stages:decoders", photos, rounds)
    torchvision = statistics.median(rates[TORCHVISION])
    yield Row(
        "extraction",
        "decoding and resizing 640 x 480",
        "images/s",
        rates[TURBO],
        rates[PILLOW],
        baseline_name="Pillow",
        note=f"per second of CPU time, equal pixels; simplejpeg; torchvision {torchvision:.0f}",
    )
    host = call_in_process("bench.stages:host_stages", photos, work / "stages")
    cores = available_cores()
    values = call_in_process("bench.stages:null_pipeline", photos, work / "null", cores, rounds)
    breakdown = ", ".join(f"{name} {milliseconds:.3f}" for name, milliseconds in host.items())
    share = statistics.median(a / b for a, b in zip(values["decoding CPU"], values["pipeline CPU"], strict=True))
    yield Row(
        "extraction",
        "pipeline with a null encoder",
        "images/s",
        values["pipeline"],
        upper_bound=[cores * rate for rate in values["decoding"]],
        upper_bound_name=f"decoding on one core x {cores}",
        targets={"fraction of upper bound": 0.85},
        note=f"decoding and resizing: {share:.2f} of the CPU time; ms of CPU time per image: {breakdown}",
    )
    values = call_in_process("bench.stages:writes", work / "writes", rounds)
    yield Row(
        "extraction",
        "writing shards, one writer",
        "images/s",
        values["shards"],
        upper_bound=values["plain"],
        upper_bound_name="plain sequential writes of the same size, flushed to disk",
        targets={"fraction of upper bound": 0.8},
        note="256 KiB per image; the shards are also checksummed and read back",
    )


def _cpu_per_item(items: int, work: Callable[[], object]) -> float:
    """Return the smallest CPU time of this thread per item, in seconds."""
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        work()
        times.append((time.thread_time() - start) / items)
    return min(times)


def _load(name: str) -> Callable[[Path], Any]:
    """Return a function that decodes a file and resizes it to (SIDE, SIDE, 3)."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    from gridcap.common.image import load_image, make_square
    from gridcap.extract.images.turbo import decode_turbo

    if name == TURBO:
        return lambda path: make_square(decode_turbo(path, 2 * SIDE), SIDE, "stretch")  # type: ignore[arg-type]
    if name == TORCHVISION:
        return lambda path: make_square(
            decode_jpeg(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8), ImageReadMode.RGB)
            .permute(1, 2, 0)
            .numpy(),
            SIDE,
            "stretch",
        )
    return lambda path: load_image(path, SIDE, "stretch")


def decoders(photos: str, rounds: int) -> dict[str, list[float]]:
    """Return images per second of CPU time of each decoder in one thread, with the resize.

    Raises:
        AssertionError: the pixels of two decoders differ.
    """
    tune_process()
    import numpy as np
    import torch

    torch.set_num_threads(1)
    paths = sorted(Path(photos).iterdir())[:25]
    loads = {name: _load(name) for name in (PILLOW, TURBO, TORCHVISION)}
    for load in loads.values():
        np.testing.assert_array_equal(load(paths[0]), loads[PILLOW](paths[0]))
    return run_rounds(
        rounds,
        {name: partial(_rate_of, len(paths), partial(_decode_all, load, paths)) for name, load in loads.items()},
    )


def _decode_all(load: Callable[[Path], Any], paths: Sequence[Path]) -> None:
    for path in paths:
        load(path)


def _rate_of(items: int, work: Callable[[], object]) -> float:
    return 1 / _cpu_per_item(items, work)


def host_stages(photos: str, folder: str) -> dict[str, float]:
    """Return the CPU time per image of each stage on the host, in milliseconds, in one thread."""
    tune_process()
    import numpy as np
    import torch

    from bench.inputs import make_grids
    from gridcap.common.files import fsync_path, sha256_of
    from gridcap.common.image import load_rgb, make_square
    from gridcap.common.store.checksum import crc32
    from gridcap.common.store.codecs import find_codec
    from gridcap.extract.images.jpeg import read_jpeg_bytes
    from gridcap.extract.images.turbo import decode_turbo

    torch.set_num_threads(1)
    paths, grids = sorted(Path(photos).iterdir())[:BATCH], make_grids(BATCH)
    file = Path(folder) / "grids"
    file.parent.mkdir()
    pixels, row = np.asarray(load_rgb(paths[0])), np.empty_like(grids[0])
    stages: dict[str, Callable[[], object]] = {
        "open and read": lambda: [read_jpeg_bytes(path) for path in paths],
        "read and decode": lambda: [decode_turbo(path, None) for path in paths],
        "resize": lambda: [make_square(pixels, SIDE, "stretch") for _ in paths],
        "check float16": lambda: find_codec("float16").encode(grids),
        "quantize to uint8": lambda: find_codec("uint8").encode(grids),
        "CRC-32": lambda: [crc32(grid.data) for grid in grids],
        "write": lambda: file.write_bytes(grids.data),
        "flush": lambda: fsync_path(file),
        "SHA-256 of the file": lambda: sha256_of(file),
    }
    seconds = {name: _cpu_per_item(BATCH, work) for name, work in stages.items()}
    with open(file, "rb", buffering=0) as stream:
        seconds["read back"] = _cpu_per_item(BATCH, lambda: [stream.seek(0), *(stream.readinto(row) for _ in grids)])
    shutil.rmtree(folder)
    return {name: 1000 * value for name, value in seconds.items()}


class NullEncoder:
    """Encoder that returns the same grids for every batch, at once."""

    side = SIDE
    grid_shape = (8, 8, 2048)
    gpu_seconds = None

    def __init__(self, *_: Any) -> None:
        from bench.inputs import make_grids

        self._grids = make_grids(BATCH)

    def submit(self, images: Any, batch_size: int | None = None) -> Any:
        """Return the grids of a batch of at most BATCH valid images."""
        from gridcap.extract.staging import PendingGrids

        return PendingGrids(lambda: self._grids[: len(images)])


def null_pipeline(photos: str, folder: str, workers: int, rounds: int) -> dict[str, list[float]]:
    """Compare an extraction with a null encoder with decoding in one thread.

    Returns:
        "decoding" and "pipeline": images per second; "decoding CPU" and "pipeline CPU": CPU seconds per image.
    """
    tune_process()
    import torch

    import gridcap.extract.encoding
    from gridcap.extract.run import extract_features

    torch.set_num_threads(1)
    setattr(gridcap.extract.encoding, "GridEncoder", NullEncoder)  # noqa: B010 (mypy rejects the assignment)
    paths, load = sorted(Path(photos).iterdir())[:100], _load(TURBO)
    values: dict[str, list[float]] = {"decoding": [], "pipeline": [], "decoding CPU": [], "pipeline CPU": []}
    # Warmup: in a virtual machine, memory that was never used before, also that of the page cache, takes long to get.
    extract_features(_prepare(Path(photos), Path(folder), workers), show_progress=False)
    for _ in range(rounds):
        shutil.rmtree(folder)
        job = _prepare(Path(photos), Path(folder), workers)  # which takes time to identify the weights
        for name, work, items in (
            ("decoding", partial(_decode_all, load, paths), len(paths)),
            ("pipeline", partial(extract_features, job, show_progress=False), job.plan.images),
        ):
            start, cpu = time.perf_counter(), time.process_time()
            work()
            values[f"{name} CPU"].append((time.process_time() - cpu) / items)
            values[name].append(items / (time.perf_counter() - start))
    shutil.rmtree(folder)
    return values


def _prepare(images: Path, folder: Path, workers: int) -> Any:
    from gridcap.common.captions.images import SourceImages
    from gridcap.common.config import load_config
    from gridcap.extract.job import ExtractionRequest, prepare

    settings = {"weights": "random", "device": "cpu", "num_workers": workers, "batch_size": BATCH, "shard_size": 512}
    config = load_config(None, {f"extract.{key}": value for key, value in settings.items()})
    return prepare(ExtractionRequest(config, "bench", SourceImages(images), images, folder / "bench.h5"))


def writes(folder: str, rounds: int) -> dict[str, list[float]]:
    """Return grids per second of plain sequential writes ("plain"), and of one shard writer ("shards")."""
    tune_process()
    return run_rounds(
        rounds, {"plain": partial(_plain_writes, Path(folder)), "shards": partial(_shard_writes, Path(folder))}
    )


def _plain_writes(folder: Path) -> float:
    from bench.inputs import make_grids

    grids = make_grids(BATCH)
    folder.mkdir()
    start = time.perf_counter()
    for shard in range(SHARDS):
        descriptor = os.open(folder / str(shard), os.O_WRONLY | os.O_CREAT)
        for _ in range(SHARD_ROWS // BATCH):
            os.write(descriptor, grids.data)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return SHARD_ROWS * SHARDS / seconds


def _shard_writes(folder: Path) -> float:
    from bench.inputs import GRID, make_grids
    from gridcap.extract.manifest import ImageList
    from gridcap.extract.plan import FILE, Plan
    from gridcap.extract.staging import PendingGrids
    from gridcap.extract.writer import ShardWriterThread, batches_of

    images = [(i, f"{i}.jpg") for i in range(SHARD_ROWS * SHARDS)]
    image_list = ImageList.from_images(images, SHARD_ROWS, folder)
    provenance = {"grid_shape": list(GRID), "dtype": "float16", "views": ["original"]}
    plan = Plan("bench", SHARD_ROWS, BATCH, provenance, (image_list,))
    (folder / FILE).write_text(plan.to_json())
    grids, writer = make_grids(BATCH), ShardWriterThread(folder, plan)
    start = time.perf_counter()
    for batch in batches_of(plan, range(SHARDS)):
        writer.write(batch, {"original": PendingGrids(lambda: grids)}, {})
    writer.drain()
    seconds = time.perf_counter() - start
    writer.close()
    shutil.rmtree(folder)
    return SHARD_ROWS * SHARDS / seconds
