"""A file that would have other files read is refused, by every reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gridcap.common.errors import StoreError
from gridcap.common.store.hdf5 import check_self_contained, corruption_as_store_error
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_reader import ShardReader
from gridcap.extract.importers.sources import open_source
from tests.torture.forge import WAYS_OUT, sign_index

OUTSIDE = "lie in other files|is a link to another place"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["secret"] = np.ones((4, 2, 2, 3), "<f2")
    return tmp_path / "secret.h5"


@pytest.mark.parametrize("lead_outside", WAYS_OUT)
@pytest.mark.parametrize("name", ["features", "image_id", "crc32"])
def test_a_shard_whose_numbers_lie_elsewhere_is_refused(
    tmp_path: Path, make_grids: Any, write_shard: Any, secret: Path, lead_outside: Callable[..., None], name: str
) -> None:
    path = tmp_path / "s.h5"
    write_shard(path, make_grids(4))
    with h5py.File(path, "r+") as file:
        del file[name]
        lead_outside(file, name, secret)
    for read in (ShardReader, FeatureStore):
        with pytest.raises(StoreError, match=OUTSIDE) as caught:
            read(path)
        assert str(path) in caught.value.message


@pytest.mark.parametrize("lead_outside", WAYS_OUT)
def test_an_index_whose_columns_lie_elsewhere_is_refused(
    tmp_path: Path, write_store: Any, secret: Path, lead_outside: Callable[..., None]
) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with h5py.File(path, "r+") as file:
        del file["image_id"]
        lead_outside(file, "image_id", secret)
    sign_index(path)
    with pytest.raises(StoreError, match=OUTSIDE):
        FeatureStore(path)


@pytest.mark.parametrize("lead_outside", WAYS_OUT)
@pytest.mark.parametrize("name", ["features", "42"])
def test_features_of_other_origin_that_lie_elsewhere_are_not_imported(
    tmp_path: Path, secret: Path, lead_outside: Callable[..., None], name: str
) -> None:
    path = tmp_path / "mine.h5"
    with h5py.File(path, "w") as file:
        lead_outside(file, name, secret)
    with pytest.raises(StoreError, match=OUTSIDE):
        open_source(path)


def test_a_file_name_that_is_no_text_any_more_is_an_error_that_names_the_index(
    tmp_path: Path, write_store: Any
) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with h5py.File(path) as file:
        place = file["file_name"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[place] = 0xAE
    path.write_bytes(content)
    sign_index(path)
    with FeatureStore(path) as store, pytest.raises(StoreError, match=r"train\.h5: not a sound HDF5 file: 'utf-8'"):
        list(store.file_names)


def test_what_hdf5_raises_of_a_damaged_object_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match=r"mine\.h5: not a sound HDF5 file: .bad heap") as caught,
        corruption_as_store_error(tmp_path / "mine.h5"),
    ):
        raise KeyError("bad heap")
    assert caught.value.hint


def test_a_file_of_its_own_numbers_is_fine(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["a"] = np.ones(3)
        file.create_dataset("b", data=np.ones(300), chunks=(100,), compression="gzip")
        check_self_contained(file, tmp_path / "own.h5")
