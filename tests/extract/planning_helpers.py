"""Helpers for tests of plans: a provenance, image lists, and plans."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

from gridcap.extract.manifest import Image, ImageList
from gridcap.extract.plan import Plan

PROVENANCE: dict[str, Any] = {
    "encoder": "inception_v3",
    "layer": "Mixed_7c",
    "weights": {"name": "w.pth", "sha256": "a" * 64, "random": False},
    "preprocessing": {"decoder": "pillow", "resize_mode": "stretch", "side": 299},
    "grid_shape": [8, 8, 2048],
    "dtype": "float16",
    "precision": "float32",
    "versions": {"torch": "2.6.0"},
}


def make_images(count: int, first: int = 0) -> list[Image]:
    return [(i * 7, f"folder/café {i}.jpg") for i in range(first, first + count)]


def make_plan(
    split: str,
    images: list[Image],
    shard_size: int,
    batch_size: int,
    provenance: dict[str, Any],
    folder: Path | None = None,
) -> Plan:
    return Plan(split, shard_size, batch_size, provenance, (ImageList.from_images(images, shard_size, folder),))


def plan(count: int = 10, shard_size: int = 4, batch_size: int = 2, folder: Path | None = None, **change: Any) -> Plan:
    return make_plan("train", make_images(count), shard_size, batch_size, copy.deepcopy(PROVENANCE) | change, folder)


def all_images(made: Plan, folder: Path) -> list[Image]:
    return list(itertools.chain.from_iterable(made.images_of(shard, folder) for shard in range(made.shards)))
