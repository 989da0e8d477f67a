"""HDF5 input: self-contained files only, and errors that tell corruption from everything else."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gridcap.common.errors import StoreAccessError, StoreError
from gridcap.common.store.hdf5 import check_self_contained, corruption_as_store_error
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_reader import ShardReader
from gridcap.extract.importers.sources import open_source
from tests.torture.forge import WAYS_OUT, sign_index

OUTSIDE = "stored in other files|is a link to another file"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["secret"] = np.ones((4, 2, 2, 3), "<f2")
    return tmp_path / "secret.h5"


@pytest.mark.parametrize("lead_outside", WAYS_OUT)
@pytest.mark.parametrize("name", ["features", "image_id", "crc32"])
def test_shard_with_data_in_another_file_raises(
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
def test_index_with_data_in_another_file_raises(
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
def test_imported_features_with_data_in_another_file_raise(
    tmp_path: Path, secret: Path, lead_outside: Callable[..., None], name: str
) -> None:
    path = tmp_path / "mine.h5"
    with h5py.File(path, "w") as file:
        lead_outside(file, name, secret)
    with pytest.raises(StoreError, match=OUTSIDE):
        open_source(path)


def test_self_contained_file_passes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["a"] = np.ones(3)
        file.create_dataset("b", data=np.ones(300), chunks=(100,), compression="gzip")
        check_self_contained(file, tmp_path / "own.h5")


def test_file_name_that_is_not_utf8_raises_error_that_names_the_index(tmp_path: Path, write_store: Any) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with h5py.File(path) as file:
        position = file["file_name"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[position] = 0xAE
    path.write_bytes(content)
    sign_index(path)
    with FeatureStore(path) as store, pytest.raises(StoreError, match=r"train\.h5: corrupted file name: 'utf-8'"):
        list(store.file_name)


@pytest.mark.parametrize("error", [KeyError("bad heap"), ValueError("bad heap"), OSError("bad heap")])
def test_corrupted_content_raises_error_that_names_the_file(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(StoreError, match=r"mine\.h5: corrupted HDF5 file: .*bad heap") as caught,
        corruption_as_store_error(tmp_path / "mine.h5"),
    ):
        raise error
    assert not isinstance(caught.value, StoreAccessError)
    assert "delete" in caught.value.hint


@pytest.mark.parametrize("kind", [AttributeError, TypeError, MemoryError])
def test_item_12_programming_errors_are_not_called_corruption(tmp_path: Path, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="a bug"), corruption_as_store_error(tmp_path / "mine.h5"):
        raise kind("a bug")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_item_11_system_errors_are_not_called_corruption(tmp_path: Path, code: int) -> None:
    with pytest.raises(StoreAccessError) as caught, corruption_as_store_error(tmp_path / "mine.h5"):
        raise OSError(code, "from HDF5")
    assert "corrupted" not in caught.value.message
    assert "delete this file" not in caught.value.hint
