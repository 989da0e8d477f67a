"""Other people's features -> a feature store.

Known layouts:

    folder of .npy        TensorFlow's tutorial: `name.jpg.npy`, (64, 2048) or (8, 8, 2048)
    folder of .npz        bottom-up-attention style: `<image id>.npz`, the array under `feat` (or the only one)
    .pkl, .pickle         a dict: file name or image id -> array; nothing but numpy arrays and plain containers is
                          ever unpickled, so no code in the file can run
    .h5, .hdf5            a dataset an image: `<image id>`, `<image id>_grids`, `<image id>_features`; or one
                          dataset `features` of all images beside `file_name` or `image_id`
    .npz                  the arrays `features` and `file_name` or `image_id`, and maybe a `scale` to multiply by

A grid is (row, column, channel); (P, channel) with a square P is made one, and a pooled (channel,) becomes 1 x 1.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import h5py
import numpy as np

from gridcap.common.captions.records import ImageRecord, id_from_name
from gridcap.common.errors import GridcapError, StoreError, UserError, first_line
from gridcap.common.files import sha256_of
from gridcap.common.store.hdf5 import check_self_contained
from gridcap.common.store.shard_format import ORIGINAL
from gridcap.common.store.shard_writer import InvalidGridError
from gridcap.extract.importers.array_pickle import load_arrays
from gridcap.extract.manifest import ImageList
from gridcap.extract.plan import Plan, shard_writer, store_folder, write_planned_index
from gridcap.extract.planning import PlanRequest, load_or_create_plan

_SUFFIXES = ("_grids", "_features")
_ID = re.compile("[0-9]{1,18}")  # which 64 bits can hold
_KNOWN = "a folder of .npy or .npz, a .pkl, a .npz, or an .h5 file: see import-features --help"


@dataclass(frozen=True)
class Source:
    """Features of other origin.

    Attributes:
        keys: a name an image: a file name or an image id, as the source has it.
        read: key -> array of any float or integer type.
        layout: which of the known layouts.
        sha256: of the file, or of the names and contents of a folder's files.
    """

    keys: list[str]
    read: Callable[[str], np.ndarray]
    layout: str
    sha256: str


def open_source(path: Path, on_file: Callable[[int], object] = lambda _: None) -> Source:
    """Recognise a layout and open it.

    Args:
        path: a folder or a file.
        on_file: called with 1 for each file of a folder as it is hashed.

    Raises:
        UserError: missing, of no known layout, damaged, or a pickle that holds more than arrays.
    """
    try:
        if path.is_dir():
            return _open_folder(path, on_file)
        if path.suffix.lower() in (".pkl", ".pickle"):
            return _of_mapping(load_arrays(path), "pickled dict", sha256_of(path))
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return _open_arrays({name: arrays[name] for name in arrays.files}, path, "arrays in one .npz")
        if path.suffix.lower() in (".h5", ".hdf5"):
            return _open_hdf5(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file or folder", f"give {_KNOWN}") from error
    except GridcapError:
        raise
    except Exception as error:  # numpy, pickle, zipfile and HDF5 raise whatever a damaged file leads them to
        raise UserError(f"{path}: cannot be read: {_reason(error)}", f"give {_KNOWN}") from error
    raise UserError(f"{path}: no known layout of features", f"give {_KNOWN}")


def _reason(error: Exception) -> str:
    said = first_line(error)[:200]
    return said if isinstance(error, (OSError, ValueError, UnpicklingError)) else f"{type(error).__name__}: {said}"


def _open_folder(folder: Path, on_file: Callable[[int], object]) -> Source:
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".npy", ".npz") and p.is_file())
    if not files:
        raise UserError(f"{folder}: holds no .npy or .npz files", f"give {_KNOWN}")
    digest = hashlib.sha256()
    by_key: dict[str, Path] = {}
    for file in files:
        key = file.relative_to(folder).with_suffix("").as_posix()
        if key in by_key:
            raise UserError(f"{file}: stands beside {by_key[key].name}, for the same image", "keep one of them")
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
                raise ValueError(f"holds {', '.join(names)}, and none is called feat")
            return np.asarray(loaded[name])

    return Source(list(by_key), read, f"folder of {files[0].suffix}", digest.hexdigest())


def _open_hdf5(path: Path) -> Source:
    file = h5py.File(path, "r", locking=False)
    check_self_contained(file, path)
    if isinstance(file.get("features"), h5py.Dataset):
        with file:
            names = {name: file[name] for name in ("features", "file_name", "image_id", "scale") if name in file}
            return _open_arrays({name: data[()] for name, data in names.items()}, path, "arrays in one .h5")
    keys: dict[str, str] = {}
    for name, item in file.items():
        if isinstance(item, h5py.Dataset):
            suffix = next((s for s in _SUFFIXES if name.endswith(s)), "")
            keys[name[: len(name) - len(suffix)] if suffix else name] = name
    if not keys:
        raise UserError(f"{path}: holds neither a dataset called features nor one dataset an image", f"give {_KNOWN}")
    return Source(list(keys), lambda key: np.asarray(file[keys[key]][()]), "HDF5, a key an image", sha256_of(path))


def _open_arrays(arrays: Mapping[str, np.ndarray], path: Path, layout: str) -> Source:
    names = next((arrays[name] for name in ("file_name", "image_id") if name in arrays), None)
    if "features" not in arrays or names is None:
        raise UserError(
            f"{path}: holds {', '.join(arrays) or 'nothing'}; needed are features, and file_name or image_id",
            "write them beside each other",
        )
    features, scale = arrays["features"], arrays.get("scale")
    if len(features) != len(names):
        raise UserError(f"{path}: {len(features)} features and {len(names)} names", "they must be as many")
    rows = {n.decode() if isinstance(n, bytes) else str(n): i for i, n in enumerate(names.tolist())}

    def read(key: str) -> np.ndarray:
        row: np.ndarray = features[rows[key]]
        return row if scale is None else row * np.asarray(scale, np.float32)

    return Source(list(rows), read, layout, sha256_of(path))


def _of_mapping(values: Mapping[Any, Any], layout: str, sha256: str) -> Source:
    arrays = {str(key): np.asarray(value) for key, value in values.items()}
    return Source(list(arrays), arrays.__getitem__, layout, sha256)


def as_grid(array: np.ndarray) -> np.ndarray:
    """Any of the known shapes as (row, column, channel).

    Raises:
        ValueError: another number of axes, or cells that form no square.
    """
    if array.dtype.kind not in "fiu":
        raise ValueError(f"holds {array.dtype}, not numbers")
    if array.ndim == 3:
        return array
    if array.ndim == 1:
        return array[None, None]
    if array.ndim == 2 and math.isqrt(len(array)) ** 2 == len(array):
        side = math.isqrt(len(array))
        return array.reshape(side, side, -1)
    raise ValueError(
        f"has the shape {array.shape}, which is no grid: (row, column, channel), (cells, channel), (channel,)"
    )


def _id_of(key: str) -> int:
    """The image id that a key is, or one made from it."""
    return int(key) if _ID.fullmatch(key) else id_from_name(key)


def match_keys(source: Source, records: Sequence[ImageRecord] | None) -> list[tuple[ImageRecord, str]]:
    """Pair images with keys of the source: by file name, its last part, its stem, or the image id.

    Args:
        source: the features.
        records: images of a captions file, whose order is kept; None takes every key as an image of its own.

    Raises:
        UserError: no image of the captions file is in the source.
    """
    if records is None:
        return [(ImageRecord(_id_of(key), key), key) for key in source.keys]
    names: dict[str, str] = {}
    for key in source.keys:
        for alias in (Path(key).stem, Path(key).name, key):
            names[alias] = key
        if _ID.fullmatch(key):
            names[str(int(key))] = key
    pairs = []
    for record in records:
        path = Path(record.file_name)
        candidates = (record.file_name, path.name, path.stem, str(record.image_id))
        found = next((names[c] for c in candidates if c in names), None)
        if found is not None:
            pairs.append((record, found))
    if not pairs:
        raise UserError(
            f"none of the {len(records)} images of the captions file is among the {len(source.keys)} features "
            f"({records[0].file_name} against {source.keys[0]})",
            "give the captions file that these features belong to",
        )
    return pairs


def import_features(
    source: Source,
    name: str,
    pairs: Sequence[tuple[ImageRecord, str]],
    output: Path,
    split: str,
    dtype: str,
    shard_size: int,
    on_row: Callable[[int], object] = lambda _: None,
) -> int:
    """Write the store.

    Args:
        source, pairs: from `open_source` and `match_keys`.
        name: what to call the source in the provenance.
        output: the index file.
        split: name of the split.
        dtype: "float16", "float32" or "uint8".
        shard_size: images in a shard.
        on_row: called with 1 after each image.

    Returns:
        How many images.

    Raises:
        UserError: an array is no grid or its shape is not that of the first.
        StoreError: a value that the stored type cannot hold.
    """
    loaded_as = "float32" if dtype == "uint8" else dtype  # the writer makes the 8 bits
    first_grid = read_grid(source, pairs[0][1], loaded_as, None)
    provenance = {
        "encoder": "imported",
        "layer": source.layout,
        "weights": {"name": name, "sha256": source.sha256, "random": False},
        "preprocessing": {"resize_mode": "unknown"},
        "grid_shape": list(first_grid.shape),
        "dtype": dtype,
        "precision": "unknown",
        "views": [ORIGINAL],
        "versions": {"numpy": np.__version__},
    }
    folder = store_folder(output)
    images = [(record.image_id, record.file_name) for record, _ in pairs]
    wanted = Plan(split, shard_size, 1, provenance, (ImageList.from_images(images, shard_size),))
    plan = load_or_create_plan(PlanRequest(wanted, images, folder))
    for shard in range(plan.shards):
        first = plan.rows_of(shard).start
        with shard_writer(folder, plan, shard) as writer:
            for row in plan.rows_of(shard):
                grid = read_grid(source, pairs[row][1], loaded_as, first_grid.shape)
                try:
                    writer.write(row - first, grid[None], {})
                except InvalidGridError as error:
                    raise StoreError(str(error), "import with --dtype float32") from error
                on_row(1)
            writer.finish()
    write_planned_index(output, plan)
    return plan.images


def read_grid(source: Source, key: str, dtype: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """One image's grid.

    Args:
        dtype: of the result.
        shape: that it must have, or None.

    Returns:
        (row, column, channel), contiguous.

    Raises:
        UserError: unreadable, no grid, or of another shape.
    """
    try:
        with np.errstate(over="ignore"):
            grid = np.ascontiguousarray(as_grid(source.read(key)), dtype)
        if shape is not None and grid.shape != shape:
            raise ValueError(f"has the shape {grid.shape}, and the first has {shape}")
    except Exception as error:  # as in open_source
        raise UserError(
            f"{key}: {_reason(error)}", "every image needs an array of numbers of one and the same shape"
        ) from error
    return grid
