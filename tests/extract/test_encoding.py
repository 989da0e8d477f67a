"""Views and uint8 features."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gridcap.common.captions.images import list_images
from gridcap.common.image import load_views
from gridcap.common.image.views import select_view
from gridcap.common.store.codecs import find_codec
from gridcap.common.store.reader import FeatureStore
from gridcap.extract.run import extract_features
from tests.extract.store_helpers import contents, expected_grids


def test_the_mirrored_view_is_the_grid_of_the_mirrored_image(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(7)
    job, _ = extracted(folder, extract__views="original,hflip", extract__shard_size=3, extract__batch_size=2)
    with FeatureStore(job.output) as store:
        assert store.views == ("original", "hflip")
        np.testing.assert_array_equal(store.rows(range(7)), expected_grids(fake, folder).astype("f2"))
        mirrored = expected_grids(fake, folder, flip=True).astype("f2")
        np.testing.assert_array_equal(store.rows(range(7), views=[1] * 7), mirrored)
        np.testing.assert_array_equal(store.rows([5], views="hflip")[0], mirrored[5])
        mixed = store.rows([4, 4, 2], views=np.array([1, 0, 1]))
        np.testing.assert_array_equal(mixed, [mirrored[4], store[4], mirrored[2]])


def test_crops_are_stored_and_resume_with_the_same_bytes(
    fake: Any, photos: Any, job: Any, extracted: Any, tmp_path: Path
) -> None:
    folder, views = photos(7, invalid={4: "text"}), "original,hflip,five-crop-2,random-crop:2"
    keys = {"extract__shard_size": 3, "extract__batch_size": 2, "extract__views": views}
    extraction, _ = extracted(folder, **keys)
    names = ("original", "hflip", "five-crop-2", "random-crop-1", "random-crop-2")
    squares = load_views(
        folder / "0003.png", 16, "stretch", True, [select_view(name) for name in names[2:]], "0003.png"
    )
    pixels = [squares[0], squares[0][:, ::-1], *squares[1:]]
    with FeatureStore(extraction.output) as store:
        assert store.views == names
        for view, image in zip(names, pixels, strict=True):
            np.testing.assert_array_equal(store.rows([3], views=view)[0], fake.grids(image)[0].astype("f2"), view)
    before = contents(extraction.folder)
    (extraction.folder / "00001.h5").unlink()
    extract_features(job(folder, **keys), show_progress=False)
    assert contents(extraction.folder) == before


def test_a_retried_image_gets_all_of_its_views(fake: Any, photos: Any, job: Any, tmp_path: Path) -> None:
    folder = photos(5, invalid={3: "text"})
    keys = {"extract__views": "original,hflip,random-crop:2", "extract__batch_size": 2, "data__max_invalid": "50%"}
    extraction = job(folder, **keys)
    extract_features(extraction, show_progress=False)
    shutil.copy(folder / "0002.png", folder / "0003.png")
    assert extract_features(extraction, show_progress=False, retry=True).retried == 1
    fresh = job(folder, tmp_path / "fresh" / "s.h5", **keys)
    extract_features(fresh, show_progress=False)
    assert contents(extraction.folder) == contents(fresh.folder)


def test_a_view_that_is_not_stored_is_an_error(fake: Any, photos: Any, extracted: Any) -> None:
    job, _ = extracted(photos(2))
    with FeatureStore(job.output) as store, pytest.raises(IndexError):
        store.rows([0], views=[1])


def test_an_invalid_image_is_invalid_in_every_view(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(5, invalid={2: "text"})
    job, _ = extracted(folder, extract__views="original,hflip", extract__shard_size=3)
    with FeatureStore(job.output) as store:
        assert list(store.invalid_reasons) == [2]
        assert np.isnan(store.rows([2], allow_invalid=True)).all()
        assert np.isnan(store.rows([2], views="hflip", allow_invalid=True)).all()
        assert not np.isnan(store.rows([3], views="hflip")[0]).any()


# uint8


def test_uint8_features_are_read_as_they_were_quantized(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(5, invalid={1: "text"})
    job, _ = extracted(folder, extract__dtype="uint8", extract__shard_size=2, extract__views="original,hflip")
    exact = expected_without(fake, folder, 1)
    with FeatureStore(job.output) as store:
        assert store.dtype == np.float16
        got = store.rows([0, 2, 3, 4])
        np.testing.assert_array_equal(got, find_codec("uint8").round_trip(exact.astype("f2")))
        assert np.abs(got - exact).max() <= 0.6 * exact.max() / 255
        assert np.isnan(store.rows([1], allow_invalid=True)).all()
        assert np.isnan(store.rows([1], views="hflip", allow_invalid=True)).all()


def expected_without(fake: Any, folder: Path, row: int) -> np.ndarray:
    names = [r.file_name for i, r in enumerate(list_images(folder).records) if i != row]
    return np.concatenate([fake.grids(np.asarray(Image.open(folder / name))) for name in names])
