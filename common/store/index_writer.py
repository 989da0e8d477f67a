"""Writer of the index, whose presence means that a store is complete (`index_reader` describes the format)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gridcap.common.errors import StoreError
from gridcap.common.files import replacing, sha256_of
from gridcap.common.store.hdf5 import text_array
from gridcap.common.store.header import FORMAT_VERSION, HEADER_BYTES, pack_header
from gridcap.common.store.index_reader import INDEX_FORMAT, read_headers
from gridcap.common.store.shard_format import (
    RECREATE_INDEX,
    RECREATE_SHARD,
    GridLayout,
    ShardInfo,
    dataset_name,
)
from gridcap.common.store.shard_reader import ShardReader


@dataclass(frozen=True)
class IndexSpec:
    """Content of an index.

    Attributes:
        folder: folder of the shards, inside the folder of the index.
        shard_names: paths of the shards relative to `folder`, in row order.
        shard_plans: SHA-256 of the plan that each shard must belong to; the last is the plan of the store.
        images: for each shard, the (image_id, file_name) of its rows.
        max_name_bytes: length of the longest file name in UTF-8 bytes.
        split: name of the split.
        provenance: source of the grids.
    """

    folder: Path
    shard_names: Sequence[str]
    shard_plans: Sequence[str]
    images: Iterable[Sequence[tuple[int, str]]]
    max_name_bytes: int
    split: str
    provenance: Mapping[str, Any]

    @property
    def shard_paths(self) -> list[Path]:
        """Paths of the shards."""
        return [self.folder / name for name in self.shard_names]


def write_index(path: Path, spec: IndexSpec) -> None:
    """Write the index of a store atomically after checking that its shards are complete and belong to it.

    Args:
        path: the index file.
        spec: its content.

    Raises:
        StoreError: a shard is missing, corrupted, or of another plan or position, or has another number of rows.
        StoreAccessError: the system could not read a shard.
    """
    shards = _read_planned_headers(spec)
    folder = spec.folder.relative_to(path.parent)
    with replacing(path) as temporary:
        with h5py.File(temporary, "x", locking=False, userblock_size=HEADER_BYTES) as file:
            _create_virtual_datasets(file, [folder / name for name in spec.shard_names], shards, spec.provenance)
            _write_columns(file, spec, shards)
            file["shard_name"] = text_array([(folder / name).as_posix() for name in spec.shard_names])
            file["shard_rows"] = np.array([shard.rows for shard in shards], "<i8")
            file["shard_sha256"] = text_array([shard.sha256 for shard in shards])
            file.attrs.update({"format": INDEX_FORMAT, "version": FORMAT_VERSION})
            file.attrs.update({"split": spec.split, "plan": spec.shard_plans[-1]})
            file.attrs["provenance"] = json.dumps(spec.provenance, sort_keys=True)
        values = {"size": temporary.stat().st_size, "sha256": sha256_of(temporary, HEADER_BYTES)}
        with open(temporary, "r+b") as header:
            header.write(pack_header(INDEX_FORMAT, values))


def _read_planned_headers(spec: IndexSpec) -> list[ShardInfo]:
    """Return the headers of the shards after comparing their plans and positions."""
    shards = []
    headers = zip(spec.shard_paths, read_headers(spec.shard_paths), spec.shard_plans, strict=True)
    for position, (path, info, plan) in enumerate(headers):
        if info is None:
            raise StoreError(f"{path}: rewritten by another program", RECREATE_SHARD)
        if (info.index, info.plan) != (position, plan):
            raise StoreError(f"{path}: belongs to another plan", RECREATE_SHARD)
        shards.append(info)
    return shards


def _write_columns(file: h5py.File, spec: IndexSpec, shards: Sequence[ShardInfo]) -> None:
    """Write the columns of all images shard by shard, so that memory does not grow with the number of images."""
    rows = sum(shard.rows for shard in shards)
    name_type = h5py.string_dtype("utf-8", spec.max_name_bytes)
    columns = {
        name: file.create_dataset(name, (rows,), kind, fill_time="never")
        for name, kind in (("image_id", "<i8"), ("file_name", name_type), ("valid", bool))
    }
    start = 0
    invalid_rows: list[int] = []
    invalid_reasons: list[str] = []
    for path, shard, images in zip(spec.shard_paths, shards, spec.images, strict=True):
        if len(images) != shard.rows:
            raise StoreError(f"{path}: has {shard.rows} rows, but the plan has {len(images)}", RECREATE_INDEX)
        valid = np.ones(shard.rows, bool)
        if shard.invalid:
            reasons = _read_invalid_reasons(path, shard)
            valid[list(reasons)] = False
            invalid_rows += [start + row for row in reasons]
            invalid_reasons += reasons.values()
        stop = start + shard.rows
        columns["image_id"][start:stop] = np.array([image_id for image_id, _ in images], "<i8")
        columns["file_name"][start:stop] = text_array([name for _, name in images], spec.max_name_bytes)
        columns["valid"][start:stop] = valid
        start = stop
    file["invalid_row"] = np.asarray(invalid_rows, "<i8")
    file["invalid_reason"] = text_array(invalid_reasons)


def _read_invalid_reasons(path: Path, shard: ShardInfo) -> dict[int, str]:
    with ShardReader(path) as reader:
        reasons = reader.invalid_reasons
    if len(reasons) != shard.invalid:
        raise StoreError(f"{path}: replaced while it was being indexed", RECREATE_INDEX)
    return reasons


def _create_virtual_datasets(
    file: h5py.File, shard_paths: Sequence[Path], shards: Sequence[ShardInfo], provenance: Mapping[str, Any]
) -> None:
    """Create the virtual datasets over all shards.

    This uses the low-level API because h5py's `create_virtual_dataset` records the creation time, and the same store
    must have the same bytes.

    Args:
        file: the index.
        shard_paths: relative to the folder of the index.
        shards: headers of the shards.
        provenance: source of the grids.
    """
    layout = GridLayout.from_provenance(provenance)
    rows = sum(shard.rows for shard in shards)
    for view in layout.views:
        for dataset, (row_shape, kind) in layout.codec.datasets(layout.grid_shape).items():
            space = h5py.h5s.create_simple((rows, *row_shape))
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_obj_track_times(False)
            # Shown for missing shards. For uint8, the NaN is in the scale.
            properties.set_fill_value(np.array(np.nan if kind.kind == "f" else 0, kind))
            start, name = 0, dataset_name(dataset, view).encode()
            for path, shard in zip(shard_paths, shards, strict=True):
                part = space.copy()
                part.select_hyperslab((start, *(0 for _ in row_shape)), (shard.rows, *row_shape))
                source = path.as_posix().replace("%", "%%").encode()  # HDF5 expands "%b" in source names
                properties.set_virtual(part, source, name, h5py.h5s.create_simple((shard.rows, *row_shape)))
                start += shard.rows
            h5py.h5d.create(file.id, name, h5py.h5t.py_create(kind), space, dcpl=properties)
