"""Matching of imported features with the images of a captions file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from gridcap.common.captions.records import ImageRecord, id_from_name
from gridcap.common.errors import UserError
from gridcap.extract.importers.source import Source, SourceError

_INTEGER = re.compile("[0-9]{1,18}")  # fits into 64 bits
_RENAME_HINT = "rename the features to the file names of their images, including folders"

Pair = tuple[ImageRecord, str]
_Parts = tuple[str, ...]


def match_keys(source: Source, records: Sequence[ImageRecord] | None) -> list[Pair]:
    """Pair images with the keys of a source.

    A key that equals a file name belongs to that image. Other keys match an image by its id, or if one of the two
    paths ends with the other, without suffixes: "001", "001.jpg", and "train/cat/001.jpg" match "cat/001.jpg", but
    "dog/001.jpg" does not.

    Args:
        source: the features.
        records: images of a captions file, whose order is kept; None makes every key an image of its own.

    Returns:
        (record, key) pairs; images without features are left out.

    Raises:
        UserError: no image of the captions file has features.
        SourceError: a key matches several images, an image matches several keys, or two keys have the same image id.
    """
    if records is None:
        return _pairs_of_keys(source.keys)
    keys = set(source.keys)
    matches = {record.file_name: record.file_name for record in records if record.file_name in keys}
    aliases = _Aliases(key for key in source.keys if key not in matches)
    record_of_key: dict[str, ImageRecord] = {}
    for record in records:
        if record.file_name in matches:
            continue
        candidates = aliases.of(record)
        if len(candidates) > 1:
            first, second, *_ = candidates
            raise SourceError(f"{record.file_name}: both {first} and {second} match this image", _RENAME_HINT)
        for key in candidates:
            other = record_of_key.setdefault(key, record)
            if other is not record:
                raise SourceError(
                    f"{key}: matches both {other.file_name} (id {other.image_id}) and "
                    f"{record.file_name} (id {record.image_id})",
                    _RENAME_HINT,
                )
            matches[record.file_name] = key
    pairs = [(record, matches[record.file_name]) for record in records if record.file_name in matches]
    if not pairs:
        raise UserError(
            f"none of the {len(records)} images of the captions file is among the {len(source.keys)} features "
            f"(first image: {records[0].file_name}, first feature: {source.keys[0]})",
            "pass the captions file that these features belong to",
        )
    return pairs


class _Aliases:
    """Lookup of keys by image id and by path without suffix."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._by_id: dict[int, list[str]] = defaultdict(list)
        self._by_path: dict[_Parts, list[str]] = defaultdict(list)
        self._by_path_end: dict[_Parts, list[str]] = defaultdict(list)
        for key in keys:
            if _INTEGER.fullmatch(key):
                self._by_id[int(key)].append(key)
            parts = _path_parts(key)
            self._by_path[parts].append(key)
            for start in range(1, len(parts)):
                self._by_path_end[parts[start:]].append(key)

    def of(self, record: ImageRecord) -> list[str]:
        """Return the distinct keys that may belong to an image."""
        parts = _path_parts(record.file_name)
        candidates = [*self._by_id.get(record.image_id, ()), *self._by_path_end.get(parts, ())]
        for start in range(len(parts)):
            candidates += self._by_path.get(parts[start:], ())
        return list(dict.fromkeys(candidates))


def _path_parts(name: str) -> _Parts:
    """Return the parts of a path, the last one without suffix."""
    path = PurePosixPath(name)
    return (*path.parts[:-1], path.stem)


def _pairs_of_keys(keys: Sequence[str]) -> list[Pair]:
    """Make every key an image of its own."""
    by_id: dict[int, str] = {}
    pairs = []
    for key in keys:
        image_id = int(key) if _INTEGER.fullmatch(key) else id_from_name(key)
        other = by_id.setdefault(image_id, key)
        if other != key:
            raise SourceError(f"{other} and {key}: both have the image id {image_id}", "remove one of them")
        pairs.append((ImageRecord(image_id, key), key))
    return pairs
