"""HDF5 files from anywhere: opened, and refused if their numbers lie somewhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import h5py

from gridcap.common.errors import StoreError, first_line

# What h5py, numpy and json raise over damaged bytes, depending on which are damaged.
_DAMAGE = (KeyError, ValueError, OSError, RuntimeError, TypeError, AttributeError, MemoryError, OverflowError)
_REMAKE = "delete this file and make it again; verify-features --repair does so for a store of extract-features"


def open_hdf5(path: Path) -> h5py.File:
    """Open a file for reading.

    Raises:
        StoreError: missing, unreadable or not HDF5.
    """
    try:
        return h5py.File(path, "r", locking=False)
    except FileNotFoundError as error:
        raise StoreError(f"{path}: no such file", "check the path, or make it with extract-features") from error
    except IsADirectoryError as error:
        hint = "choose another name" if path.suffix == ".h5" else f"give the index file beside it, {path}.h5"
        raise StoreError(f"{path}: is a folder", hint) from error
    except PermissionError as error:
        raise StoreError(f"{path}: no permission to read it", "check the permissions") from error
    except OSError as error:
        raise StoreError(
            f"{path}: not a readable HDF5 file",
            "give a file made by extract-features; if it was, it is damaged: delete it and run that command again",
        ) from error


@contextlib.contextmanager
def corruption_as_store_error(path: Path, what: str = "HDF5 file", hint: str = _REMAKE) -> Iterator[None]:
    """Turn what damage in a file leads HDF5 and its readers to raise into an error that names the file."""
    try:
        yield
    except _DAMAGE as error:
        raise StoreError(f"{path}: not a sound {what}: {first_line(error)}", hint) from error


def check_own_data(file: h5py.File, path: Path, virtual: tuple[str, ...] = ()) -> None:
    """Refuse a file that would have other files read: by a soft or external link, external storage, or a virtual
    dataset.

    Args:
        virtual: how the names of datasets begin that may be virtual, since nobody here reads them.

    Raises:
        StoreError: it has one, or cannot be read.
    """
    with corruption_as_store_error(path):
        for name in file:
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise StoreError(f"{path}: {name} is a link to another place", _COPY)
            item = file[name]
            if isinstance(item, h5py.Dataset) and (item.external or (item.is_virtual and not name.startswith(virtual))):
                raise StoreError(f"{path}: the numbers of {name} lie in other files", _COPY)


_COPY = "give a file that holds its own numbers (h5copy makes one)"
