"""inspect-features: its numbers are those of the rows, and its picture shows what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gridcap.common.store.reader import FeatureStore
from gridcap.extract.describe import plot_grids, sample_rows, summarize_store


def test_the_numbers_are_those_of_the_valid_rows(fake: Any, photos: Any, extracted: Any) -> None:
    job, _ = extracted(photos(9, bad={3: "text"}), extract__shard_size=4)
    with FeatureStore(job.output) as store:
        found = summarize_store(store)
        grids = store.rows([row for row in range(9) if row != 3]).astype(np.float64)
    assert (found.rows, found.shards, found.sampled) == (9, 3, 8)
    assert found.rejects == {"not an image": 1}
    assert found.size == sum(p.stat().st_size for p in job.output.parent.rglob("*.h5"))
    assert (found.low, found.high) == (grids.min(), grids.max())
    np.testing.assert_allclose([found.mean, found.deviation], [grids.mean(), grids.std()], rtol=1e-6)
    norms = np.linalg.norm(grids, axis=-1)
    np.testing.assert_allclose(found.norms, [norms.min(), norms.mean(), norms.max()], rtol=1e-6)
    assert (found.zeros, found.silent) == (0, 0)


def test_the_error_of_eight_bits_is_told_before_and_after(fake: Any, photos: Any, extracted: Any) -> None:
    """The estimate for a uint8 store, from its scales alone, is near what trying it on float16 gives."""
    folder = photos(40)
    wide, _ = extracted(folder, folder.parent / "wide" / "s.h5", extract__dtype="float32")
    narrow, _ = extracted(folder, folder.parent / "narrow" / "s.h5", extract__dtype="uint8")
    with FeatureStore(wide.output) as one, FeatureStore(narrow.output) as two:
        tried, estimated = summarize_store(one).rounding, summarize_store(two).rounding
        exact, stored = one.rows(range(40)).astype(np.float64), two.rows(range(40)).astype(np.float64)
    assert tried is not None
    assert estimated is not None
    measured = np.sqrt(((stored - exact) ** 2).sum() / (exact**2).sum())
    np.testing.assert_allclose(tried, measured, rtol=0.05)
    np.testing.assert_allclose(estimated, measured, rtol=0.5)


def test_a_store_of_rejects_alone_is_no_error(fake: Any, photos: Any, extracted: Any) -> None:
    job, _ = extracted(photos(2, bad={0: "x", 1: "x"}), data__max_invalid="100%")
    with FeatureStore(job.output) as store:
        found = summarize_store(store)
    assert found.sampled == 0
    assert found.rounding is None


def test_a_large_store_is_sampled_the_same_way_each_time(fake: Any, photos: Any, extracted: Any) -> None:
    job, _ = extracted(photos(30, bad={4: "x"}))
    with FeatureStore(job.output) as store:
        rows = sample_rows(store, 10).tolist()
        assert rows == sample_rows(store, 10).tolist() == sorted(set(rows))
        assert len(rows) == 10
        assert 4 not in rows


@pytest.mark.parametrize("with_images", [False, True])
def test_the_picture_has_a_line_for_each_image(
    fake: Any, photos: Any, extracted: Any, tmp_path: Path, with_images: bool
) -> None:
    folder = photos(8)
    job, _ = extracted(folder)
    if with_images:
        (folder / "0000.png").unlink()  # a photo that is gone leaves its place empty
    with FeatureStore(job.output) as store:
        assert plot_grids(store, tmp_path / "out.png", folder if with_images else None, count=3) == 3
        assert plot_grids(store, tmp_path / "all.png", count=100) == 8
    one, every = Image.open(tmp_path / "out.png"), Image.open(tmp_path / "all.png")
    assert every.height > 2 * one.height
    assert len(one.convert("RGB").getcolors(1 << 24)) > 20
