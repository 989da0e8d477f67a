"""Images of a feature store joined with their captions."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from gridcap.common.captions.match import find_same_name, is_same_name, match_rows
from gridcap.common.captions.records import ImageRecord
from gridcap.common.errors import MismatchError
from gridcap.common.store.reader import FeatureStore


@dataclass(frozen=True)
class CaptionedImages:
    """The images of a store that have a valid grid and at least one caption.

    Attributes:
        store: feature store with the grids.
        rows: (n,) int64 rows of the images in the store, in increasing order.
        captions: captions of each image, at least one each.
        left_out: reason -> number of images of the captions file that cannot be used.
    """

    store: FeatureStore
    rows: np.ndarray
    captions: list[tuple[str, ...]]
    left_out: dict[str, int]

    @classmethod
    def join(cls, store: FeatureStore, records: Sequence[ImageRecord], source: Path) -> CaptionedImages:
        """Match captions with grids by image id, or by file name if one side has no ids of its own.

        Args:
            store: feature store.
            records: images with their captions.
            source: captions file, named in errors.

        Raises:
            MismatchError: the store and the captions have no usable image in common, or an id refers to two
                different files.
        """
        left_out: Counter[str] = Counter()
        pairs: list[tuple[int, tuple[str, ...]]] = []
        matches = match_rows(store, records)
        for position, (record, row) in enumerate(zip(records, matches.rows, strict=True)):
            if row is None:
                ambiguous = position in matches.ambiguous
                left_out["with an ambiguous file name" if ambiguous else "not in the feature store"] += 1
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
                pairs.append((row, record.captions))
        if not pairs:
            raise _nothing_in_common(store, records, source, left_out)
        pairs.sort(key=lambda pair: pair[0])
        return cls(store, np.array([row for row, _ in pairs]), [captions for _, captions in pairs], dict(left_out))

    def __len__(self) -> int:
        return len(self.rows)

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
