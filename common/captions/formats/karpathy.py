"""Karpathy's split files (`dataset_coco.json`, `dataset_flickr8k.json`, `dataset_flickr30k.json`).

Source: Karpathy and Fei-Fei (2015), https://cs.stanford.edu/people/karpathy/deepimagesent/
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from gridcap.common.captions.records import (
    NO_ID,
    CaptionSet,
    Problems,
    as_image_id,
    check_file_name,
    clean_caption,
    join_captions,
)
from gridcap.common.captions.source import CaptionsFile
from gridcap.common.errors import AnnotationError

PARTS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


class Karpathy:
    """Karpathy split JSON."""

    name: ClassVar[str] = "Karpathy split JSON"
    example: ClassVar[str] = 'dataset_coco.json: {"images": [{"sentences": [...], "split": "train"}]}'

    def sniff(self, file: CaptionsFile) -> bool:
        """Return whether the JSON has a list of images with sentences."""
        tree = file.tree
        return (
            isinstance(tree, dict)
            and isinstance(tree.get("images"), list)
            and any(isinstance(entry, dict) and "sentences" in entry for entry in tree["images"])
        )

    def read(self, file: CaptionsFile) -> CaptionSet:
        """Read one part."""
        return read_karpathy(file.tree, file.path, file.part)


def read_karpathy(tree: dict[str, Any], path: Path, part: str) -> CaptionSet:
    """Read one part of a Karpathy split file.

    Args:
        tree: the parsed JSON; `tree["images"]` is a list.
        path: the file, for messages.
        part: train (includes restval), val, or test; a leading "karpathy-" is ignored.

    Raises:
        AnnotationError: unknown part, or a file name leaves the image folder.
    """
    part = part.removeprefix("karpathy-")
    if part not in PARTS:
        raise AnnotationError(
            f"{path}: a Karpathy split file has no part {part!r}",
            "use --split karpathy-train, karpathy-val, or karpathy-test",
        )
    problems = Problems()
    images: list[tuple[int, str]] = []
    captions: dict[int, list[str]] = {}
    for entry in tree["images"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("sentences"), list):
            problems.add("image without sentences", entry)
            continue
        if entry.get("split") not in PARTS[part]:
            continue
        name = check_file_name(entry.get("filename"), path)
        if folder := entry.get("filepath"):
            name = check_file_name(f"{folder}/{name}", path)
        image_id = as_image_id(entry.get("cocoid", entry.get("imgid")))
        if image_id is None:
            problems.add(NO_ID, name)
            continue
        images.append((image_id, name))
        sentences = [s.get("raw") if isinstance(s, dict) else None for s in entry["sentences"]]
        cleaned = [clean_caption(sentence, name, problems) for sentence in sentences]
        captions.setdefault(image_id, [caption for caption in cleaned if caption])
    return join_captions(images, captions, problems)


FORMAT = Karpathy()
