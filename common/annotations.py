"""Caption files -> image records: COCO JSON, Karpathy's split file, CSV, or a folder without captions.

Nothing bad in a file is silent: every problem is counted by kind with the first examples, and is fatal only
above `max_invalid`.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np

from gridcap.common.config import SplitConfig, max_invalid_count
from gridcap.common.errors import AnnotationError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_EXAMPLES_KEPT = 3
_NO_ID = "image without a whole-number id (of 64 bits)"


@dataclass(frozen=True)
class ImageRecord:
    """An image of a split: its id, its path below the image folder (with "/"), its K captions (maybe none)."""

    image_id: int
    file_name: str
    captions: tuple[str, ...] = ()


@dataclass
class Problems:
    """What was wrong in an annotation file, counted by kind, with the first examples of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: object) -> None:
        """Count one problem."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < _EXAMPLES_KEPT:
            kept.append(_shown(example))

    def lines(self) -> list[str]:
        """A line a kind: "3 x empty caption (annotation 17, annotation 90, ...)"."""
        return [
            f"{count} x {kind} ({', '.join(self.examples[kind])}{', ...' if count > _EXAMPLES_KEPT else ''})"
            for kind, count in self.counts.items()
        ]


@dataclass(frozen=True)
class AnnotationSet:
    """The images of one split, in the order of the file, and what was wrong in it."""

    records: list[ImageRecord]
    problems: Problems


def load_split(split: SplitConfig, name: str, seed: int = 0, max_invalid: str = "20%") -> AnnotationSet:
    """Load a split's images and captions, take its subset, and stop if too much is bad.

    Args:
        split: the paths and the subset.
        name: the split's name; it picks the part of a Karpathy file (`karpathy-train`, or just `train`).
        seed: of the random order that `skip` and `limit` cut. The subset is cut by images, never by captions,
            so no image stands in two disjoint subsets.
        max_invalid: how many problems are allowed, "10" or "5%" of the images and captions.

    Raises:
        AnnotationError: unreadable, of no known layout, or too many problems.
    """
    loaded = load_annotations(split.annotations, name) if split.annotations else list_images(split.images)
    source = split.annotations or split.images
    _check_problems(source, loaded.problems, sum(max(1, len(r.captions)) for r in loaded.records), max_invalid)
    records = loaded.records
    if split.limit is not None or split.skip:
        order = np.random.default_rng([seed, 0x5B5E7]).permutation(len(records))
        end = None if split.limit is None else split.skip + split.limit
        records = [records[i] for i in np.sort(order[split.skip : end])]
    if not records:
        raise AnnotationError(f"{source}: no images are left for split {name!r}", "check the path, limit and skip")
    return AnnotationSet(records, loaded.problems)


def captions_only(path: Path) -> SplitConfig:
    """A split for a captions file given by itself, where nobody looks at the images."""
    return SplitConfig(images=path.parent, annotations=path)


def load_annotations(path: Path, part: str = "train") -> AnnotationSet:
    """Read a captions file; the layout is told from its content.

    Args:
        path: COCO captions JSON, Karpathy's `dataset_coco.json`, or a CSV with a line `image,caption` a caption.
        part: for a Karpathy file, which part: train (with restval), val, test; a leading "karpathy-" is ignored.

    Raises:
        AnnotationError: unreadable or of no known layout.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: not UTF-8 text (byte {error.start})", "give a captions file") from error
    except OSError as error:
        raise AnnotationError(f"{path}: {error.strerror}", "check the path of the captions file") from error
    if path.suffix.lower() in (".csv", ".txt"):
        return _read_csv(text, path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # nested too deep; a number of thousands of digits
        where = str(error)
        if isinstance(error, json.JSONDecodeError):
            where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise AnnotationError(f"{path}: not valid JSON: {where}", "download or write the file again") from error
    if not isinstance(data, dict) or not isinstance(data.get("images"), list):
        raise AnnotationError(
            f"{path}: no list of images: neither a COCO captions file nor Karpathy's split file",
            "give captions_*.json, dataset_coco.json, or a .csv with the columns image,caption",
        )
    if any(isinstance(entry, dict) and "sentences" in entry for entry in data["images"]):
        return _read_karpathy(data, path, part.removeprefix("karpathy-"))
    return _read_coco(data, path)


def split_images(
    split: SplitConfig, name: str, seed: int = 0, max_invalid: str = "20%"
) -> tuple[Iterable[ImageRecord], Problems]:
    """The images of a split for extraction, where captions do not matter: of a whole folder as a stream.

    Args:
        split, name, seed, max_invalid: as for `load_split`.

    Returns:
        The images, which may be gone through more than once, and what was wrong; of a folder, known at their end.

    Raises:
        AnnotationError: as for `load_split`; of a folder, when its images are gone through.
    """
    if split.annotations is None and split.limit is None and not split.skip:
        images = FolderImages(split.images, max_invalid)
        return images, images.problems
    loaded = load_split(split, name, seed, max_invalid)
    return loaded.records, loaded.problems


class FolderImages:
    """All images below a folder, sorted by path, without captions; found anew each time they are gone through.

    Holds the names of one folder at a time, so that it takes any number of images.

    Args:
        folder: to look in; links to folders are not followed.
        max_invalid: how many file names may be bad.

    Attributes:
        problems: what was wrong, after the images were gone through.
        left_out: suffix -> how many files that are no images by their names; after the images were gone through.

    Raises:
        AnnotationError: on iteration: the folder is missing or holds no images, or too many names are bad.
    """

    def __init__(self, folder: Path, max_invalid: str = "100%") -> None:
        self._folder = folder
        self._max_bad = max_invalid
        self.problems = Problems()
        self.left_out: Counter[str] = Counter()

    def __iter__(self) -> Iterator[ImageRecord]:
        if not self._folder.is_dir():
            raise AnnotationError(f"{self._folder}: no such folder of images", "check the path given with --images")
        self.problems.counts.clear()
        self.problems.examples.clear()
        self.left_out.clear()
        good = 0
        for name in self._names_below(""):
            if not _is_utf8(name):
                self.problems.add("file name that is not UTF-8", ascii(name))
                continue
            good += 1
            yield ImageRecord(id_from_name(name), name)
        if not good:
            raise AnnotationError(f"{self._folder}: holds no images", f"images end in {', '.join(IMAGE_SUFFIXES)}")
        _check_problems(self._folder, self.problems, good, self._max_bad)

    def _names_below(self, prefix: str) -> Iterator[str]:
        """Image files below a folder, in the order of their whole paths: "a-b/x" stands before "a/x"."""
        found = []
        with os.scandir(self._folder / prefix) as entries:
            for entry in entries:
                suffix = Path(entry.name).suffix.lower()
                if entry.is_dir(follow_symlinks=False):
                    found.append(entry.name + "/")
                elif entry.name.startswith("._"):
                    continue  # what macOS keeps beside a file on foreign disks
                elif suffix in IMAGE_SUFFIXES and (entry.is_file() or entry.is_symlink()):
                    found.append(entry.name)  # a link that leads nowhere is a missing image
                elif entry.is_file():
                    self.left_out[suffix or entry.name] += 1
        for name in sorted(found):
            if name.endswith("/"):
                yield from self._names_below(prefix + name)
            else:
                yield prefix + name


def list_images(folder: Path) -> AnnotationSet:
    """All images below a folder as a list; see `FolderImages`.

    Raises:
        AnnotationError: the folder is missing or holds no images.
    """
    images = FolderImages(folder)
    return AnnotationSet(list(images), images.problems)


def _check_problems(source: Path, problems: Problems, good: int, max_invalid: str) -> None:
    bad = sum(problems.counts.values())
    if bad > max_invalid_count(max_invalid, good + bad):
        raise AnnotationError(
            f"{source}: {bad} of {good + bad} items are bad, more than {max_invalid}: {'; '.join(problems.lines())}",
            "mend the file, or allow more with --set data.max_invalid=50%",
        )


def id_from_name(file_name: str) -> int:
    """An image id for files that have none: 63 bits of the name's SHA-256, so it is the same in every subset.

    Among a hundred million names two share an id with a probability of 0.05 %; a store then says so.
    """
    return int.from_bytes(hashlib.sha256(file_name.encode()).digest()[:8], "big") >> 1


def _collect(images: Iterable[tuple[int, str]], captions: dict[int, list[str]], problems: Problems) -> AnnotationSet:
    """Join images with their captions; count images that stand twice."""
    records: list[ImageRecord] = []
    seen: set[int] = set()
    for image_id, file_name in images:
        if image_id in seen:
            problems.add("duplicate image id", f"{image_id} {file_name}")
            continue
        seen.add(image_id)
        records.append(ImageRecord(image_id, file_name, tuple(captions.get(image_id, ()))))
    return AnnotationSet(records, problems)


def _checked_name(name: object, path: Path) -> str:
    """A file name that stays inside the image folder."""
    if not isinstance(name, str) or not name or "\0" in name or not _is_utf8(name):
        raise AnnotationError(f"{path}: an image has no usable file name: {_shown(name)!r}", "mend that entry")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise AnnotationError(
            f"{path}: the file name {_shown(name)!r} leaves the image folder", "use names relative to the image folder"
        )
    return name


def _shown(value: object) -> str:
    """The beginning of what stands in a file, for a message."""
    try:
        return str(value)[:80]
    except (RecursionError, ValueError):  # nested too deep; a number of thousands of digits
        return "something that is too large to show"


def _is_id(value: object) -> TypeGuard[int]:
    """Whether it can be an image id: a store keeps 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _clean(caption: object, where: str, problems: Problems) -> str | None:
    if not isinstance(caption, str) or not caption.strip():
        problems.add("empty caption", where)
        return None
    return " ".join(caption.split())


def _read_coco(data: dict[str, Any], path: Path) -> AnnotationSet:
    from pycocotools.coco import COCO

    problems = Problems()
    images: list[tuple[int, str]] = []
    for entry in data["images"]:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            problems.add(_NO_ID, entry)
        elif not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            problems.add("image without a file name", entry["id"])
        else:
            images.append((entry["id"], _checked_name(entry["file_name"], path)))

    annotations = data.get("annotations", [])
    if not isinstance(annotations, list):
        raise AnnotationError(f"{path}: annotations is not a list", "give a COCO captions file")
    known = {image_id for image_id, _ in images}
    good, seen = [], set()
    for number, entry in enumerate(annotations):
        if not isinstance(entry, dict) or "caption" not in entry:
            problems.add("annotation without a caption", entry)
        elif not _is_id(entry.get("image_id")) or entry["image_id"] not in known:
            problems.add("annotation for an unknown image", entry.get("image_id"))
        elif not isinstance(entry.get("id", 0), int):
            problems.add("annotation whose id is no whole number", entry["id"])
        elif entry.get("id") in seen:
            problems.add("duplicate annotation id", entry.get("id"))
        else:
            if "id" in entry:
                seen.add(entry["id"])
            good.append({"id": f"number {number}", **entry})
    if annotations and not good and not any(isinstance(entry, dict) and "caption" in entry for entry in annotations):
        raise AnnotationError(
            f"{path}: its annotations have no captions",
            "give captions_*.json, not instances_*.json or person_keypoints_*",
        )

    coco = COCO()
    coco.dataset = {"images": [{"id": i} for i in known], "annotations": good}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    captions: dict[int, list[str]] = {}
    for image_id in known:
        for entry in coco.imgToAnns.get(image_id, []):
            if caption := _clean(entry["caption"], f"annotation {entry.get('id')}", problems):
                captions.setdefault(image_id, []).append(caption)
    return _collect(images, captions, problems)


def _read_karpathy(data: dict[str, Any], path: Path, part: str) -> AnnotationSet:
    """Karpathy and Fei-Fei (2015): https://cs.stanford.edu/people/karpathy/deepimagesent/"""
    if part not in ("train", "val", "test"):
        raise AnnotationError(
            f"{path}: Karpathy's file has no part {part!r}", "use --split karpathy-train, karpathy-val or karpathy-test"
        )
    wanted = ("train", "restval") if part == "train" else (part,)
    problems = Problems()
    images: list[tuple[int, str]] = []
    captions: dict[int, list[str]] = {}
    for entry in data["images"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("sentences"), list):
            problems.add("image without sentences", entry)
            continue
        if entry.get("split") not in wanted:
            continue
        name = _checked_name(entry.get("filename"), path)
        if folder := entry.get("filepath"):
            name = _checked_name(f"{folder}/{name}", path)
        image_id = entry.get("cocoid", entry.get("imgid"))
        if not _is_id(image_id):
            problems.add(_NO_ID, name)
            continue
        images.append((image_id, name))
        texts = [s.get("raw") if isinstance(s, dict) else None for s in entry["sentences"]]
        cleaned = [_clean(text, name, problems) for text in texts]
        captions.setdefault(image_id, [c for c in cleaned if c])
    return _collect(images, captions, problems)


def _read_csv(text: str, path: Path) -> AnnotationSet:
    """A line a caption, `image,caption`, with or without that header; Flickr8k's captions.txt."""
    problems = Problems()
    captions: dict[str, list[str]] = {}
    # A line at a time, so that a quote which is never closed costs its own line and not the rest of the file.
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        try:
            row = next(csv.reader([line]), [])
        except csv.Error as error:
            problems.add(f"line that is no CSV ({error})", f"line {number}")
            continue
        if not row or (number == 1 and row[0].strip().lower() in ("image", "file_name", "filename")):
            continue
        name = _checked_name(row[0].strip(), path)
        if not name.lower().endswith(IMAGE_SUFFIXES):
            problems.add("line whose first column is no image file", f"line {number}")
            continue
        kept = captions.setdefault(name, [])
        # A caption with commas and no quotes is split by the reader: join it again.
        if caption := _clean(",".join(row[1:]), f"line {number}", problems):
            kept.append(caption)
    by_id = {id_from_name(name): name for name in captions}
    return _collect(by_id.items(), {i: captions[n] for i, n in by_id.items()}, problems)
