"""The shard format: one plain HDF5 file with the grids of some images.

Layout (all at the root, little-endian; n rows, m invalid images, C channels):

    features         (n, *grid)  float16, float32, or uint8; (row, column, channel); contiguous, aligned to 4096 bytes,
                                 or (float16-zstd) one chunk per row, compressed by HDF5 filter 32015 (Zstandard)
    scale            (n, C)      float16, only for uint8: grid = features * scale
    image_id         (n,)        int64
    file_name        (n,)        UTF-8, fixed length
    valid            (n,)        bool; an invalid image keeps its row, filled with NaN (uint8: zeros, NaN scale)
    crc32            (n,)        uint32, CRC-32 (zlib) of the bytes of each row (uint8: of the row, then its scale)
    invalid_row      (m,)        int64, rows of invalid images
    invalid_reason   (m,)        UTF-8, fixed length, the reason for each
    attributes       format = "gridcap-shard", version, index, plan (SHA-256), split, provenance (JSON), and batch_size,
                     the number of images that the encoder computed at a time (optional)

A store with several views per image also has `features_hflip`, `crc32_hflip`, and so on.

A shard is self-verifying: its header (see `header`) contains the SHA-256 of all bytes after it. Its bytes depend only
on its content, not on the time, the host, or the order of writing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gridcap.common.store.codecs import Codec, find_codec
from gridcap.common.store.header import pack_header, unpack_header

SHARD_FORMAT = "gridcap-shard"
ALIGNMENT = 4096
ORIGINAL = "original"  # the view that every store has
RECREATE_SHARD = (
    "delete this file and run the command that wrote it again: extract-features writes only the missing shards, "
    "gridcap import the whole store"
)
RECREATE_INDEX = "delete it and run the same extract-features command again: it writes the index again"


@dataclass(frozen=True)
class ShardInfo:
    """Header of a shard.

    Attributes:
        index: position of the shard in its store.
        plan: SHA-256 of the plan that the shard belongs to.
        rows: number of images.
        invalid: number of invalid images.
        size: file size in bytes.
        sha256: of everything after the header.
    """

    index: int
    plan: str
    rows: int
    invalid: int
    size: int
    sha256: str

    def to_bytes(self) -> bytes:
        """Return the header as it is stored, HEADER_BYTES long."""
        return pack_header(SHARD_FORMAT, self.__dict__)


def read_header(path: Path) -> ShardInfo | None:
    """Read the header of a shard. Returns and raises as `unpack_header`."""
    values = unpack_header(path, SHARD_FORMAT, ShardInfo.__dataclass_fields__, RECREATE_SHARD)
    return None if values is None else ShardInfo(**values)


@dataclass(frozen=True)
class GridLayout:
    """Shape, codec, and views of the grids of a store.

    Attributes:
        grid_shape: shape of one grid, (row, column, channel).
        codec: how grids are stored.
        views: views of each image; the original comes first.
    """

    grid_shape: tuple[int, ...]
    codec: Codec
    views: tuple[str, ...] = (ORIGINAL,)

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any]) -> GridLayout:
        """Read the layout from a provenance.

        Raises:
            KeyError: a key is missing.
            ValueError: a value is not a grid shape, a codec, or a list of views.
        """
        shape, dtype, views = provenance["grid_shape"], provenance["dtype"], provenance.get("views", [ORIGINAL])
        if not isinstance(shape, list | tuple) or not all(isinstance(side, int) and side > 0 for side in shape):
            raise ValueError(f"grid_shape is {shape!r}")
        if not isinstance(views, list | tuple) or not views or not all(isinstance(view, str) for view in views):
            raise ValueError(f"views is {views!r}")
        return cls(tuple(shape), find_codec(dtype), tuple(views))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the grids that readers return."""
        return self.codec.read


@dataclass(frozen=True)
class ShardSpec:
    """Content of a shard apart from its grids.

    Attributes:
        images: (image_id, file_name) of each row.
        layout: shape, codec, and views of the grids.
        provenance: source of the grids.
        index: position of the shard in its store.
        plan: SHA-256 of the plan that the shard belongs to.
        split: name of the split.
    """

    images: Sequence[tuple[int, str]]
    layout: GridLayout
    provenance: Mapping[str, Any]
    index: int = 0
    plan: str = ""
    split: str = ""


def dataset_name(name: str, view: str) -> str:
    """Return the name of the dataset of a view: "features" of the original, "features_hflip" of the mirrored view."""
    return name if view == ORIGINAL else f"{name}_{view}"


def view_of_dataset(name: str) -> str | None:
    """Return the view whose features a dataset contains ("features_hflip" -> "hflip"), or None for other datasets."""
    if name == "features":
        return ORIGINAL
    return name.removeprefix("features_") if name.startswith("features_") else None
