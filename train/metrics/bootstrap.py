"""Bootstrap confidence intervals of corpus metrics (Efron 1979; for BLEU, Koehn 2004).

The images are resampled with replacement, and every corpus metric is recomputed for each resample. The interval spans
the central 95% of the values. It covers the choice of the test images, not the randomness of training.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gridcap.train.metrics.sufficient import ImageStatistics

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0  # the same resamples for every evaluation of N images
_CHUNK = 1 << 22  # counts in memory at a time: 32 MiB

Interval = tuple[float, float]


def bootstrap_intervals(statistics: ImageStatistics) -> dict[str, Interval]:
    """Return the 95% confidence interval of every metric; none for fewer than two images."""
    if len(statistics) < 2:
        return {}
    return {name: interval_of(values) for name, values in bootstrap_metrics(statistics).items()}


def bootstrap_metrics(statistics: ImageStatistics) -> dict[str, np.ndarray]:
    """Compute every metric for each resample of the images.

    Two sets of statistics of the same images are resampled identically, so that their values are paired.

    Returns:
        metric -> (RESAMPLES,) float64.
    """
    parts = [statistics.metrics(counts) for counts in resample_counts(len(statistics))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def resample_counts(images: int) -> Iterator[np.ndarray]:
    """Yield (r, N) int64 arrays, RESAMPLES rows in total: the number of times that a resample contains each image."""
    rng = np.random.default_rng(SEED)
    size = max(1, _CHUNK // images)
    for start in range(0, RESAMPLES, size):
        rows = min(size, RESAMPLES - start)
        drawn = rng.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images)


def interval_of(values: np.ndarray) -> Interval:
    """Return the central 95% of bootstrap values, (R,)."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")  # may be inf
    return float(low), float(high)
