"""Helpers for tests of extraction: compare a store with the images it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gridcap.common.captions.images import list_images
from gridcap.common.store.reader import FeatureStore


def right_grids(fake: Any, folder: Path, dtype: str = "float16") -> np.ndarray:
    """Encode the images one by one; they are 16 x 16, so nothing is resized."""
    names = [record.file_name for record in list_images(folder).records]
    return np.concatenate([fake.grids(np.asarray(Image.open(folder / name))) for name in names]).astype(dtype)


def assert_matches_photos(fake: Any, folder: Path, index: Path, invalid: dict[int, str] | None = None) -> None:
    """Compare a store, row by row, with its image folder."""
    invalid = invalid or {}
    records = list_images(folder).records
    with FeatureStore(index) as store:
        assert store.file_name == [r.file_name for r in records]
        assert store.image_id.tolist() == [r.image_id for r in records]
        assert store.invalid_reasons == invalid
        assert (~store.valid).nonzero()[0].tolist() == sorted(invalid)
        grids = store.rows(range(len(store)), allow_invalid=True)
    for row, record in enumerate(records):
        if row in invalid:
            assert np.isnan(grids[row]).all()
        else:
            expected = fake.grids(np.asarray(Image.open(folder / record.file_name)))[0].astype(grids.dtype)
            assert grids[row].tobytes() == expected.tobytes(), record.file_name


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def shards_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("[0-9]*.h5"))


def no_temporaries(features: Path) -> bool:
    return not [p for p in features.rglob(".*") if p.name.endswith(".tmp")]


def expected_grids(fake: Any, folder: Path, flip: bool = False) -> np.ndarray:
    """Encode the images of a folder in the order of their names."""
    images = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    return np.concatenate([fake.grids(np.ascontiguousarray(p[:, ::-1] if flip else p)) for p in images])


def write_image(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
