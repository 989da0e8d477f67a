"""Extraction on a GPU: the forward pass per batch size, each decoder, transfers, writes, and JPEG files to shards.

Each row is written as soon as it is measured, the most important ones first, so that an interrupted run keeps them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench.inputs import PHONE_SIZE, make_photos
from bench.measure import Row, call_in_process, rate
from gridcap.common.process import tune_process
from gridcap.common.resources import available_cores

BATCH_SIZES = (64, 128, 256, 512)
COMPILED = 256
PHONE_PHOTOS, UNIQUE_PHONE_PHOTOS = 512, 4
# decoder -> least images/s from JPEG files of 640 x 480 to uint8 shards, on an H100 or H200 with 16 cores
TARGETS = {"turbo": 5000.0, "nvjpeg": 8000.0}


def measure_gpu(photos: Path, work: Path, note: str) -> Iterator[Row]:
    """Measure extraction on the first GPU, one round."""
    forward = call_in_process("bench.extraction_gpu:forward", BATCH_SIZES, False)
    for size, value in zip(BATCH_SIZES, forward, strict=True):
        yield _row(f"forward pass, batch size {size}", value)
    bounds = {"forward pass": max(forward), **_measure_alone(photos, work)}
    for name, value in list(bounds.items())[1:]:
        yield _row(f"{name} alone", value)
    phone = _make_phone_photos(work)
    for decoder, target in TARGETS.items():
        folder = work / decoder
        value, summary = call_in_process("bench.extraction_gpu:end_to_end", photos, folder, decoder)
        limit = min(bound for name, bound in bounds.items() if not name.startswith("decoding") or decoder in name)
        yield Row(
            "extraction",
            f"JPEG files to uint8 shards, {decoder}",
            "images/s",
            [value],
            upper_bound=[limit],
            upper_bound_name="slowest of forward pass, decoding, and writing alone",
            targets={"minimum": target, "fraction of upper bound": 0.8},
            note=f"{note}; {summary}",
        )
        value, summary = call_in_process("bench.extraction_gpu:end_to_end", phone, folder, decoder)
        yield _row(f"12-megapixel JPEG files to uint8 shards, {decoder}", value, summary)
    value = call_in_process("bench.extraction_gpu:forward", [COMPILED], True)[0]
    yield _row(f"forward pass, batch size {COMPILED}, compiled", value)


def _measure_alone(photos: Path, work: Path) -> dict[str, float]:
    """Measure the stages next to the forward pass."""
    stages = {"decoding, nvjpeg": "nvjpeg", "decoding, turbo": "turbo", "copying": "copying"}
    rates = {name: call_in_process(f"bench.extraction_gpu:{stage}", photos) for name, stage in stages.items()}
    return {**rates, "writing": call_in_process("bench.extraction_gpu:writing", work / "written")}


def _row(name: str, value: float, note: str = "") -> Row:
    return Row("extraction", name, "images/s", [value], note=note)


def _make_phone_photos(work: Path) -> Path:
    folder = make_photos(work / "phone", UNIQUE_PHONE_PHOTOS, PHONE_SIZE, noise_level=5)
    for i in range(UNIQUE_PHONE_PHOTOS, PHONE_PHOTOS):
        (folder / f"{i:06}.jpg").hardlink_to(folder / f"{i % UNIQUE_PHONE_PHOTOS:06}.jpg")
    return folder


def forward(batch_sizes: Sequence[int], compiled: bool) -> list[float]:
    """Return images per second of the encoder for images that are already on the GPU, per batch size."""
    import torch

    from bench.device import device_rate
    from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder

    encoder = GridEncoder("inception_v3", "random", EncoderOptions(compiled=compiled, batch_size=batch_sizes[0]))
    rates = []
    for size in batch_sizes:
        images = torch.randint(256, (size, encoder.side, encoder.side, 3), dtype=torch.uint8, device=encoder.device)
        with torch.inference_mode():
            rates.append(device_rate(size, partial(encoder._forward, images), encoder.device, 1.0))
    return rates


def nvjpeg(photos: str) -> float:
    """Return images per second of nvJPEG, with the resize."""
    import torch

    from gridcap.extract.images.nvjpeg import load_images_gpu

    paths, device = sorted(Path(photos).iterdir())[:256], torch.device("cuda")
    load_images_gpu(paths, 299, "stretch", device)
    return rate(len(paths), partial(load_images_gpu, paths, 299, "stretch", device))


def turbo(photos: str) -> float:
    """Return images per second of libjpeg-turbo on all cores, with the resize."""
    tune_process()
    import torch

    from gridcap.common.image import make_square
    from gridcap.extract.images.turbo import decode_turbo

    torch.set_num_threads(1)
    paths = sorted(Path(photos).iterdir())[:1024]

    def load(path: Path) -> None:
        pixels = decode_turbo(path, 2 * 299)
        assert pixels is not None
        make_square(pixels, 299, "stretch")

    with ThreadPoolExecutor(available_cores()) as pool:
        return rate(len(paths), lambda: list(pool.map(load, paths, chunksize=8)))


def copying(photos: str) -> float:
    """Return images per second when copying images to the GPU and grids back."""
    import torch

    images = torch.empty(256, 299, 299, 3, dtype=torch.uint8, pin_memory=True)
    grids = torch.empty(256, 8, 8, 2048, dtype=torch.float16, pin_memory=True)
    gpu_grids = grids.cuda()

    def copy() -> None:
        images.cuda(non_blocking=True)
        grids.copy_(gpu_grids, non_blocking=True)
        torch.cuda.synchronize()

    copy()
    return rate(256, copy)


def writing(folder: str) -> float:
    """Return images per second of the default number of shard writers, with quantization, checksums, and fsync."""
    tune_process()
    from bench.inputs import make_grids
    from gridcap.common.store.codecs import find_codec
    from gridcap.common.store.shard_format import GridLayout, ShardSpec
    from gridcap.common.store.shard_writer import ShardWriter
    from gridcap.extract.writer import writer_count

    grids, rows, threads = make_grids(64), 512, writer_count(True, 1000)

    def write(number: int) -> None:
        images = [(i, f"{i}.jpg") for i in range(rows)]
        spec = ShardSpec(images, GridLayout(grids.shape[1:], find_codec("uint8")), {}, index=number, plan="bench")
        with ShardWriter(Path(folder) / f"{number}.h5", spec) as writer:
            for row in range(0, rows, 64):
                writer.write(row, grids, {})
            writer.finish()

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(2 * threads)))
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return 2 * threads * rows / seconds


def end_to_end(photos: str, store: str, decoder: str) -> tuple[float, str]:
    """Return images per second of extract-features to uint8, without startup, and its summary."""
    tune_process()
    from gridcap.common.captions.images import SourceImages
    from gridcap.common.config import load_config
    from gridcap.extract.job import ExtractionRequest, prepare
    from gridcap.extract.messages import describe_throughput
    from gridcap.extract.run import extract_features

    settings: dict[str, Any] = {"weights": "random", "dtype": "uint8", "jpeg_decoder": decoder}
    config = load_config(None, {f"extract.{key}": value for key, value in settings.items()})
    images, folder = Path(photos), Path(store)
    job = prepare(ExtractionRequest(config, "bench", SourceImages(images), images, folder / "bench.h5"))
    summary = extract_features(job, show_progress=False)
    shutil.rmtree(folder)
    return summary.encoded / summary.running, describe_throughput(summary, job)
