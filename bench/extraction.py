"""Extraction throughput, from JPEG files to a feature store."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.extraction_gpu import measure_gpu
from bench.inputs import PHONE_SIZE, make_photos
from bench.measure import Row, call_in_process, rate, run_rounds
from bench.stages import measure_stages
from gridcap.common.process import tune_process

GFLOP_PER_IMAGE = 11.42  # InceptionV3 up to Mixed_7c at 299 x 299; multiplications and additions
# 3 x 3 convolutions of InceptionV3: side of the input in pixels, input channels, output channels
CONVOLUTIONS = ((147, 32, 64), (35, 64, 96), (17, 192, 192), (8, 448, 384))
BASELINE = "torchvision without changes, float32, Pillow, one image at a time, one .npy file per image"
UPPER_BOUND = f"all arithmetic at the rate of the fastest 3 x 3 convolution, {GFLOP_PER_IMAGE} GFLOP per image"
END_TO_END = "JPEG files to feature store"


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Measure images per second, on the GPU if there is one."""
    on_gpu = call_in_process("bench.device:has_gpu")
    photos = make_photos(work / "photos", (8192 if quick else 16384) if on_gpu else 64 if quick else 256)
    sizes = [path.stat().st_size / 1000 for path in photos.iterdir()]
    note = f"{len(sizes)} files of 640 x 480, {sum(sizes) / len(sizes):.0f} kB each; without startup"
    variants: dict[str, Callable[[], float]] = {
        "baseline": partial(call_in_process, "bench.extraction:baseline", photos, 16 if quick else 48),
        "gridcap": partial(call_in_process, "bench.extraction:gridcap", photos, work / "store"),
        "upper bound": partial(call_in_process, "bench.extraction:upper_bound"),
    }
    if on_gpu:
        yield from measure_gpu(photos, work, note)
        return
    yield from measure_stages(photos, work, quick)
    yield _measure_phone_photos(work, quick)
    values = run_rounds(1 if quick else 3, variants)
    yield Row(
        "extraction",
        END_TO_END,
        "images/s",
        values["gridcap"],
        values["baseline"],
        values["upper bound"],
        BASELINE,
        UPPER_BOUND,
        {"speedup": 4.5, "fraction of upper bound": 0.75},
        note,
    )


def _measure_phone_photos(work: Path, quick: bool) -> Row:
    """Measure the decoding of photos of 12 megapixels with one thread."""
    photos = make_photos(work / "phone", 4, PHONE_SIZE, noise_level=5)
    size = next(photos.iterdir()).stat().st_size / 1e6
    variants = {
        name: partial(call_in_process, "bench.extraction:pillow_decoding", photos, name == "scaled")
        for name in ("full", "scaled")
    }
    values = run_rounds(1 if quick else 3, variants)
    return Row(
        "extraction",
        "decoding and resizing 12 megapixels",
        "images/s",
        values["scaled"],
        values["full"],
        baseline_name="extract.jpeg_scaled_decoding: false",
        note=f"{PHONE_SIZE[0]} x {PHONE_SIZE[1]}, {size:.1f} MB each, one thread, Pillow",
    )


def gridcap(photos: str, store: str) -> float:
    """Return images per second of extract-features, without startup."""
    tune_process()
    from gridcap.common.captions.images import SourceImages
    from gridcap.common.config import load_config
    from gridcap.extract.job import ExtractionRequest, prepare
    from gridcap.extract.run import extract_features

    config = load_config(None, {"extract.weights": "random"})
    folder = Path(store)
    images = Path(photos)
    request = ExtractionRequest(config, "bench", SourceImages(images), images, folder / "bench.h5")
    summary = extract_features(prepare(request), show_progress=False)
    shutil.rmtree(folder)
    return summary.encoded / summary.running


def baseline(photos: str, count: int) -> float:
    """Return images per second of a simple loop with torchvision."""
    import numpy as np
    import torch
    from PIL import Image
    from torchvision import models, transforms

    from gridcap.common.device import choose_device

    device = choose_device("auto")
    model = models.inception_v3(weights=None, init_weights=False).eval().to(device)
    grids: list[torch.Tensor] = []
    model.Mixed_7c.register_forward_hook(lambda *parts: grids.append(parts[2]))
    preprocess = transforms.Compose(
        [transforms.Resize((299, 299)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )
    out = Path(photos).parent / "baseline"
    out.mkdir(exist_ok=True)
    start = 0.0
    for i, path in enumerate(sorted(Path(photos).iterdir())[: count + 2]):
        if i == 2:  # the first two are warmup
            start = time.perf_counter()
        with torch.no_grad():
            model(preprocess(Image.open(path).convert("RGB"))[None].to(device))
        np.save(out / path.stem, grids.pop()[0].permute(1, 2, 0).cpu().numpy())
    return count / (time.perf_counter() - start)


def upper_bound() -> float:
    """Return images per second if all arithmetic ran at the rate of the fastest 3 x 3 convolution."""
    tune_process()
    import torch

    from bench.device import device_rate
    from gridcap.common.device import choose_device, choose_precision

    device = choose_device("auto")
    dtype, best = choose_precision("auto", device), 0.0
    for side, channels, filters in CONVOLUTIONS:
        images = torch.randn(32, channels, side, side, device=device, dtype=dtype)
        layer = torch.nn.Conv2d(channels, filters, 3, padding=1, device=device, dtype=dtype)
        images = images.to(memory_format=torch.channels_last)
        layer = layer.to(memory_format=torch.channels_last)
        operations = 2 * 32 * side * side * channels * filters * 9
        with torch.inference_mode():
            best = max(best, device_rate(operations, partial(layer, images), device, 1.0))
    return best / (GFLOP_PER_IMAGE * 1e9)


def pillow_decoding(photos: str, scaled: bool) -> float:
    """Return images per second of Pillow in one thread, including the resize."""
    tune_process()
    from gridcap.common.image import load_image

    paths = sorted(Path(photos).iterdir())
    load_image(paths[0], 299, "stretch", scaled)
    return rate(len(paths), lambda: [load_image(path, 299, "stretch", scaled) for path in paths])
