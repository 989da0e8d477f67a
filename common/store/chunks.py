"""Chunked datasets of HDF5: positions of the chunks in the file, and the filters that they need."""

from __future__ import annotations

import contextlib
import functools
import importlib
from pathlib import Path
from typing import Any

import h5py

from gridcap.common.errors import StoreAccessError
from gridcap.common.store.codecs import ZSTD_FILTER


def locate_compressed_rows(dataset: h5py.Dataset) -> list[tuple[int, int]] | None:
    """Return the position in the file and the size of each row's chunk.

    Returns:
        None if a row is not exactly one chunk that was compressed by Zstandard alone; HDF5 has to read it.
    """
    properties = dataset.id.get_create_plist()
    if dataset.chunks != (1, *dataset.shape[1:]) or properties.get_nfilters() != 1:
        return None
    if properties.get_filter(0)[0] != ZSTD_FILTER:
        return None
    base = 0 if _counts_user_block() else dataset.file.userblock_size
    chunks: dict[int, tuple[int, int]] = {}

    def collect(chunk: Any) -> None:
        if chunk.filter_mask == 0:  # else HDF5 stored the chunk without the filter
            chunks[chunk.chunk_offset[0]] = (base + chunk.byte_offset, chunk.size)

    dataset.id.chunk_iter(collect)
    return [chunks[row] for row in range(len(dataset))] if len(chunks) == len(dataset) else None


@functools.cache
def _counts_user_block() -> bool:
    """Return whether HDF5 counts the positions of chunks from the start of the file.

    HDF5 1.14.2, for example, counts them from the end of the user block instead.
    """
    positions: list[int] = []
    for size in (0, 512):
        with h5py.File(f"{size}.h5", "w", driver="core", backing_store=False, userblock_size=size) as file:
            dataset = file.create_dataset("x", data=[1], chunks=(1,))
            dataset.id.chunk_iter(lambda chunk: positions.append(chunk.byte_offset))
    return positions[0] != positions[1]


def require_filters(dataset: h5py.Dataset, path: Path) -> None:
    """Load the filters that HDF5 needs to read a dataset.

    Raises:
        StoreAccessError: a filter is not installed.
    """
    properties = dataset.id.get_create_plist()
    for position in range(properties.get_nfilters()):
        number, _, _, name = properties.get_filter(position)
        if not h5py.h5z.filter_avail(number):
            with contextlib.suppress(ImportError):
                importlib.import_module("hdf5plugin")  # registers its filters
        if not h5py.h5z.filter_avail(number):
            label = name.decode(errors="replace") or "unnamed"
            raise StoreAccessError(
                f"{path}: compressed with the HDF5 filter {number} ({label}), which is not installed",
                "pip install 'gridcap[zstd]' installs hdf5plugin, which has the common filters",
            )
