"""Helpers of the store tests."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from gridcap.common.store.shard_reader import ShardReader


def read_all(reader: ShardReader) -> np.ndarray:
    """Read all grids of a shard."""
    out = np.empty(reader.shape, reader.dtype)
    for row in range(len(reader)):
        reader.read_row(row, out[row])
    return out


def files_below(folder: Path) -> list[str]:
    """Return the relative paths of all files in a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip_byte_of_row(path: Path, row: int) -> None:
    """Flip a bit in a stored grid."""
    with h5py.File(path) as file:
        features = file["features"]
        position = features.id.get_offset() + row * features[0].nbytes + 5
    with path.open("r+b") as raw:
        raw.seek(position)
        byte = raw.read(1)[0]
        raw.seek(position)
        raw.write(bytes([byte ^ 0x40]))
