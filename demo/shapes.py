"""The shapes data set: rendered scenes as JPEG files, with captions in COCO format.

Scenes are split by their combination of attributes: what validation and test show never occurs in training, so
a decoder can only be right about them by looking.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gridcap.common.scenes import Scene, all_scenes, describe, render

COMBINATIONS = {"train": 180, "val": 20, "test": 40}  # of the 240
FIRST_ID = {"train": 100_000, "val": 200_000, "test": 300_000}
JPEG_QUALITY = 92


@dataclass(frozen=True)
class ShapesSplit:
    """Where a split was written, and what its images show (image id -> scene)."""

    images: Path
    annotations: Path
    scenes: dict[int, Scene]


def split_scenes(seed: int) -> dict[str, list[Scene]]:
    """Deal the combinations of attributes out to the splits; no combination is in two."""
    scenes = all_scenes()
    order = np.random.default_rng([seed, 240]).permutation(len(scenes))
    dealt, start = {}, 0
    for name, count in COMBINATIONS.items():
        dealt[name] = [scenes[i] for i in order[start : start + count]]
        start += count
    return dealt


def write_shapes(folder: Path, images: dict[str, int], seed: int = 0) -> dict[str, ShapesSplit]:
    """Write the data set: `<folder>/<split>/*.jpg` and `<folder>/captions_<split>.json`.

    Args:
        folder: made if missing.
        images: split -> how many.
        seed: everything depends on it and on nothing else.
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
