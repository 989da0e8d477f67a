"""Malicious checkpoints and HDF5 files."""

from __future__ import annotations

import json
from pathlib import Path

import h5py

from gridcap.common.files import sha256_of
from gridcap.common.store.header import HEADER_BYTES, pack_header
from gridcap.common.store.index_reader import INDEX_FORMAT

_GRID = (2, 2, 3)


def sign_checkpoint(checkpoint: Path) -> None:
    """Recompute the checksums of a modified checkpoint, as an attacker would."""
    files = [path for path in checkpoint.iterdir() if path.name != "sha256.json"]
    (checkpoint / "sha256.json").write_text(json.dumps({path.name: sha256_of(path) for path in files}))


def sign_index(path: Path) -> None:
    """Recompute the checksum of a modified index, as an attacker would."""
    values = {"size": path.stat().st_size, "sha256": sha256_of(path, HEADER_BYTES)}
    with path.open("r+b") as file:
        file.write(pack_header(INDEX_FORMAT, values))


def _external_link(file: h5py.File, name: str, other: Path) -> None:
    file[name] = h5py.ExternalLink(other, "secret")


def _soft_link(file: h5py.File, name: str, other: Path) -> None:
    file[name] = h5py.SoftLink("/somewhere")


def _virtual(file: h5py.File, name: str, other: Path) -> None:
    layout = h5py.VirtualLayout((4, *_GRID), "<f2")
    layout[:] = h5py.VirtualSource(other, "secret", (4, *_GRID))
    file.create_virtual_dataset(name, layout)


def _external_storage(file: h5py.File, name: str, other: Path) -> None:
    file.create_dataset(name, (4, *_GRID), "<f2", external=[(str(other), 0, h5py.h5f.UNLIMITED)])


# Each makes a dataset, four rows of 2 x 2 x 3, refer to data outside the file.
WAYS_OUT = (_external_link, _soft_link, _virtual, _external_storage)
