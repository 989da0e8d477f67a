"""Extraction from archives: the same store as from a folder."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gridcap.common.store.reader import FeatureStore
from tests.extract.cli_helpers import RANDOM, fails, run


def pack(kind: str, photos: Path, path: Path) -> Path:
    files = sorted(photos.iterdir())
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in reversed(files):
                archive.write(file, file.name)
    elif kind == "tar":
        with tarfile.open(path, "w") as tar:
            for file in files:
                tar.add(file, file.name)
    else:
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        pq.write_table(pa.table({"image": images}), path)
    return path


@pytest.mark.parametrize("kind", ["zip", "tar", "parquet"])
def test_an_archive_gives_the_same_store_as_a_folder(fake: Any, photos: Any, tmp_path: Path, kind: str) -> None:
    folder = photos(7, invalid={3: "not an image"})
    archive = pack(kind, folder, tmp_path / f"archive.{kind}")
    sizes = ("--shard-size", "3", "--allow-invalid", "--max-invalid", "50%")
    assert run("--images", folder, "--output", tmp_path / "folder.h5", *sizes, *RANDOM).exit_code == 0
    result = run("--images", archive, *sizes, *RANDOM)
    assert result.exit_code == 0, result.output
    with FeatureStore(tmp_path / "folder.h5") as one, FeatureStore(tmp_path / "features" / "archive.h5") as other:
        expected = one.rows(range(7), allow_invalid=True)
        np.testing.assert_array_equal(other.rows(range(7), allow_invalid=True), expected)  # NaN in invalid rows
        assert np.array_equal(one.valid, other.valid)
        assert one.invalid_reasons == other.invalid_reasons
    for shard in range(3):
        first, second = (tmp_path / f / f"{shard:05}.h5" for f in ("folder", "features/archive"))
        with FeatureStore(tmp_path / "folder.h5"):
            assert first.stat().st_size == second.stat().st_size
    again = run("--images", archive, *sizes, *RANDOM)
    assert "already complete" in again.output or "0 shards written" in again.output or again.exit_code == 0


def test_captions_name_the_members_of_a_zip_file_by_their_base_names(fake: Any, photos: Any, tmp_path: Path) -> None:
    folder = photos(3)
    names = sorted(p.name for p in folder.iterdir())
    with zipfile.ZipFile(tmp_path / "train2014.zip", "w") as archive:
        for name in names:
            archive.write(folder / name, f"train2014/{name}")
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{name},a dog\n" for name in names))
    result = run("--images", tmp_path / "train2014.zip", "--annotations", tmp_path / "captions.csv", *RANDOM)
    assert result.exit_code == 0, result.output
    with FeatureStore(tmp_path / "features" / "train2014.h5") as store:
        assert store.valid.all()
        assert len(store) == 3


def test_nvjpeg_and_missing_archives_are_errors(photos: Any, tmp_path: Path) -> None:
    archive = pack("zip", photos(2), tmp_path / "archive.zip")
    assert "nvjpeg reads images from folders only" in fails(
        2, "--images", archive, "--set", "extract.jpeg_decoder=nvjpeg", *RANDOM
    )
    assert "no such folder or archive" in fails(1, "--images", tmp_path / "none.zip", *RANDOM)
