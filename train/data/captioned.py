"""Images of a feature store joined with their captions."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from gridcap.common.captions.match import find_same_name, is_same_name, match_rows
from gridcap.common.captions.records import ImageRecord
from gridcap.common.errors import MismatchError
from gridcap.common.store.reader import FeatureStore
from gridcap.common.text import plural


@dataclass(frozen=True)
class CaptionedImages:
    """The images of a store that have a valid grid and at least one caption.

    Attributes:
        store: feature store with the grids.
        rows: (n,) int64 rows of the images in the store, in increasing order.
        captions: captions of each image, at least one each.
        left_out: reason -> number of images of the captions file that cannot be used.
        groups: key of each image that near-duplicates share; by default its file name.
        assignment: file name -> split, if the images are a part of a store that was split.
    """

    store: FeatureStore
    rows: np.ndarray
    captions: list[tuple[str, ...]]
    left_out: dict[str, int]
    groups: Sequence[str] = ()
    assignment: Mapping[str, str] = field(default_factory=dict)

    @property
    def caption_count(self) -> int:
        """The number of captions of all images."""
        return sum(map(len, self.captions))

    @classmethod
    def join(cls, store: FeatureStore, records: Sequence[ImageRecord], source: Path) -> CaptionedImages:
        """Match captions with grids by image id, or by file name if one side has no ids of its own.

        Args:
            store: feature store.
            records: images with their captions.
            source: captions file, named in errors.

        Raises:
            MismatchError: the store and the captions have no usable image in common, an id refers to two different
                files, or a file name is ambiguous.
        """
        left_out: Counter[str] = Counter()
        pairs: list[tuple[int, tuple[str, ...], str]] = []
        matches = match_rows(store, records)
        if matches.ambiguous:
            count, first = len(matches.ambiguous), next(iter(matches.ambiguous.values()))
            raise MismatchError(
                f"{source}: {plural(count, 'ambiguous file name')} for {store.path}: {first}",
                "write the paths in the captions file as they are in the image folder",
            )
        for record, row in zip(records, matches.rows, strict=True):
            if row is None:
                left_out["not in the feature store"] += 1
                continue
            if not is_same_name(record, store.file_name[row]):
                raise MismatchError(
                    f"image {record.image_id} is {store.file_name[row]} in {store.path}, "
                    f"but {record.file_name} in {source}",
                    "use the captions file that these features were extracted for",
                )
            if not store.valid[row]:
                left_out["invalid in the feature store"] += 1
            elif not record.captions:
                left_out["without captions"] += 1
            else:
                pairs.append((row, record.captions, record.group or store.file_name[row]))
        if not pairs:
            raise _nothing_in_common(store, records, source, left_out)
        pairs.sort(key=lambda pair: pair[0])
        rows, captions, groups = zip(*pairs, strict=True)
        return cls(store, np.array(rows), list(captions), dict(left_out), groups)

    def __len__(self) -> int:
        return len(self.rows)

    def file_names(self) -> list[str]:
        """Return the file name of each image in the store."""
        return [self.store.file_name[row] for row in self.rows]

    def select(self, positions: Sequence[int], assignment: Mapping[str, str]) -> CaptionedImages:
        """Return some of the images, with the assignment of all images of the store."""
        captions, groups = [self.captions[i] for i in positions], [self.groups[i] for i in positions]
        return CaptionedImages(self.store, self.rows[list(positions)], captions, {}, groups, assignment)

    def digest(self) -> str:
        """Return a SHA-256 hex digest of the rows and their captions."""
        digest = hashlib.sha256(self.rows.tobytes())
        for captions in self.captions:
            digest.update(json.dumps(captions).encode())
        return digest.hexdigest()

    def images(self) -> set[tuple[int, str]]:
        """Return the pairs (image id, base name), which identify images across stores better than ids alone."""
        return {(int(self.store.image_id[row]), PurePosixPath(self.store.file_name[row]).name) for row in self.rows}


def _nothing_in_common(
    store: FeatureStore, records: Sequence[ImageRecord], source: Path, left_out: Counter[str]
) -> MismatchError:
    same_name = find_same_name(store, records)
    if same_name is not None and set(left_out) == {"not in the feature store"}:
        record, row = same_name
        return MismatchError(
            f"{store.path} and {source} have file names in common, but their image ids differ: {record.file_name} is "
            f"{store.image_id[row]} in the store and {record.image_id} in the captions",
            f"use the captions that these features were extracted for, or extract again with --annotations {source}",
        )
    return MismatchError(
        f"{store.path} and {source} have no usable image in common ({dict(left_out)})",
        "use the captions file that these features were extracted for",
    )
