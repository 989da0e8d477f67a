"""The shapes dataset: rendered scenes as JPEG files, with captions in COCO format.

The splits contain disjoint combinations of attributes. A decoder can describe validation and test scenes correctly only
by using the image, because their combinations never occur in training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gridcap.common.scenes import Scene, all_scenes, describe, render

COMBINATIONS = {"train": 180, "val": 20, "test": 40}  # 240 in total
FIRST_ID = {"train": 100_000, "val": 200_000, "test": 300_000}
JPEG_QUALITY = 92


@dataclass(frozen=True)
class ShapesSplit:
    """A written split: its image folder, its captions file, and the scene of each image id."""

    images: Path
    annotations: Path
    scenes: dict[int, Scene]


def split_scenes(seed: int) -> dict[str, list[Scene]]:
    """Assign each combination of attributes to exactly one split."""
    scenes = all_scenes()
    order = np.random.default_rng([seed, 240]).permutation(len(scenes))
    splits, start = {}, 0
    for name, count in COMBINATIONS.items():
        splits[name] = [scenes[i] for i in order[start : start + count]]
        start += count
    return splits


def write_shapes(folder: Path, images: dict[str, int], seed: int = 0) -> dict[str, ShapesSplit]:
    """Write the dataset: `<folder>/<split>/*.jpg` and `<folder>/captions_<split>.json`.

    Args:
        folder: output folder, created if it does not exist.
        images: number of images per split.
        seed: random seed; the dataset is a pure function of it.

    Returns:
        The splits by name.
    """
    written = {}
    for name, combinations in split_scenes(seed).items():
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        scenes: dict[int, Scene] = {}
        image_list: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for i in range(images[name]):
            rng = np.random.default_rng([seed, FIRST_ID[name], i])
            scene = combinations[i % len(combinations)]
            image_id, file_name = FIRST_ID[name] + i, f"scene_{FIRST_ID[name] + i}.jpg"
            picture = render(scene, rng)
            picture.save(target / file_name, quality=JPEG_QUALITY)
            scenes[image_id] = scene
            image_list.append(
                {"id": image_id, "file_name": file_name, "width": picture.width, "height": picture.height}
            )
            for caption in describe(scene, rng):
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "caption": caption})
        path = folder / f"captions_{name}.json"
        info = {"description": "gridcap shapes: rendered scenes", "version": "1"}
        path.write_text(json.dumps({"info": info, "images": image_list, "annotations": annotations}), encoding="utf-8")
        written[name] = ShapesSplit(target, path, scenes)
    return written
