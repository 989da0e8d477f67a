"""Statistics of a feature store."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from gridcap.common.open_files import initial_open_file_limit
from gridcap.common.store.codecs import find_codec
from gridcap.common.store.reader import FeatureStore
from gridcap.common.text import escape_line, plural

MAX_SAMPLE = 256  # rows
_SEED = 0x1A5B


@dataclass(frozen=True)
class StoreSummary:
    """Contents of a store.

    Attributes:
        rows, shards, size: number of images and of shards; bytes of the shards and the index.
        invalid: reason -> number of invalid images.
        sampled: number of sampled valid rows, which the statistics below are computed from.
        minimum, mean, deviation, maximum: of all values.
        zeros: fraction of values that are zero.
        zero_channels: number of channels that are zero everywhere.
        norms: (minimum, mean, maximum) Euclidean norm of a cell.
        rounding: error of 8-bit quantization relative to the values, both as root mean squares: the actual error of a
            uint8 store, else the error that uint8 would have; None for negative values.
    """

    rows: int
    shards: int
    size: int
    invalid: Counter[str]
    sampled: int
    minimum: float
    mean: float
    deviation: float
    maximum: float
    zeros: float
    zero_channels: int
    norms: tuple[float, float, float]
    rounding: float | None


def summarize_store(store: FeatureStore) -> StoreSummary:
    """Compute statistics from at most `MAX_SAMPLE` rows."""
    rows = sample_rows(store, MAX_SAMPLE)
    total = squares = errors = 0.0
    minimum, maximum, zeros = np.inf, -np.inf, 0
    is_nonzero = np.zeros(store.grid_shape[-1], bool)
    norms: list[np.ndarray] = []
    for row in rows:
        grid = store[int(row)].astype(np.float64)
        total, squares = total + grid.sum(), squares + (grid**2).sum()
        minimum, maximum = min(minimum, grid.min()), max(maximum, grid.max())
        zeros += int((grid == 0).sum())
        is_nonzero |= (grid != 0).reshape(-1, grid.shape[-1]).any(0)
        norms.append(np.linalg.norm(grid, axis=-1).reshape(-1))
        if minimum >= 0:
            errors += _squared_error(store, int(row), grid)
    count = max(1, len(rows) * int(np.prod(store.grid_shape)))
    cells = np.concatenate(norms) if norms else np.zeros(1)
    return StoreSummary(
        rows=len(store),
        shards=len(store.shard_paths),
        size=sum(path.stat().st_size for path in {store.path, *store.shard_paths}),
        invalid=Counter(store.invalid_reasons.values()),
        sampled=len(rows),
        minimum=float(minimum),
        mean=total / count,
        deviation=float(np.sqrt(max(0.0, squares / count - (total / count) ** 2))),
        maximum=float(maximum),
        zeros=zeros / count,
        zero_channels=int((~is_nonzero).sum()),
        norms=(float(cells.min()), float(cells.mean()), float(cells.max())),
        rounding=float(np.sqrt(errors / squares)) if minimum >= 0 and squares else None,
    )


def describe(store: FeatureStore, summary: StoreSummary) -> list[str]:
    """Return a summary as lines for the terminal."""
    return [*_describe_source(store, summary), *_describe_values(store, summary)]


def _describe_source(store: FeatureStore, summary: StoreSummary) -> list[str]:
    source, grid = store.provenance, " x ".join(map(str, store.grid_shape))
    weights = source["weights"]
    lines = [
        f"{store.path}: split {store.split or '?'}, {plural(summary.rows, 'image')}, "
        f"{plural(summary.shards, 'shard')}, {summary.size / 2**30:.2f} GiB",
        f"  grids          {grid} (rows, columns, channels), {source['dtype']}, views: {', '.join(store.views)}",
        f"  encoder        {source['encoder']} {source['layer']}, weights {weights['name']} "
        f"(SHA-256 {str(weights['sha256'])[:12]})" + (", RANDOM: not for real captions" if weights["random"] else ""),
    ]
    for key in ("preprocessing", "versions"):
        lines.append(f"  {key:<14} " + ", ".join(f"{k} {v}" for k, v in source.get(key, {}).items()))
    arithmetic = [str(source["precision"])]
    arithmetic += ["compiled"] if source.get("compile") else []
    arithmetic += [plural(source["threads"], "thread")] if source.get("threads") else []
    lines.append(f"  arithmetic     {', '.join(arithmetic)}")
    lines.append(f"  invalid        {summary.invalid.total():,} of {plural(summary.rows, 'image')}")
    return lines + [f"    {count:6d}  {escape_line(reason)}" for reason, count in summary.invalid.most_common()]


def _describe_values(store: FeatureStore, summary: StoreSummary) -> list[str]:
    if not summary.sampled:
        return ["  values         no valid image"]
    minimum, mean, maximum = summary.norms
    lines = [
        f"  values         {summary.minimum:.4g} to {summary.maximum:.4g}, mean {summary.mean:.4g}, "
        f"standard deviation {summary.deviation:.4g}, {summary.zeros:.1%} zeros, "
        f"{summary.zero_channels} of {store.grid_shape[-1]} channels zero "
        f"(sample of {plural(summary.sampled, 'image')})",
        f"  cell norms     {minimum:.4g} to {maximum:.4g}, mean {mean:.4g}",
    ]
    if summary.rounding is not None:
        verb = "has" if store.codec.name == "uint8" else "would have"
        lines.append(f"  quantization   uint8 {verb} a relative error of {summary.rounding:.2%} (root mean square)")
    return lines


def file_limit_warning(store: FeatureStore) -> str | None:
    """Warn if the index's virtual dataset needs more open files than other programs may have.

    HDF5 then returns the fill value, NaN, for the rows of the files that it cannot open, without an error.
    """
    limit = initial_open_file_limit()  # FeatureStore has raised that of this process
    shards = len(store.shard_paths)
    if shards < limit:
        return None
    return (
        f"warning: {store.path}: the virtual dataset spans {plural(shards, 'file')}, but a process may open {limit}. "
        "Other programs that read it with h5py get NaN for valid images: raise the limit first (ulimit -n), read the "
        "shards directly, or use gridcap.FeatureStore, which is not affected."
    )


def sample_rows(store: FeatureStore, count: int) -> np.ndarray:
    """Return at most `count` valid rows, sampled with a fixed seed, in ascending order."""
    valid = np.flatnonzero(store.valid)
    if len(valid) <= count:
        return valid
    return np.sort(np.random.default_rng(_SEED).choice(valid, count, replace=False))


def _squared_error(store: FeatureStore, row: int, grid: np.ndarray) -> float:
    """Return the summed squared error of 8-bit quantization: estimated for a uint8 store, else measured."""
    if store.codec.name == "uint8":
        scale = store.channel_scales(row).astype(np.float64)
        # Rounding to steps of width s has a mean squared error of s^2 / 12; zeros are exact.
        return float((scale**2 / 12 * (grid != 0)).sum())
    quantized = find_codec("uint8").round_trip(grid[None].astype(np.float16))[0]
    return float(((quantized.astype(np.float64) - grid) ** 2).sum())
