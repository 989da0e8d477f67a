"""Synthetic photos, feature stores, and captions of realistic sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from gridcap.common.store.codecs import find_codec
from gridcap.common.store.shard_format import GridLayout, ShardSpec
from gridcap.common.store.shard_writer import ShardWriter

SIZE = (640, 480)
PHONE_SIZE = (4032, 3024)
UNIQUE_PHOTOS = 50  # the other photos are hard links to these
GRID = (8, 8, 2048)
WORDS = [f"word{i}" for i in range(5000)]
_PROVENANCE = {
    "encoder": "inception_v3",
    "layer": "Mixed_7c",
    "weights": {"name": "none", "sha256": "", "random": True},
    "preprocessing": {},
    "precision": "float32",
    "versions": {},
    "views": ["original"],
}


def make_photos(folder: Path, count: int, size: tuple[int, int] = SIZE, noise_level: float = 9) -> Path:
    """Write `count` JPEG files, with smooth shapes and noise; the defaults give about 150 kB each, as in COCO.

    Args:
        folder: folder to create.
        count: number of files.
        size: width and height in pixels.
        noise_level: standard deviation of the noise in gray levels, which determines the file size.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:06}.jpg"
        if i < UNIQUE_PHOTOS:
            smooth = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
            noise = rng.normal(0, noise_level, (*size[::-1], 1))
            pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path, quality=92)
        else:
            path.hardlink_to(folder / f"{i % UNIQUE_PHOTOS:06}.jpg")
    return folder


def make_grids(rows: int, seed: int = 0, zeros: float = 0.5) -> np.ndarray:
    """Return float16 (rows, 8, 8, 2048) with a share of zeros, as after a ReLU (0.92 in a trained InceptionV3)."""
    rng = np.random.default_rng(seed)
    values = np.abs(rng.standard_normal((rows, *GRID), np.float32))
    values[rng.random(values.shape, np.float32) < zeros] = 0
    return values.astype(np.float16)


def make_store(path: Path, rows: int, dtype: str = "float16", split: str = "train", zeros: float = 0.5) -> Path:
    """Write a store that consists of a single shard; `zeros` is the share of zeros in its grids."""
    names = [f"{i:06}.jpg" for i in range(rows)]
    provenance = {**_PROVENANCE, "grid_shape": list(GRID), "dtype": dtype}
    layout = GridLayout(GRID, find_codec(dtype))
    spec = ShardSpec(list(enumerate(names)), layout, provenance, plan="bench", split=split)
    with ShardWriter(path, spec) as writer:
        for start in range(0, rows, 64):
            writer.write(start, make_grids(min(64, rows - start), start, zeros), {})
        writer.finish()
    return path


def make_captions(path: Path, images: int, words: int = 11, per_image: int = 5) -> Path:
    """Write a COCO captions file for such a store, with a vocabulary of 5,000 words."""
    rng = np.random.default_rng(1)
    sampled = (len(WORDS) * rng.random((images * per_image, words)) ** 3).astype(int)
    tree = {
        "images": [{"id": i, "file_name": f"{i:06}.jpg"} for i in range(images)],
        "annotations": [
            {"id": i, "image_id": i // per_image, "caption": " ".join(WORDS[word] for word in row)}
            for i, row in enumerate(sampled.tolist())
        ],
    }
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path
