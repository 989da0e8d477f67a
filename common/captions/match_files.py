"""Matching the images of a captions file with the files of an image folder."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from gridcap.common.captions.images import SourceImages
from gridcap.common.captions.records import ImageRecord, id_from_name
from gridcap.common.errors import AnnotationError
from gridcap.common.sources.registry import IMAGE_SUFFIXES

EXACT = "image matched by its path"
RELATIVE = "image matched by its path without the name of the image folder"
STEM = "image matched by its name without extension"
MISSING = "image that is not in the image folder"
NUMBERED = re.compile("(?:.*_)?([0-9]{1,19})")  # COCO_val2014_000000000042


def match_files(
    records: Sequence[ImageRecord], folder: Path, follow_links: bool = False
) -> tuple[list[ImageRecord], Counter[str]]:
    """Replace the names of images by the paths of their files.

    A name matches, in this order: the file of this path; the file of this path without leading folders, if these are
    the end of the path of the image folder; the only file whose path without extension ends with it, where an integer
    also matches a file that is numbered with zeros or a prefix, such as COCO_val2014_000000000042.jpg.

    Args:
        records: images of a captions file.
        folder: image folder, or an archive.
        follow_links: whether to descend into linked folders.

    Returns:
        The records, with unchanged names if they match no file, and the number of records per kind of match.

    Raises:
        AnnotationError: a name matches several files, or several names match one file.
    """
    kinds: Counter[str] = Counter()
    if folder.is_dir() and all((folder / record.file_name).is_file() for record in records):  # needs no listing
        return list(records), Counter({EXACT: len(records)})
    files = _list(folder, follow_links)
    by_stem = _index(files, records)
    matched: list[ImageRecord] = []
    owner: dict[str, str] = {}
    for record in records:
        name, kind = _match(record, folder, files, by_stem)
        kinds[kind] += 1
        other = owner.setdefault(name, record.file_name)
        if other != record.file_name:
            raise AnnotationError(f"{folder / name}: matches both {other} and {record.file_name}", "fix the names")
        has_derived_id = record.image_id == id_from_name(record.file_name)
        image_id = id_from_name(name) if has_derived_id else record.image_id
        matched.append(replace(record, image_id=image_id, file_name=name))
    return matched, kinds


def _list(folder: Path, follow_links: bool) -> set[str]:
    try:
        return {record.file_name for record in SourceImages(folder, follow_links=follow_links)}
    except AnnotationError:  # no images at all: every image is missing
        return set()


def _match(record: ImageRecord, folder: Path, files: set[str], by_stem: dict[str, list[str]]) -> tuple[str, str]:
    """Return the path of the file of a record, or its own name, and the kind of match."""
    name = record.file_name
    if name in files or (folder / name).exists():
        return name, EXACT
    parts, folders = PurePosixPath(name).parts, folder.resolve().parts
    for count in range(len(parts) - 1, 0, -1):
        relative = "/".join(parts[count:])
        if parts[:count] == folders[-count:] and (relative in files or (folder / relative).exists()):
            return relative, RELATIVE
    stem = without_suffix(name)
    candidates = [file for key in _keys(name) for file in by_stem.get(key, ()) if _ends_with(file, stem)]
    candidates = list(dict.fromkeys(candidates))
    if len(candidates) > 1:
        raise AnnotationError(
            f"{name}: both {candidates[0]} and {candidates[1]} in {folder} match this image",
            "write the path relative to the image folder, with its extension, into the captions file",
        )
    return (candidates[0], STEM) if candidates else (name, MISSING)


def _index(files: Iterable[str], records: Iterable[ImageRecord]) -> dict[str, list[str]]:
    """Return key -> files, for the keys of the records."""
    needed = {key for record in records for key in _keys(record.file_name)}
    by_stem: dict[str, list[str]] = defaultdict(list)
    for file in sorted(files):
        for key in _keys(file):
            if key in needed:
                by_stem[key].append(file)
    return by_stem


def _keys(name: str) -> set[str]:
    """Return the last part of a path without extension, and its number without zeros and prefix."""
    stem = without_suffix(name).rpartition("/")[2]
    number = NUMBERED.fullmatch(stem)
    return {stem} if number is None else {stem, f"number {int(number[1])}"}


def _ends_with(file: str, stem: str) -> bool:
    """Return whether the path of a file without extension ends with a name; an integer is compared as a number."""
    path = without_suffix(file)
    return path == stem or path.endswith(f"/{stem}") or (stem.isdigit() and f"number {int(stem)}" in _keys(file))


def without_suffix(name: str) -> str:
    """Return a path without the extension of an image."""
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else name
