"""Opening of features written by other programs.

Supported sources:

    folder of .npy        TensorFlow's tutorial: `name.jpg.npy`
    folder of .npz        bottom-up attention: `<image id>.npz`, the array is named `feat` or the only one
    .pkl, .pickle         a dict of file name or image id -> array; only NumPy arrays and plain containers are
                          unpickled, so no code in the file is executed; loaded into memory as a whole, because a
                          pickle cannot be read piece by piece
    .h5, .hdf5            one dataset per image: `<image id>`, `<image id>_grids`, or `<image id>_features`; or one
                          dataset `features` for all images, with `file_name` or `image_id`
    .npz                  the arrays `features`, `file_name` or `image_id`, and optionally `scale`, a factor
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gridcap.common.errors import GridcapError, PathError, UserError
from gridcap.common.files import sha256_of
from gridcap.common.resources import available_memory
from gridcap.common.store.hdf5 import check_self_contained
from gridcap.extract.importers.array_pickle import load_arrays
from gridcap.extract.importers.npz import open_npz
from gridcap.extract.importers.source import Source, SourceError, raise_system_error, reason_of, unique_keys

PICKLE_COPIES = 2  # the content of the file and the arrays, while it is loaded
DATASET_SUFFIXES = ("_grids", "_features")
CHUNK_CACHE_BYTES = 64 * 2**20  # images are read in the order of the captions file, and chunks may hold many rows
SUPPORTED_HINT = "use a folder of .npy or .npz files, a .pkl, a .npz, or an .h5 file; see gridcap import --help"


def open_source(
    path: Path, on_file: Callable[[int], object] = lambda _: None, notify: Callable[[str], None] = lambda _: None
) -> Source:
    """Detect the kind of a source and open it.

    Args:
        path: a folder or a file.
        on_file: called with 1 for each file of a folder when it has been hashed.
        notify: receives a warning before a pickle is loaded that probably does not fit into memory.

    Raises:
        PathError: the path does not exist.
        UserError: it is not a supported source.
        SourceError: the source is corrupted, has repeated keys, or is a pickle of more than arrays.
        GridcapError: the system cannot read the source.
        MemoryError: the source does not fit into memory.
    """
    if not path.exists():
        raise PathError(f"{path}: no such file or folder", SUPPORTED_HINT)
    try:
        if path.is_dir():
            return _open_folder(path, on_file)
        match path.suffix.lower():
            case ".pkl" | ".pickle":
                _warn_about_memory(path, notify)
                return _open_pickle(path)
            case ".npz":
                return _open_arrays(open_npz(path), path, "arrays in one .npz")
            case ".h5" | ".hdf5":
                return _open_hdf5(path)
    except GridcapError:
        raise
    except Exception as error:  # numpy, pickle, zipfile, and HDF5 raise many types for a corrupted file
        raise_system_error(error, str(path))
        raise SourceError(f"{path}: cannot be read: {reason_of(error)}", SUPPORTED_HINT) from error
    raise UserError(f"{path}: not a supported source of features", SUPPORTED_HINT)


def _open_folder(folder: Path, on_file: Callable[[int], object]) -> Source:
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".npy", ".npz") and p.is_file())
    if not files:
        raise UserError(f"{folder}: contains no .npy or .npz files", SUPPORTED_HINT)
    digest = hashlib.sha256()
    by_key: dict[str, Path] = {}
    for file in files:
        key = file.relative_to(folder).with_suffix("").as_posix()
        if key in by_key:
            raise SourceError(
                f"{folder}: {by_key[key].name} and {file.name} are for the same image", "keep one of them"
            )
        by_key[key] = file
        digest.update(f"{key}\0{sha256_of(file)}\n".encode())
        on_file(1)

    def read(key: str) -> np.ndarray:
        loaded = np.load(by_key[key], allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = loaded.files
            name = "feat" if "feat" in names else names[0] if len(names) == 1 else None
            if name is None:
                raise ValueError(f"contains {', '.join(names)}, but no array named feat")
            return np.asarray(loaded[name])

    return Source(list(by_key), read, f"folder of {files[0].suffix}", digest.hexdigest())


def _warn_about_memory(path: Path, notify: Callable[[str], None]) -> None:
    needed, available = PICKLE_COPIES * path.stat().st_size, available_memory()
    if available is not None and needed > available:
        notify(
            f"{path}: a pickle is loaded as a whole and needs about {needed / 1e9:.1f} GB of memory, of which "
            f"{available / 1e9:.1f} GB are available; .h5 and .npz files are read piece by piece"
        )


def _open_pickle(path: Path) -> Source:
    arrays = load_arrays(path)
    values = [np.asarray(value) for value in arrays.values()]
    positions = unique_keys(arrays)
    return Source(list(positions), lambda key: values[positions[key]], "pickled dict", sha256_of(path))


def _open_hdf5(path: Path) -> Source:
    file = h5py.File(path, "r", locking=False, rdcc_nbytes=CHUNK_CACHE_BYTES)
    check_self_contained(file, path)
    features = file.get("features")
    if isinstance(features, h5py.Dataset):  # stays open: it may be larger than memory
        names = {name: file[name][()] for name in ("file_name", "image_id", "scale") if name in file}
        return _open_arrays({"features": features, **names}, path, "arrays in one .h5")
    datasets: dict[str, str] = {}
    for name, item in file.items():
        if not isinstance(item, h5py.Dataset):
            continue
        key = next((name.removesuffix(s) for s in DATASET_SUFFIXES if name.endswith(s)), name)
        if key in datasets:
            raise SourceError(f"{path}: {datasets[key]} and {name} are for the same image", "keep one of them")
        datasets[key] = name
    if not datasets:
        raise UserError(f"{path}: contains neither a dataset named features nor one dataset per image", SUPPORTED_HINT)
    return Source(
        list(datasets), lambda key: np.asarray(file[datasets[key]][()]), "HDF5, one dataset per image", sha256_of(path)
    )


def _open_arrays(arrays: Mapping[str, Any], path: Path, kind: str) -> Source:
    """Open the features of all images in one array or HDF5 dataset, of which rows are read on demand."""
    names = next((arrays[name] for name in ("file_name", "image_id") if name in arrays), None)
    if "features" not in arrays or names is None:
        raise SourceError(
            f"{path}: contains {', '.join(arrays) or 'no arrays'}, but needs features, and file_name or image_id",
            "add the missing array to the file",
        )
    features, scale = arrays["features"], arrays.get("scale")
    if len(features) != len(names):
        raise SourceError(f"{path}: {len(features)} features, but {len(names)} names", "write one name per image")
    rows = unique_keys(names.tolist())

    def read(key: str) -> np.ndarray:
        row = np.asarray(features[rows[key]])
        return row if scale is None else row * np.asarray(scale, np.float32)

    return Source(list(rows), read, kind, sha256_of(path))
