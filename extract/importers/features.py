"""Import of features written by other programs into a feature store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gridcap.common.lease import exclusive_folder
from gridcap.common.store.codecs import codec_versions, find_codec
from gridcap.common.store.shard_format import ORIGINAL
from gridcap.common.store.shard_writer import InvalidGridError
from gridcap.extract.importers.layout import Layout, LayoutError, as_grid
from gridcap.extract.importers.matching import Pair
from gridcap.extract.importers.source import Source, SourceError, raise_system_error, reason_of
from gridcap.extract.manifest import ImageList
from gridcap.extract.plan import Plan, check_plan_on_disk, shard_writer, store_folder, write_planned_index
from gridcap.extract.planning import PlanRequest, load_or_create_plan


@dataclass(frozen=True)
class ImportRequest:
    """Features to import, and the format to store them in.

    Attributes:
        source: the features, from `open_source`.
        pairs: the images and their keys, from `match_keys`.
        name: name of the source in the provenance.
        output: index file of the store.
        split: name of the split.
        dtype: name of a codec, see `common.store.codecs`.
        shard_size: images per shard.
        layout: axes of the arrays; None: by the number of axes.
    """

    source: Source
    pairs: Sequence[Pair]
    name: str
    output: Path
    split: str
    dtype: str = "float16"
    shard_size: int = 1024
    layout: Layout | None = None

    def provenance(self, grid_shape: tuple[int, ...]) -> dict[str, Any]:
        """Return the provenance of the imported grids."""
        preprocessing = {"resize_mode": "unknown"} | ({"layout": self.layout} if self.layout else {})
        return {
            "encoder": "imported",
            "layer": self.source.kind,
            "weights": {"name": self.name, "sha256": self.source.sha256, "random": False},
            "preprocessing": preprocessing,
            "grid_shape": list(grid_shape),
            "dtype": self.dtype,
            "precision": "unknown",
            "views": [ORIGINAL],
            "versions": {"numpy": np.__version__, **codec_versions(find_codec(self.dtype))},
        }


def import_features(
    request: ImportRequest,
    on_row: Callable[[int], object] = lambda _: None,
    notify: Callable[[str], None] = lambda _: None,
) -> int:
    """Write a feature store. An interrupted import resumes: complete shards are not written again.

    Args:
        request: the features and their format.
        on_row: called with the number of images that have just been stored.
        notify: receives a message if an import that has ended without releasing the folder is taken over.

    Returns:
        Number of images.

    Raises:
        SourceError: an array cannot be read, is not a grid, has another shape than the first, or contains NaN or
            values out of the range of the dtype.
        MismatchError: the output contains other features.
        FolderInUseError: another process imports into the same output.
        GridcapError: the system cannot read the features.
    """
    pairs, folder = request.pairs, store_folder(request.output)
    grid_shape = read_grid(request, pairs[0][1], None).shape
    images = [(record.image_id, record.file_name) for record, _ in pairs]
    image_list = ImageList.from_images(images, request.shard_size)
    requested = Plan(request.split, request.shard_size, 1, request.provenance(grid_shape), (image_list,))
    with exclusive_folder(folder, notify):
        plan = load_or_create_plan(PlanRequest(requested, images, folder, replace_empty=not request.output.exists()))
        existing = set(plan.existing_shards(folder))
        for shard in range(plan.shards):
            if shard in existing:
                on_row(len(plan.rows_of(shard)))
            else:
                _write_shard(request, plan, shard, on_row)
        write_planned_index(request.output, plan)
    return plan.images


def _write_shard(request: ImportRequest, plan: Plan, shard: int, on_row: Callable[[int], object]) -> None:
    """Import the images of one shard."""
    folder, rows = store_folder(request.output), plan.rows_of(shard)
    grid_shape = tuple(plan.provenance["grid_shape"])
    with shard_writer(folder, plan, shard) as writer:
        for row in rows:
            grid = read_grid(request, request.pairs[row][1], grid_shape)
            try:
                writer.write(row - rows.start, grid[None], {})
            except InvalidGridError as error:
                raise SourceError(str(error), _range_hint(request.dtype)) from error
            on_row(1)
        check_plan_on_disk(plan, shard, folder)
        writer.finish()


def _range_hint(dtype: str) -> str:
    codec = find_codec(dtype)
    if codec.stored == np.float32:
        return "scale the features of this image down: no supported dtype has a larger range"
    other = "float32" if codec.stored == np.float16 else "float16 or float32"
    return f"pass --dtype {other}; if some shards have been written, choose another --output as well"


def read_grid(request: ImportRequest, key: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """Read the grid of one image.

    Args:
        request: source, dtype, and layout.
        key: key of the image.
        shape: required shape; None accepts any.

    Returns:
        (rows, columns, channels), contiguous, in the dtype that the shard writer takes.

    Raises:
        SourceError: the array is corrupted, is not a grid, has another shape, or contains NaN or infinity.
        GridcapError: the system cannot read the array.
    """
    try:
        array = request.source.read(key)
    except Exception as error:  # numpy, zipfile, and HDF5 raise many types for a corrupted file
        raise_system_error(error, f"{request.name}: {key}")
        raise SourceError(f"{key}: {reason_of(error)}", "extract the features of this image again") from error
    try:
        grid = as_grid(array, request.layout)
    except LayoutError as error:
        raise SourceError(f"{key}: {error}", error.hint) from error
    if shape is not None and grid.shape != shape:
        raise SourceError(
            f"{key}: has the shape {grid.shape}, but the first image has {shape}",
            "import grids of one shape; adaptive region features (10 to 100 regions per image) are not supported",
        )
    if not np.isfinite(grid).all():
        raise SourceError(
            f"{key}: contains NaN or infinity",
            "extract the features of this image again, or remove it from the source",
        )
    with np.errstate(over="ignore"):  # the writer reports values out of range
        return np.ascontiguousarray(grid, "float32" if request.dtype == "uint8" else find_codec(request.dtype).stored)
