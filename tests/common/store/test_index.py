"""The index: written over shards that belong to it, compared with its hash before HDF5 reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gridcap.common.errors import StoreError
from gridcap.common.store.header import pack_header
from gridcap.common.store.reader import FeatureStore

WriteStore = Callable[..., tuple[Path, np.ndarray]]


def test_a_flipped_bit_anywhere_in_an_index_is_found_before_hdf5_reads_it(
    tmp_path: Path, write_store: WriteStore
) -> None:
    """HDF5 does not survive each of them: some in the map of the virtual datasets end the process."""
    path, _ = write_store(tmp_path / "train.h5")
    whole = path.read_bytes()
    for position in [*range(7, 60, 7), *range(4096, len(whole), 97)]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        with pytest.raises(StoreError, match=r"damaged|not a readable HDF5 file"):
            FeatureStore(path)


def test_a_captions_file_in_the_place_of_a_store_is_not_called_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text('{"images": [' + " " * 10_000 + "]}")
    with pytest.raises(StoreError, match="not a readable HDF5 file"):
        FeatureStore(tmp_path / "captions.json")


@pytest.mark.parametrize("header", [{"size": "5"}, {"size": None}, {"sha256": [[[]]]}])
def test_a_header_of_other_types_is_a_damaged_one(
    tmp_path: Path, write_store: WriteStore, header: dict[str, Any]
) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    values = {"size": path.stat().st_size, "sha256": "0" * 64, **header}
    with path.open("r+b") as file:
        file.write(pack_header("gridcap-index", values))
    with pytest.raises(StoreError, match=r"damaged|was written to"):
        FeatureStore(path)


def test_an_index_that_is_removed_while_it_is_compared_is_a_store_error(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that retry rejected images remove it under each other's hands."""
    path, _ = write_store(tmp_path / "train.h5")

    def removed(*arguments: Any) -> dict[str, Any]:
        path.unlink()
        return {"size": 1, "sha256": "0" * 64}

    monkeypatch.setattr("gridcap.common.store.index.unpack_header", removed)
    with pytest.raises(StoreError, match=r"train\.h5: no such file"):
        FeatureStore(path)


def test_a_header_nested_too_deep_is_a_damaged_one(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with path.open("r+b") as file:
        file.write(b'{"a":' + b"[" * 4091)
    with pytest.raises(StoreError, match="damaged header"):
        FeatureStore(path)


def test_a_failed_index_leaves_the_store_incomplete(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index says that the store is complete, so half an index must never stand there."""
    monkeypatch.setattr("gridcap.common.store.index._virtual_datasets", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_store(tmp_path / "train.h5")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []
