"""COCO captions files, also those of STAIR, nocaps, and VizWiz."""

from __future__ import annotations

import contextlib
import io
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

REJECTED = ("is_rejected", "is_precanned")  # VizWiz: spam, and "Quality issues are too severe ..."


class Coco:
    """COCO captions JSON."""

    name: ClassVar[str] = "COCO captions JSON, also STAIR, nocaps, VizWiz"
    example: ClassVar[str] = '{"images": [...], "annotations": [...]}'

    def sniff(self, file: CaptionsFile) -> bool:
        """Return whether the JSON has a list of images without sentences."""
        tree = file.tree
        return (
            isinstance(tree, dict)
            and isinstance(tree.get("images"), list)
            and not any(isinstance(entry, dict) and "sentences" in entry for entry in tree["images"])
        )

    def read(self, file: CaptionsFile) -> CaptionSet:
        """Read all images; the file has one part."""
        return read_coco(file.tree, file.path)


def read_coco(tree: dict[str, Any], path: Path) -> CaptionSet:
    """Read a COCO captions file (`captions_*.json`).

    pycocotools groups the annotations by image but loads entries without validation, so they are validated first.

    Args:
        tree: the parsed JSON; `tree["images"]` is a list.
        path: the file, for messages.

    Raises:
        AnnotationError: the annotations have no captions, or a file name leaves the image folder.
    """
    from pycocotools.coco import COCO

    problems = Problems()
    images = _valid_images(tree["images"], path, problems)
    known = {image_id for image_id, _ in images}
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id} for image_id in known],
        "annotations": _valid_annotations(tree.get("annotations", []), known, path, problems),
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    captions: dict[int, list[str]] = {}
    for image_id in known:
        for entry in coco.imgToAnns.get(image_id, []):
            if caption := clean_caption(entry["caption"], f"annotation {entry['id']}", problems):
                captions.setdefault(image_id, []).append(caption)
    return join_captions(images, captions, problems)


def _valid_images(entries: list[Any], path: Path, problems: Problems) -> list[tuple[int, str]]:
    images: list[tuple[int, str]] = []
    for entry in entries:
        image_id = as_image_id(entry.get("id")) if isinstance(entry, dict) else None
        if image_id is None:
            problems.add(NO_ID, entry)
        elif not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            problems.add("image without a file name", entry["id"])
        else:
            images.append((image_id, check_file_name(entry["file_name"], path)))
    return images


def _valid_annotations(entries: object, known: set[int], path: Path, problems: Problems) -> list[dict[str, Any]]:
    """Return the annotations with a caption, a known image, and a unique id. Missing ids are filled in."""
    if not isinstance(entries, list):
        raise AnnotationError(f"{path}: annotations is not a list", "pass a COCO captions file")
    if entries and not any(isinstance(entry, dict) and "caption" in entry for entry in entries):
        raise AnnotationError(
            f"{path}: its annotations have no captions",
            "pass captions_*.json, not instances_*.json or person_keypoints_*.json",
        )
    valid, seen = [], set()
    for number, entry in enumerate(entries):
        image_id = as_image_id(entry.get("image_id")) if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or "caption" not in entry:
            problems.add("annotation without a caption", entry)
        elif image_id is None or image_id not in known:
            problems.add("annotation for an unknown image", entry.get("image_id"))
        elif not isinstance(entry.get("id", 0), int):
            problems.add("annotation whose id is not an integer", entry["id"])
        elif entry.get("id") in seen:
            problems.add("duplicate annotation id", entry.get("id"))
        elif any(entry.get(key) is True for key in REJECTED):
            problems.notes["caption skipped because the file marks it as rejected or precanned"] += 1
        else:
            if "id" in entry:
                seen.add(entry["id"])
            valid.append({"id": f"number {number}", **entry, "image_id": image_id})
    return valid


FORMAT = Coco()
