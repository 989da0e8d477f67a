"""What is in a feature store, at a glance: numbers from a sample of its rows, and pictures of some grids."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gridcap.common.files import replacing
from gridcap.common.image import InvalidImageError, image_path, load_rgb
from gridcap.common.store.quantize import as_stored
from gridcap.common.store.reader import FeatureStore

SAMPLE = 256
_SEED = 0x1A5B


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds.

    Attributes:
        rows, shards, size: images, files, and bytes on the disk with the index.
        rejects: reason -> count.
        sampled: rows that the statistics below are from; valid ones, drawn by a fixed seed.
        low, mean, deviation, high: of all values of the sample.
        zeros: the share of values that are zero.
        silent: channels that are zero everywhere in the sample.
        norms: (smallest, mean, largest) Euclidean norm of a cell, over the sample.
        rounding: the error of 8 bits relative to the values, both as root mean squares: of a uint8 store what it
            has, of others what uint8 would bring (None if values are negative).
    """

    rows: int
    shards: int
    size: int
    rejects: Counter[str]
    sampled: int
    low: float
    mean: float
    deviation: float
    high: float
    zeros: float
    silent: int
    norms: tuple[float, float, float]
    rounding: float | None


def summarize_store(store: FeatureStore) -> StoreSummary:
    """Look at a store; reads at most SAMPLE rows of it."""
    rows = sample_rows(store, SAMPLE)
    total = squares = 0.0
    low, high, zeros = np.inf, -np.inf, 0
    heard = np.zeros(store.grid_shape[-1], bool)
    norms: list[np.ndarray] = []
    errors = 0.0
    for row in rows:
        grid = store[int(row)].astype(np.float64)
        total, squares = total + grid.sum(), squares + (grid**2).sum()
        low, high, zeros = min(low, grid.min()), max(high, grid.max()), zeros + int((grid == 0).sum())
        heard |= (grid != 0).reshape(-1, grid.shape[-1]).any(0)
        norms.append(np.linalg.norm(grid, axis=-1).reshape(-1))
        if low >= 0:
            errors += _squared_error(store, int(row), grid)
    count = max(1, len(rows) * int(np.prod(store.grid_shape)))
    cells = np.concatenate(norms) if norms else np.zeros(1)
    return StoreSummary(
        rows=len(store),
        shards=len(store.shard_paths),
        size=sum(path.stat().st_size for path in {store.path, *store.shard_paths}),
        rejects=Counter(store.invalid_reasons.values()),
        sampled=len(rows),
        low=float(low),
        mean=total / count,
        deviation=float(np.sqrt(max(0.0, squares / count - (total / count) ** 2))),
        high=float(high),
        zeros=zeros / count,
        silent=int((~heard).sum()),
        norms=(float(cells.min()), float(cells.mean()), float(cells.max())),
        rounding=float(np.sqrt(errors / squares)) if low >= 0 and squares else None,
    )


def describe(store: FeatureStore, found: StoreSummary) -> list[str]:
    """What an inspection found, in lines for the screen."""
    where, grid = store.provenance, " x ".join(map(str, store.grid_shape))
    weights = where["weights"]
    lines = [
        f"{store.path}: split {store.split or '?'}, {found.rows} images, {found.shards} shards, "
        f"{found.size / 2**30:.2f} GiB",
        f"  grids          {grid} (row, column, channel), {where['dtype']}, views: {', '.join(store.views)}",
        f"  from           {where['encoder']} {where['layer']}, weights {weights['name']} "
        f"(SHA-256 {str(weights['sha256'])[:12]})" + (", RANDOM: not for real captions" if weights["random"] else ""),
    ]
    for key in ("preprocessing", "versions"):
        lines.append(f"  {key:<14} " + ", ".join(f"{k} {v}" for k, v in where.get(key, {}).items()))
    arithmetic = [str(where["precision"])]
    arithmetic += ["compiled"] if where.get("compile") else []
    arithmetic += [f"{where['threads']} threads"] if where.get("threads") else []
    lines.append(f"  arithmetic     {', '.join(arithmetic)}")
    lines.append(f"  rejects        {found.rejects.total()} of {found.rows}")
    lines += [f"    {count:6d}  {reason}" for reason, count in found.rejects.most_common()]
    if not found.sampled:
        return [*lines, "  values         no valid row"]
    lines.append(
        f"  values         {found.low:.4g} to {found.high:.4g}, mean {found.mean:.4g}, "
        f"deviation {found.deviation:.4g}, {found.zeros:.1%} zeros, {found.silent} of {store.grid_shape[-1]} channels "
        f"silent ({found.sampled} images looked at)"
    )
    low, mean, high = found.norms
    lines.append(f"  cell norms     {low:.4g} to {high:.4g}, mean {mean:.4g}")
    if found.rounding is not None:
        verb = "costs" if store.stored_dtype == np.uint8 else "would cost"
        lines.append(f"  8 bits         uint8 {verb} an error of {found.rounding:.2%} of the values (root mean square)")
    return lines


def sample_rows(store: FeatureStore, count: int) -> np.ndarray:
    """At most `count` valid rows, drawn by a fixed seed, in order."""
    valid = np.flatnonzero(store.valid)
    if len(valid) <= count:
        return valid
    return np.sort(np.random.default_rng(_SEED).choice(valid, count, replace=False))


def _squared_error(store: FeatureStore, row: int, grid: np.ndarray) -> float:
    """The summed squared error of 8 bits: for a uint8 store from the width of its levels, else by trying."""
    if store.stored_dtype == np.uint8:
        scale = store.channel_scales(row).astype(np.float64)
        # Rounding to levels of this width errs by its 12th part, squared, on average; exact zeros do not err.
        return float((scale**2 / 12 * (grid != 0)).sum())
    narrow = as_stored(grid[None].astype(np.float16), np.dtype(np.uint8))[0]
    return float(((narrow.astype(np.float64) - grid) ** 2).sum())


def plot_grids(store: FeatureStore, path: Path, images: Path | None = None, count: int = 6) -> int:
    """Draw some images' grids: the mean over the channels, and the three directions in which cells differ most.

    The three are the first principal components of the drawn images' cells, shown as red, green and blue: cells of
    one color look alike to the encoder.

    Args:
        store: what to draw from.
        path: the picture, .png or another format of matplotlib.
        images: the image folder, to show the photos beside.
        count: how many images.

    Returns:
        How many were drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sample_rows(store, count)
    shape = store.grid_shape if len(store.grid_shape) == 3 else (1, 1, store.grid_shape[-1])
    grids = store[rows].astype(np.float32).reshape(len(rows), *shape)
    colors = _principal_colors(grids)
    columns = ["photo", "mean over channels", "3 main components"][0 if images else 1 :]
    figure = Figure(figsize=(2.2 * len(columns), 2.3 * len(rows) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_2d(figure.subplots(len(rows), len(columns), squeeze=False))
    for line, row, grid, color in zip(axes, rows, grids, colors, strict=True):
        shown = [grid.mean(-1), color]
        if images is not None:
            try:
                photo = load_rgb(image_path(images, store.file_name[int(row)], follow_links=True))
                photo.thumbnail((480, 480))
                shown.insert(0, np.asarray(photo))
            except InvalidImageError:
                shown.insert(0, np.full((1, 1, 3), 200, np.uint8))
        for axis, picture in zip(line, shown, strict=True):
            axis.imshow(picture, cmap="magma", interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        name = Path(store.file_name[int(row)]).name
        line[0].set_ylabel(name if len(name) <= 26 else f"…{name[-25:]}", fontsize=7, parse_math=False)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".").lower() or "png", dpi=120, facecolor="white")
    return len(rows)


def _principal_colors(grids: np.ndarray) -> np.ndarray:
    """(m, row, column, channel) -> (m, row, column, 3) in [0, 1]."""
    cells = grids.reshape(-1, grids.shape[-1])
    centred = cells - cells.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    parts = (left * sizes)[:, :3]
    parts = np.pad(parts, ((0, 0), (0, 3 - parts.shape[1])))
    low, high = np.percentile(parts, [2, 98], axis=0)
    scaled = ((parts - low) / np.where(high > low, high - low, 1)).clip(0, 1)
    return np.asarray(scaled.reshape(*grids.shape[:-1], 3))
