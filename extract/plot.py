"""Plots of feature grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gridcap.common.files import replacing
from gridcap.common.image import InvalidImageError, load_rgb
from gridcap.common.sources.registry import open_source
from gridcap.common.store.reader import FeatureStore
from gridcap.extract.describe import sample_rows

MAX_LABEL = 26  # characters
PHOTO_SIZE = 480  # pixels


def plot_grids(store: FeatureStore, path: Path, images: Path | None = None, count: int = 6) -> tuple[int, int]:
    """Plot the grids of some images: the mean over the channels, and the first three principal components.

    The principal components of the cells of the plotted images are shown as red, green, and blue: cells of similar
    color have similar features.

    Args:
        store: the store.
        path: the picture, .png or another format of matplotlib.
        images: image folder, to show the photos.
        count: maximum number of images.

    Returns:
        Number of images plotted, and how many of their photos cannot be shown and are gray.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sample_rows(store, count)
    shape = store.grid_shape if len(store.grid_shape) == 3 else (1, 1, store.grid_shape[-1])
    unreadable = 0
    grids = store[rows].astype(np.float32).reshape(len(rows), *shape)
    columns = ["photo", "mean over channels", "principal components"][0 if images else 1 :]
    figure = Figure(figsize=(2.2 * len(columns), 2.3 * len(rows) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_2d(figure.subplots(len(rows), len(columns), squeeze=False))
    for line, row, grid, colors in zip(axes, rows, grids, _principal_colors(grids), strict=True):
        name = store.file_name[int(row)]
        photo = [] if images is None else [_load_photo(images, name)]
        unreadable += any(each is None for each in photo)
        photo = [np.full((1, 1, 3), 200, np.uint8) if each is None else each for each in photo]
        for axis, picture in zip(line, [*photo, grid.mean(-1), colors], strict=True):
            axis.imshow(picture, cmap="magma", interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        label = Path(name).name
        label = label if len(label) <= MAX_LABEL else f"…{label[1 - MAX_LABEL :]}"
        line[0].set_ylabel(label, fontsize=7, parse_math=False)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".").lower() or "png", dpi=120, facecolor="white")
    return len(rows), unreadable


def _load_photo(images: Path, name: str) -> np.ndarray | None:
    """Load a photo at reduced size; None if it is missing or invalid."""
    try:
        photo = load_rgb(open_source(images, follow_links=True).locate(name))
    except InvalidImageError:
        return None
    photo.thumbnail((PHOTO_SIZE, PHOTO_SIZE))
    return np.asarray(photo)


def _principal_colors(grids: np.ndarray) -> np.ndarray:
    """Map cells (m, rows, columns, channels) to the colors of their principal components (m, rows, columns, 3)."""
    cells = grids.reshape(-1, grids.shape[-1])
    left, sizes, _ = np.linalg.svd(cells - cells.mean(0), full_matrices=False)
    components = (left * sizes)[:, :3]
    components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))
    low, high = np.percentile(components, [2, 98], axis=0)
    scaled = ((components - low) / np.where(high > low, high - low, 1)).clip(0, 1)
    return np.asarray(scaled.reshape(*grids.shape[:-1], 3))
