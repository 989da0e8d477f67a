"""Extraction end to end: JPEG files to a store, beside the loop that everybody writes first."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from bench.inputs import make_photos
from bench.measure import Row, fresh, rate, rounds
from gridcap.common.process import tune_process

GFLOP_AN_IMAGE = 11.42  # InceptionV3 up to Mixed_7c at 299 x 299, multiplications and additions
SHAPES = ((147, 32, 64), (35, 64, 96), (17, 192, 192), (8, 448, 384))  # side, channels in and out: 3 x 3 in it


SETTINGS = ((64, False), (256, False), (256, True), (512, True))  # of a GPU: batch, compiled


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Images a second, on the GPU if there is one."""
    on_gpu = fresh("bench.device:has_gpu")
    photos = make_photos(work / "photos", (8192 if quick else 16384) if on_gpu else 64 if quick else 256)
    sizes = [path.stat().st_size / 1000 for path in photos.iterdir()]
    note = f"{len(sizes)} files of 640 x 480, {sum(sizes) / len(sizes):.0f} kB each; without the start"
    count = 1 if quick else 3
    sides: dict[str, Callable[[], float]] = {
        "baseline": partial(fresh, "bench.extraction:naive", photos, 16 if quick else 48),
        "ours": partial(fresh, "bench.extraction:ours", photos, work / "store"),
        "limit": partial(fresh, "bench.extraction:limit"),
    }
    baseline_is = "torchvision as it is, float32, Pillow, one image at a time, a .npy file each"
    convolutions = f"3 x 3 convolutions alone, / {GFLOP_AN_IMAGE} GFLOP an image"
    if not on_gpu:
        values = rounds(count, sides)
        yield Row(
            "extraction",
            "JPEG files to a store",
            "images/s",
            values["ours"],
            values["baseline"],
            values["limit"],
            baseline_is,
            convolutions,
            {"of baseline": 4.5, "of limit": 0.75},
            note,
        )
        return
    alone = {
        setting: fresh("bench.extraction:forward", *setting) for setting in (SETTINGS[1::2] if quick else SETTINGS)
    }
    best = max(alone, key=alone.__getitem__)
    settings = ", ".join(f"{b}{' compiled' * c}: {value:.0f}" for (b, c), value in alone.items())
    values = rounds(count, {**sides, "forward": partial(fresh, "bench.extraction:forward", *best)})
    yield Row(
        "extraction",
        "the forward pass alone",
        "images/s",
        values["forward"],
        limit=values["limit"],
        limit_is=convolutions,
        wanted={"value": 12000},
        note=f"batch {settings}",
    )
    stages = {name: fresh(f"bench.extraction:{name}", photos) for name in ("decoding", "copying", "writing")}
    said = "; ".join(f"{name} alone {value:.0f} images/s" for name, value in stages.items())
    yield Row(
        "extraction",
        "JPEG files to a store",
        "images/s",
        values["ours"],
        values["baseline"],
        values["forward"],
        baseline_is,
        "the forward pass alone",
        {"of limit": 0.6},
        f"{note}; {said}",
    )


def ours(photos: str, store: str) -> float:
    """From the first image to the last, as extract-features works, without its start."""
    tune_process()
    from bench.device import has_gpu
    from gridcap.common.captions.folder import FolderImages
    from gridcap.common.config import load_config
    from gridcap.extract.job import ExtractionRequest, prepare
    from gridcap.extract.run import extract_features

    best = {"extract.jpeg_decoder": "nvjpeg", "extract.compile": "on"} if has_gpu() else {}
    config = load_config(None, {"extract.weights": "random", **best})
    folder = Path(store)
    images = Path(photos)
    request = ExtractionRequest(config, "bench", FolderImages(images), images, folder / "bench.h5")
    summary = extract_features(prepare(request), show_progress=False)
    shutil.rmtree(folder)
    return summary.encoded / summary.running


def naive(photos: str, count: int) -> float:
    """What a first script does."""
    import numpy as np
    import torch
    from PIL import Image
    from torchvision import models, transforms

    from gridcap.common.device import choose_device

    device = choose_device("auto")
    model = models.inception_v3(weights=None, init_weights=False).eval().to(device)
    grids: list[torch.Tensor] = []
    model.Mixed_7c.register_forward_hook(lambda *parts: grids.append(parts[2]))
    prepared = transforms.Compose(
        [transforms.Resize((299, 299)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )
    out = Path(photos).parent / "naive"
    out.mkdir(exist_ok=True)
    begin = 0.0
    for i, path in enumerate(sorted(Path(photos).iterdir())[: count + 2]):
        if i == 2:  # the first two are warm-up
            begin = time.perf_counter()
        with torch.no_grad():
            model(prepared(Image.open(path).convert("RGB"))[None].to(device))
        np.save(out / path.stem, grids.pop()[0].permute(1, 2, 0).cpu().numpy())
    return count / (time.perf_counter() - begin)


def limit() -> float:
    """Images a second if all of an image's arithmetic went as quickly as the best of its 3 x 3 convolutions."""
    tune_process()
    import torch

    from bench.device import device_rate
    from gridcap.common.device import choose_device, choose_precision

    device = choose_device("auto")
    kind, best = choose_precision("auto", device), 0.0
    for side, channels, filters in SHAPES:
        images = torch.randn(32, channels, side, side, device=device, dtype=kind)
        layer = torch.nn.Conv2d(channels, filters, 3, padding=1, device=device, dtype=kind)
        images = images.to(memory_format=torch.channels_last)
        layer = layer.to(memory_format=torch.channels_last)
        operations = 2 * 32 * side * side * channels * filters * 9
        with torch.inference_mode():
            best = max(best, device_rate(operations, partial(layer, images), device, 1.0))
    return best / (GFLOP_AN_IMAGE * 1e9)


def forward(batch: int, compiled: bool) -> float:
    """Images a second that the encoder makes of images that lie on the GPU already."""
    import torch

    from bench.device import device_rate
    from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder

    encoder = GridEncoder("inception_v3", "random", EncoderOptions(compiled=compiled, batch_size=batch))
    images = torch.randint(256, (batch, encoder.side, encoder.side, 3), dtype=torch.uint8, device=encoder.device)
    with torch.inference_mode():
        return device_rate(batch, partial(encoder._forward, images), encoder.device, 1.0)


def decoding(photos: str) -> float:
    """Images a second that nvJPEG decodes."""
    import torch

    from gridcap.extract.images.nvjpeg import load_images_gpu

    paths, device = sorted(Path(photos).iterdir())[:256], torch.device("cuda")
    load_images_gpu(paths, 299, "stretch", device)
    return rate(len(paths), partial(load_images_gpu, paths, 299, "stretch", device))


def copying(photos: str) -> float:
    """Images a second that could be copied to the GPU, and their grids back."""
    import torch

    images = torch.empty(256, 299, 299, 3, dtype=torch.uint8, pin_memory=True)
    grids = torch.empty(256, 8, 8, 2048, dtype=torch.float16, pin_memory=True)
    far = grids.cuda()

    def both() -> None:
        images.cuda(non_blocking=True)
        grids.copy_(far, non_blocking=True)
        torch.cuda.synchronize()

    both()
    return rate(256, both)


def writing(photos: str) -> float:
    """Images a second that go into shards, checked and brought to the disk, by as many threads as the worker has."""
    from bench.inputs import make_grids
    from gridcap.common.store.shard_format import GridLayout, ShardSpec
    from gridcap.common.store.shard_writer import ShardWriter
    from gridcap.extract.writer import writer_count

    grids, folder, rows = make_grids(64), Path(photos).parent / "written", 512
    threads = writer_count(True, 1000)

    def write(number: int) -> None:
        images = [(i, f"{i}.jpg") for i in range(rows)]
        spec = ShardSpec(images, GridLayout(grids.shape[1:], grids.dtype), {}, index=number, plan="bench")
        with ShardWriter(folder / f"{number}.h5", spec) as writer:
            for start in range(0, rows, 64):
                writer.write(start, grids, {})
            writer.finish()

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(2 * threads)))
    took = time.perf_counter() - begin
    shutil.rmtree(folder)
    return 2 * threads * rows / took
