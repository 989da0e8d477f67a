"""HDF5 input: open files, read checked datasets, and reject data that is stored in other files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gridcap.common.errors import StoreError, first_line
from gridcap.common.store.header import FORMAT_VERSION, unsupported_version
from gridcap.common.store.system_error import store_error_from

# Raised by h5py, NumPy, and json for corrupted bytes, depending on which bytes are corrupted.
_CORRUPTION_ERRORS = (KeyError, ValueError, OSError, RuntimeError, OverflowError)
_RECREATE = "delete this file and create it again; gridcap verify --repair does so for a store of extract-features"
_COPY = "pass a file that contains its own data (h5copy creates one)"


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading.

    Raises:
        StoreError: the file is missing or is not an HDF5 file.
        StoreAccessError: the system could not open the file.
    """
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if error.errno:
            raise store_error_from(error, path) from error
        raise StoreError(
            f"{path}: not a readable HDF5 file",
            "pass a file written by extract-features; if it is one, it is corrupted: delete it and write it again",
        ) from error


@contextlib.contextmanager
def corruption_as_store_error(path: Path, kind: str = "HDF5 file", hint: str = _RECREATE) -> Iterator[None]:
    """Convert what HDF5 and the checks of this package raise for corrupted content to an error that names the file.

    Wrap only the reading of a file: a ValueError raised by anything else in the block would be called corruption.

    Raises:
        StoreError: the content is corrupted.
        StoreAccessError: the system could not read the file.
    """
    try:
        yield
    except _CORRUPTION_ERRORS as error:
        if isinstance(error, OSError) and error.errno:
            raise store_error_from(error, path) from error
        raise StoreError(f"{path}: corrupted {kind}: {first_line(error)}", hint) from error


def check_self_contained(file: h5py.File, path: Path, virtual: tuple[str, ...] = ()) -> None:
    """Reject soft and external links, external storage, and virtual datasets.

    Args:
        file: the open file.
        path: its path, for messages.
        virtual: name prefixes of datasets that may be virtual because gridcap does not read them.

    Raises:
        StoreError: a dataset is stored in another file, or the file is corrupted.
    """
    with corruption_as_store_error(path):
        for name in file:
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise StoreError(f"{path}: {name} is a link to another file or object", _COPY)
            item = file[name]
            if isinstance(item, h5py.Dataset) and (item.external or (item.is_virtual and not name.startswith(virtual))):
                raise StoreError(f"{path}: the data of {name} is stored in other files", _COPY)


def check_format(file: h5py.File, path: Path, formats: Sequence[str], virtual: tuple[str, ...] = ()) -> str:
    """Check the format, the version, and that the file is self-contained.

    Args:
        file: the open file.
        path: its path, for messages.
        formats: accepted formats.
        virtual: see `check_self_contained`.

    Returns:
        The format of the file.

    Raises:
        StoreError: another format, or data that is stored in other files.
        StoreAccessError: another format version.
    """
    with corruption_as_store_error(path):
        kind, version = read_attribute(file, "format", None), read_attribute(file, "version", None)
    if not isinstance(kind, str) or kind not in formats:
        raise StoreError(
            f"{path}: an HDF5 file, but not a gridcap feature store (format {kind!r})",
            "pass a file written by extract-features",
        )
    if not isinstance(version, (int, np.integer)) or version != FORMAT_VERSION:
        raise unsupported_version(path, int(version) if isinstance(version, np.integer) else version)
    check_self_contained(file, path, virtual)
    return kind


def read_attribute(file: h5py.File, name: str, *default: Any) -> Any:
    """Return an attribute of the file, or the default if one is given and the attribute is missing.

    Raises:
        KeyError: the attribute is missing and there is no default.
        ValueError: its type has no NumPy equivalent.
    """
    if default and name not in file.attrs:
        return default[0]
    try:
        return file.attrs[name]
    except TypeError as error:
        raise ValueError(f"attribute {name}: {error}") from error


def read_json_attribute(file: h5py.File, name: str) -> dict[str, Any]:
    """Return a JSON object that is stored as a text attribute.

    Raises:
        KeyError: the attribute is missing.
        ValueError: it is not a JSON object.
    """
    text = read_attribute(file, name)
    value = json.loads(text) if isinstance(text, str) else None
    if not isinstance(value, dict):
        raise ValueError(f"attribute {name} is not a JSON object")
    return value


def get_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset with a NumPy type and at least one axis.

    Raises:
        KeyError: the dataset is missing.
        ValueError: it is a group, has no NumPy type, has no axis, or is larger than its file.
    """
    item = file[name]
    if not isinstance(item, h5py.Dataset) or not item.shape:
        raise ValueError(f"{name} is not an array")
    try:
        size = item.size * item.dtype.itemsize
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
    if item.chunks is None and not item.is_virtual and size > file.id.get_filesize():
        raise ValueError(f"{name} is larger than its file")
    return item


def read_column(file: h5py.File, name: str, kinds: str) -> np.ndarray:
    """Read a one-dimensional dataset.

    Args:
        file: the open file.
        name: of the dataset.
        kinds: accepted NumPy kinds, such as "iu" for integers.

    Raises:
        KeyError: the dataset is missing.
        ValueError: it has another number of axes or another type.
    """
    column = get_dataset(file, name)
    if column.ndim != 1 or column.dtype.kind not in kinds:
        raise ValueError(f"{name} has type {column.dtype} and {column.ndim} axes")
    values: np.ndarray = column[:]
    return values


def read_texts(file: h5py.File, name: str) -> list[str]:
    """Read a one-dimensional dataset of UTF-8 strings.

    Raises:
        KeyError: the dataset is missing.
        ValueError: it is not a dataset of UTF-8 strings.
    """
    return [value.decode() if isinstance(value, bytes) else str(value) for value in read_column(file, name, "SO")]


def text_array(texts: Sequence[str], length: int = 1) -> np.ndarray:
    """Return texts as an array that h5py stores as fixed-length UTF-8 strings.

    Args:
        texts: any number of texts.
        length: minimum length in bytes; longer texts extend it.
    """
    encoded = [text.encode() for text in texts]
    length = max([length, *map(len, encoded)])
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", length))
