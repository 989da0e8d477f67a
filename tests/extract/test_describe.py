"""Statistics and plots of a store agree with its rows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gridcap.common.store.reader import FeatureStore
from gridcap.extract.describe import describe, file_limit_warning, sample_rows, summarize_store
from gridcap.extract.plot import plot_grids
from gridcap.extract.store_cli import inspect_features
from tests.extract.cli_helpers import run


def test_statistics_are_computed_from_valid_rows(fake: Any, photos: Any, extracted: Any) -> None:
    job, _ = extracted(photos(9, invalid={3: "text"}), extract__shard_size=4)
    with FeatureStore(job.output) as store:
        summary = summarize_store(store)
        grids = store.rows([row for row in range(9) if row != 3]).astype(np.float64)
    assert (summary.rows, summary.shards, summary.sampled) == (9, 3, 8)
    assert summary.invalid == {"not an image": 1}
    assert summary.size == sum(p.stat().st_size for p in job.output.parent.rglob("*.h5"))
    assert (summary.minimum, summary.maximum) == (grids.min(), grids.max())
    np.testing.assert_allclose([summary.mean, summary.deviation], [grids.mean(), grids.std()], rtol=1e-6)
    norms = np.linalg.norm(grids, axis=-1)
    np.testing.assert_allclose(summary.norms, [norms.min(), norms.mean(), norms.max()], rtol=1e-6)
    assert (summary.zeros, summary.zero_channels) == (0, 0)


def test_the_estimated_quantization_error_is_close_to_the_measured_one(fake: Any, photos: Any, extracted: Any) -> None:
    """For a uint8 store the error is estimated from the scales; for others it is measured."""
    folder = photos(40)
    wide, _ = extracted(folder, folder.parent / "wide" / "s.h5", extract__dtype="float32")
    narrow, _ = extracted(folder, folder.parent / "narrow" / "s.h5", extract__dtype="uint8")
    with FeatureStore(wide.output) as one, FeatureStore(narrow.output) as two:
        simulated, estimated = summarize_store(one).rounding, summarize_store(two).rounding
        exact, stored = one.rows(range(40)).astype(np.float64), two.rows(range(40)).astype(np.float64)
    assert simulated is not None
    assert estimated is not None
    measured = np.sqrt(((stored - exact) ** 2).sum() / (exact**2).sum())
    np.testing.assert_allclose(simulated, measured, rtol=0.05)
    np.testing.assert_allclose(estimated, measured, rtol=0.5)


def test_a_store_of_invalid_images_only_can_be_summarized(fake: Any, photos: Any, extracted: Any) -> None:
    job, _ = extracted(photos(2, invalid={0: "x", 1: "x"}), data__max_invalid="100%")
    with FeatureStore(job.output) as store:
        summary = summarize_store(store)
    assert summary.sampled == 0
    assert summary.rounding is None


def test_item_26_a_reason_with_a_line_break_stays_on_one_line(fake: Any, photos: Any, extracted: Any) -> None:
    job, _ = extracted(photos(2))
    with FeatureStore(job.output) as store:
        summary = dataclasses.replace(summarize_store(store), invalid=Counter(["first\nsecond"]))
        assert r"         1  first\nsecond" in describe(store, summary)


def test_sampling_is_deterministic(fake: Any, photos: Any, extracted: Any) -> None:
    job, _ = extracted(photos(30, invalid={4: "x"}))
    with FeatureStore(job.output) as store:
        rows = sample_rows(store, 10).tolist()
        assert rows == sample_rows(store, 10).tolist() == sorted(set(rows))
        assert len(rows) == 10
        assert 4 not in rows


def test_item_20_photos_that_a_plot_cannot_show_are_counted(
    fake: Any, photos: Any, extracted: Any, tmp_path: Path
) -> None:
    folder = photos(4)
    job, _ = extracted(folder)
    (folder / "0001.png").unlink()
    (folder / "0002.png").write_bytes(b"not an image")
    plot = ("--plot", tmp_path / "a.png")
    result = run(job.output, *plot, "--images", folder, command=inspect_features)
    assert "WARNING: 2 photos of 4 missing or invalid" in result.stderr
    assert "WARNING" not in run(job.output, *plot, command=inspect_features).stderr
    result = run(job.output, "--plot", job.output / "a.png", command=inspect_features)
    assert (result.exit_code, result.stdout) == (1, ""), "an output that cannot be written is reported at the start"
    assert f"{job.output}" in result.stderr


@pytest.mark.parametrize("with_images", [False, True])
def test_a_plot_has_one_row_per_image(
    fake: Any, photos: Any, extracted: Any, tmp_path: Path, with_images: bool
) -> None:
    folder = photos(8)
    job, _ = extracted(folder)
    if with_images:
        (folder / "0000.png").unlink()  # a missing photo is shown as a gray pixel
    with FeatureStore(job.output) as store:
        assert plot_grids(store, tmp_path / "out.png", folder if with_images else None, count=3) == (3, 0)
        assert plot_grids(store, tmp_path / "all.png", count=100) == (8, 0)
    three, all_images = Image.open(tmp_path / "out.png"), Image.open(tmp_path / "all.png")
    assert all_images.height > 2 * three.height
    assert len(three.convert("RGB").getcolors(1 << 24)) > 20


def test_item_06_warning_if_other_programs_cannot_open_all_shards(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening the store raises the limit of this process, so the limit it was started with counts."""
    job, _ = extracted(photos(3), extract__shard_size=1)
    with FeatureStore(job.output) as store:
        assert file_limit_warning(store) is None
        monkeypatch.setattr("gridcap.extract.describe.initial_open_file_limit", lambda: 3)
        warning = file_limit_warning(store)
    assert warning is not None
    assert "spans 3 files" in warning
    assert "NaN" in warning
    assert "ulimit -n" in warning
