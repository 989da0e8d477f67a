"""The index is written last, and verified against its checksum before HDF5 parses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gridcap.common.errors import StoreError
from gridcap.common.store.header import HEADER_BYTES, pack_header
from gridcap.common.store.index_reader import INDEX_FORMAT, read_index, read_index_plan
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_format import SHARD_FORMAT

WriteStore = Callable[..., tuple[Path, np.ndarray]]


def test_flipped_bit_in_an_index_is_detected(tmp_path: Path, write_store: WriteStore) -> None:
    """Some bits in the mapping of the virtual datasets would crash HDF5 and with it the process."""
    path, _ = write_store(tmp_path / "train.h5")
    content = path.read_bytes()
    for position in [*range(7, 60, 7), *range(HEADER_BYTES, len(content), 97)]:
        path.write_bytes(content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :])
        with pytest.raises(StoreError, match=r"corrupted|not a readable HDF5 file"):
            FeatureStore(path)


def test_captions_file_is_not_reported_as_a_corrupted_store(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text('{"images": [' + " " * 10_000 + "]}")
    with pytest.raises(StoreError, match="not a readable HDF5 file"):
        FeatureStore(tmp_path / "captions.json")


@pytest.mark.parametrize("header", [{"size": "5"}, {"size": None}, {"sha256": [[[]]]}])
def test_header_values_of_other_types_raise(tmp_path: Path, write_store: WriteStore, header: dict[str, Any]) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    values = {"size": path.stat().st_size, "sha256": "0" * 64, **header}
    with path.open("r+b") as file:
        file.write(pack_header(INDEX_FORMAT, values))
    with pytest.raises(StoreError, match=r"corrupted|longer than"):
        FeatureStore(path)


def test_deeply_nested_header_raises(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with path.open("r+b") as file:
        file.write(b'{"a":' + b"[" * 4091)
    with pytest.raises(StoreError, match="corrupted header"):
        FeatureStore(path)


@pytest.mark.parametrize(("version", "remedy"), [(2, "extract it again"), (4, "update gridcap")])
def test_header_of_another_version_raises_one_clear_error(
    tmp_path: Path, write_store: WriteStore, version: int, remedy: str
) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with path.open("r+b") as file:
        block = file.read(HEADER_BYTES).replace(b'"version": 3', b'"version": %d' % version)
        file.seek(0)
        file.write(block)
    with pytest.raises(StoreError, match=rf"train\.h5: format version {version}") as caught:
        FeatureStore(path)
    assert remedy in caught.value.hint


def test_index_removed_while_it_is_verified_raises_store_error(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that retry invalid images remove the index concurrently."""
    path, _ = write_store(tmp_path / "train.h5")

    def remove(*arguments: Any) -> dict[str, Any]:
        path.unlink()
        return {"size": 1, "sha256": "0" * 64}

    monkeypatch.setattr("gridcap.common.store.index_reader.unpack_header", remove)
    with pytest.raises(StoreError, match=r"train\.h5: not complete yet"):
        FeatureStore(path)


def test_failure_while_writing_leaves_no_index(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gridcap.common.store.index_writer._create_virtual_datasets", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_store(tmp_path / "train.h5")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_read_index_returns_all_columns(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5", (3, 2), {1: "not an image"})
    index = read_index(path)
    assert (index.format, index.split, index.plan) == (INDEX_FORMAT, "train", "the plan")
    assert (index.shard_names, index.shard_rows) == (["train/00000.h5", "train/00001.h5"], [3, 2])
    assert index.invalid_reasons == {1: "not an image"}
    assert read_index_plan(path) == "the plan"
    with pytest.raises(StoreError, match="not a gridcap feature store"):
        read_index(tmp_path / "train" / "00000.h5")
    shard = read_index(tmp_path / "train" / "00000.h5", (INDEX_FORMAT, SHARD_FORMAT))
    assert (shard.format, shard.shard_names, shard.shard_rows) == (SHARD_FORMAT, ["00000.h5"], [3])
    assert dataclasses.replace(shard.layout) == index.layout
