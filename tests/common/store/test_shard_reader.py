"""Shards are read as they were written; corrupted shards raise errors that name the file."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gridcap.common.errors import StoreError
from gridcap.common.store.codecs import find_codec
from gridcap.common.store.shard_format import GridLayout, ShardInfo, ShardSpec
from gridcap.common.store.shard_reader import ShardReader
from gridcap.common.store.shard_writer import ShardWriter
from tests.common.store.helpers import flip_byte_of_row, read_all

MakeGrids = Callable[..., np.ndarray]
WriteShard = Callable[..., ShardInfo]
Rewrite = Callable[[Path, Path], None]


@pytest.mark.parametrize("row", [0, 2, 4])
def test_corrupted_rows_finds_a_flipped_bit(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, row: int
) -> None:
    write_shard(tmp_path / "s.h5", make_grids(5), invalid_reasons={4: "rows of invalid images are checked too"})
    flip_byte_of_row(tmp_path / "s.h5", row)
    with ShardReader(tmp_path / "s.h5") as reader:
        assert reader.corrupted_rows() == [row]


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_verified_read_raises_only_for_the_corrupted_row(tmp_path: Path, make_grids: MakeGrids, dtype: str) -> None:
    path = tmp_path / "s.h5"
    grids = make_grids(3).astype(np.float32 if dtype == "uint8" else dtype)
    spec = ShardSpec(list(enumerate("abc")), GridLayout(grids.shape[1:], find_codec(dtype)), {"dtype": dtype})
    with ShardWriter(path, spec) as writer:
        writer.write(0, np.abs(grids), {})
        writer.finish()
    with ShardReader(path) as reader:
        out, before = np.empty(grids.shape[1:], reader.dtype), np.empty(grids.shape[1:], reader.dtype)
        reader.read_row(1, before, verify=True)
    flip_byte_of_row(path, 1)
    with ShardReader(path) as reader:
        for row in (0, 2):
            reader.read_row(row, out, verify=True)
        reader.read_row(1, out)
        assert not np.array_equal(out, before), "without verification, the corrupted grid is returned"
        with pytest.raises(StoreError, match=r"s\.h5: row 1 is corrupted") as caught:
            reader.read_row(1, out, verify=True)
        assert "--repair" in caught.value.hint


@pytest.mark.parametrize("kept", [0, 1, 100, 4096, -1])
def test_truncated_shard_raises_error_that_names_it(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, kept: int
) -> None:
    path = tmp_path / "00007.h5"
    write_shard(path, make_grids(5))
    size = path.stat().st_size
    os.truncate(path, kept if kept >= 0 else size - 1)
    with pytest.raises(StoreError, match=r"00007\.h5"):
        ShardReader(path)


def test_shard_truncated_while_open_raises_instead_of_returning_garbage(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard
) -> None:
    path, grids = tmp_path / "s.h5", make_grids(3)
    write_shard(path, grids)
    with h5py.File(path) as file:
        end_of_row_1 = file["features"].id.get_offset() + 2 * grids[0].nbytes
    with ShardReader(path) as reader:
        out = np.empty(grids.shape[1:], np.float16)
        reader.read_row(0, out)  # opens the file
        os.truncate(path, end_of_row_1 + 1)
        reader.read_row(1, out)
        np.testing.assert_array_equal(out, grids[1])
        with pytest.raises(StoreError, match=r"s\.h5: ends inside row 2"):
            reader.read_row(2, out)


def test_other_files_raise_errors_that_name_them(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("captions, not features\n" * 100)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = np.zeros((2, 8))
    (tmp_path / "folder").mkdir()
    for name, reason in (
        ("text.h5", "not a readable HDF5 file"),
        ("other.h5", "not a gridcap feature store"),
        ("folder", "is a folder"),
        ("missing.h5", "no such file"),
    ):
        with pytest.raises(StoreError, match=reason) as caught:
            ShardReader(tmp_path / name)
        assert str(tmp_path / name) in caught.value.message


@pytest.mark.parametrize(("version", "remedy"), [(2, "extract it again"), (4, "update gridcap")])
def test_other_format_version_raises_one_clear_error(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, version: int, remedy: str
) -> None:
    write_shard(tmp_path / "s.h5", make_grids(1))
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file.attrs["version"] = version
    with pytest.raises(StoreError, match=rf"s\.h5: format version {version}; .* reads 3") as caught:
        ShardReader(tmp_path / "s.h5")
    assert remedy in caught.value.hint


@pytest.mark.parametrize(
    "name", ["features", "image_id", "file_name", "valid", "crc32", "invalid_row", "invalid_reason"]
)
@pytest.mark.parametrize("replacement", ["nothing", "group", "scalar", "time"])
def test_missing_or_replaced_dataset_raises_error_that_names_it(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, name: str, replacement: str
) -> None:
    write_shard(tmp_path / "s.h5", make_grids(2))
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        del file[name]
        if replacement == "group":
            file.create_group(name)
        elif replacement == "scalar":
            file[name] = 1
        elif replacement == "time":  # an HDF5 type without a NumPy equivalent
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple((2,)))
    with pytest.raises(StoreError, match=name):
        ShardReader(tmp_path / "s.h5")


@pytest.mark.parametrize("short", ["image_id", "file_name", "valid", "crc32"])
def test_columns_of_different_lengths_raise(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, short: str
) -> None:
    write_shard(tmp_path / "s.h5", make_grids(3))
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        kept = file[short][:2]
        del file[short]
        file[short] = kept
    with pytest.raises(StoreError, match="different lengths"):
        ShardReader(tmp_path / "s.h5")


def test_compressed_rewrite_reads_the_same(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, rewrite_compressed: Rewrite
) -> None:
    write_shard(tmp_path / "original.h5", make_grids(5), invalid_reasons={3: "not an image"})
    rewrite_compressed(tmp_path / "original.h5", tmp_path / "rewritten.h5")
    with ShardReader(tmp_path / "original.h5") as original, ShardReader(tmp_path / "rewritten.h5") as rewritten:
        assert read_all(rewritten).tobytes() == read_all(original).tobytes()
        assert rewritten.corrupted_rows() == []
        assert rewritten.invalid_reasons == original.invalid_reasons
        assert rewritten.provenance == original.provenance
        assert rewritten.file_name == original.file_name


@pytest.mark.parametrize("compressed", [False, True])
def test_pickled_reader_opens_its_own_file(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, rewrite_compressed: Rewrite, compressed: bool
) -> None:
    """Closing the original must not close the descriptor of the copy."""
    path, grids = tmp_path / "s.h5", make_grids(3)
    write_shard(path, grids)
    if compressed:
        rewrite_compressed(path, tmp_path / "z.h5")
        path = tmp_path / "z.h5"
    reader = ShardReader(path)
    read_all(reader)  # opens the file
    copy = pickle.loads(pickle.dumps(reader))
    reader.close()
    np.testing.assert_array_equal(read_all(copy), grids)
    copy.close()


def test_closed_reader_reopens_on_the_next_read(tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard) -> None:
    grids = make_grids(3)
    write_shard(tmp_path / "s.h5", grids)
    reader = ShardReader(tmp_path / "s.h5")
    for _ in range(2):
        np.testing.assert_array_equal(read_all(reader), grids)
        reader.close()


def test_concurrent_first_reads_leave_no_descriptor_open(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening is slowed down, so that all threads find the file closed."""
    grids = make_grids(4)
    write_shard(tmp_path / "s.h5", grids)
    opened: list[int] = []
    real_open = os.open

    def slow_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        time.sleep(0.05)
        opened.append(real_open(path, flags, *args, **kwargs))
        return opened[-1]

    reader, out = ShardReader(tmp_path / "s.h5"), np.empty_like(grids)
    monkeypatch.setattr("gridcap.common.store.pinned_file.os.open", slow_open)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: reader.read_row(row, out[row]), range(4)))
    monkeypatch.undo()
    reader.close()
    np.testing.assert_array_equal(out, grids)
    assert opened
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_corrupted_rows_finds_a_corrupted_chunk_of_a_compressed_rewrite(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, rewrite_compressed: Rewrite
) -> None:
    write_shard(tmp_path / "original.h5", make_grids(3))
    rewrite_compressed(tmp_path / "original.h5", tmp_path / "rewritten.h5")
    with h5py.File(tmp_path / "rewritten.h5") as file:
        chunk = file["features"].id.get_chunk_info(1)
    with (tmp_path / "rewritten.h5").open("r+b") as raw:
        raw.seek(chunk.byte_offset + chunk.size - 4)
        raw.write(b"\0\0\0\0")  # the checksum of the zlib stream
    with ShardReader(tmp_path / "rewritten.h5") as reader:
        assert reader.corrupted_rows() == [1]


@pytest.mark.parametrize(
    ("attribute", "value"), [("format", np.array([1, 2])), ("version", "two"), ("provenance", "[1]"), ("provenance", 3)]
)
def test_attribute_of_another_type_raises_error_that_names_the_file(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, attribute: str, value: object
) -> None:
    write_shard(tmp_path / "s.h5", make_grids(1))
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file.attrs[attribute] = value
    with pytest.raises(StoreError, match=r"s\.h5"):
        ShardReader(tmp_path / "s.h5")


def test_replaced_file_is_not_read(tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard) -> None:
    """The rows of another file are of other images, and may be at other positions."""
    path = tmp_path / "s.h5"
    write_shard(path, make_grids(3))
    reader = ShardReader(path)
    copy = pickle.loads(pickle.dumps(reader))
    write_shard(path, make_grids(3, seed=9))
    for each in (reader, copy):
        with pytest.raises(StoreError, match=r"s\.h5: replaced or changed"):
            read_all(each)
