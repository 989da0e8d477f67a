"""Codecs: round trips, compression, and reading by other programs."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gridcap.common.errors import StoreAccessError, StoreError, UserError
from gridcap.common.store.chunks import require_filters
from gridcap.common.store.codecs import codec_names, codec_of, find_codec
from gridcap.common.store.index_writer import IndexSpec, write_index
from gridcap.common.store.provenance import differences
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_format import GridLayout, ShardSpec
from gridcap.common.store.shard_reader import ShardReader
from gridcap.common.store.shard_writer import ShardWriter

# Importing it registers the filters for h5py. CI must not skip these tests.
hdf5plugin = __import__("hdf5plugin") if os.environ.get("CI") else pytest.importorskip("hdf5plugin")

GRID = (3, 3, 40)


def sparse_grids(rows: int) -> np.ndarray:
    """Return grids as after a ReLU: most values are zero."""
    rng = np.random.default_rng(0)
    return (rng.random((rows, *GRID)) * (rng.random((rows, *GRID)) > 0.9)).astype(np.float32)


def write(path: Path, dtype: str, order: tuple[int, ...] = (0, 1, 2, 3)) -> np.ndarray:
    grids, provenance = sparse_grids(4), {"grid_shape": list(GRID), "dtype": dtype}
    spec = ShardSpec(list(enumerate("abcd")), GridLayout.from_provenance(provenance), provenance, plan="p", split="s")
    with ShardWriter(path, spec) as writer:
        for row in order:
            writer.write(row, grids[row : row + 1].copy(), {row: "truncated"} if row == 2 else {})
        writer.finish()
    return grids


@pytest.mark.parametrize("dtype", codec_names())
def test_every_codec_returns_what_was_written(tmp_path: Path, dtype: str) -> None:
    grids = write(tmp_path / "s.h5", dtype)
    codec = find_codec(dtype)
    with ShardReader(tmp_path / "s.h5") as reader:
        assert reader.codec is codec
        assert reader.corrupted_rows() == []
        out = np.empty(GRID, reader.dtype)
        for row in (0, 1, 3):
            reader.read_row(row, out, verify=True)
            np.testing.assert_allclose(out, grids[row], rtol=5e-4, atol=0.003 if dtype == "uint8" else 0)
        reader.read_row(2, out, verify=True)
        assert np.isnan(out).all()


@pytest.mark.parametrize("dtype", codec_names())
def test_the_bytes_do_not_depend_on_the_order_of_writing(tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "a.h5", dtype)
    write(tmp_path / "b.h5", dtype, (3, 1, 0, 2))
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_other_programs_read_compressed_shards_and_their_index(tmp_path: Path) -> None:
    grids = write(tmp_path / "s" / "00000.h5", "float16-zstd").astype(np.float16)
    provenance = {"grid_shape": list(GRID), "dtype": "float16-zstd"}
    spec = IndexSpec(tmp_path / "s", ["00000.h5"], ["p"], [list(enumerate("abcd"))], 1, "s", provenance)
    write_index(tmp_path / "s.h5", spec)
    with h5py.File(tmp_path / "s" / "00000.h5") as shard, h5py.File(tmp_path / "s.h5") as index:
        assert shard["features"].chunks == (1, *GRID)
        for features in (shard["features"], index["features"]):
            np.testing.assert_array_equal(features[[0, 1, 3]], grids[[0, 1, 3]])
            assert np.isnan(features[2]).all()
    with FeatureStore(tmp_path / "s.h5") as store:
        np.testing.assert_array_equal(store[[0, 3]], grids[[0, 3]])
        assert store.dtype == np.float16


def test_sparse_grids_become_smaller(tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("float16", "float16-zstd"):
        grids = np.tile(sparse_grids(1), (200, 8, 8, 1))
        provenance = {"grid_shape": list(grids.shape[1:]), "dtype": dtype}
        spec = ShardSpec([(i, "a") for i in range(200)], GridLayout.from_provenance(provenance), provenance)
        with ShardWriter(tmp_path / "s.h5", spec) as writer:
            writer.write(0, grids, {})
            sizes[dtype] = writer.finish().size
    assert sizes["float16-zstd"] < 0.5 * sizes["float16"]


def test_a_corrupted_compressed_row_is_found_and_the_others_are_read(tmp_path: Path) -> None:
    grids = write(tmp_path / "s.h5", "float16-zstd")
    with h5py.File(tmp_path / "s.h5") as file:
        chunk = file["features"].id.get_chunk_info(1)
    content = bytearray((tmp_path / "s.h5").read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 255
    (tmp_path / "s.h5").write_bytes(content)
    with ShardReader(tmp_path / "s.h5") as reader:
        assert reader.corrupted_rows() == [1]
        out = np.empty(GRID, np.float16)
        reader.read_row(0, out, verify=True)
        np.testing.assert_array_equal(out, grids[0].astype(np.float16))
        with pytest.raises(StoreError, match=r"s\.h5: row 1 is corrupted"):
            reader.read_row(1, out, verify=True)


def test_a_truncated_compressed_shard_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "s.h5", "float16-zstd")
    content = (tmp_path / "s.h5").read_bytes()
    (tmp_path / "s.h5").write_bytes(content[:-1])
    with pytest.raises(StoreError, match=r"s\.h5"):
        ShardReader(tmp_path / "s.h5")


def test_a_copied_row_keeps_its_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", "float16-zstd")
    provenance = {"grid_shape": list(GRID), "dtype": "float16-zstd"}
    spec = ShardSpec(list(enumerate("abcd")), GridLayout.from_provenance(provenance), provenance, plan="p", split="s")
    with ShardReader(tmp_path / "a.h5") as reader, ShardWriter(tmp_path / "b.h5", spec) as writer:
        for row in range(4):
            writer.copy(row, reader)
        writer.finish()
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_compressed_rows_are_not_padded_and_wait_only_for_earlier_rows(tmp_path: Path) -> None:
    grids, provenance = sparse_grids(4), {"grid_shape": list(GRID), "dtype": "float16-zstd", "views": ["original", "b"]}
    spec = ShardSpec(list(enumerate("abcd")), GridLayout.from_provenance(provenance), provenance, plan="p", split="s")
    with ShardWriter(tmp_path / "s.h5", spec) as writer:
        waiting = []
        for start, view in ((0, "original"), (0, "b"), (2, "b"), (2, "original")):
            writer.write(start, grids[start : start + 2].copy(), {}, view)
            waiting.append(len(writer._packed))
        writer.finish()
    assert waiting == [1, 0, 2, 0]  # the second row of the first view waits for the first row of the second
    with h5py.File(tmp_path / "s.h5") as file:
        chunks = [file[name].id.get_chunk_info(row) for row in range(4) for name in ("features", "features_b")]
    assert [chunk.byte_offset for chunk in chunks[1:4]] == [chunk.byte_offset + chunk.size for chunk in chunks[:3]]


@pytest.mark.parametrize("dtype", ["float32", "uint8", "float16"])
@pytest.mark.parametrize("filter_name", ["Zstd", "Blosc"])
def test_stores_compressed_by_another_program_are_read(tmp_path: Path, dtype: str, filter_name: str) -> None:
    write(tmp_path / "s.h5", dtype)
    options = getattr(hdf5plugin, filter_name)()
    with h5py.File(tmp_path / "s.h5") as old, h5py.File(tmp_path / "new.h5", "w", userblock_size=1024) as new:
        new.attrs.update(old.attrs)
        for name in old:
            if name == "features":
                new.create_dataset(name, data=old[name][:], chunks=(1, *GRID), **options)
            else:
                old.copy(name, new)
    with ShardReader(tmp_path / "s.h5") as reader, ShardReader(tmp_path / "new.h5") as rewritten:
        assert rewritten.corrupted_rows() == []
        got, expected = np.empty(GRID, reader.dtype), np.empty(GRID, reader.dtype)
        for row in (0, 3):
            reader.read_row(row, expected)
            rewritten.read_row(row, got, verify=True)
            np.testing.assert_array_equal(got, expected)
    with FeatureStore(tmp_path / "new.h5") as store:
        assert store.codec.name == dtype


def test_a_missing_filter_is_named_and_the_store_not_called_corrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with h5py.File(tmp_path / "s.h5", "w") as file:
        dataset = file.create_dataset("x", data=np.zeros((2, 3)), chunks=(1, 3), **hdf5plugin.Blosc())
        monkeypatch.setattr("gridcap.common.store.chunks.h5py.h5z.filter_avail", lambda _: False)
        with pytest.raises(StoreAccessError, match=r"filter 32001 \(.*\), which is not installed") as caught:
            require_filters(dataset, tmp_path / "s.h5")
    assert "gridcap[zstd]" in caught.value.hint


def test_missing_packages_are_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fail(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(UserError, match="needs zstandard and hdf5plugin") as caught:
        write(tmp_path / "s.h5", "float16-zstd")
    assert "gridcap[zstd]" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_compression_does_not_make_features_different_but_quantization_does() -> None:
    assert not differences({"dtype": "float16"}, {"dtype": "float16-zstd"}, ["dtype"])
    assert differences({"dtype": "float16"}, {"dtype": "uint8"}, ["dtype"])


def test_unknown_codecs_are_rejected() -> None:
    with pytest.raises(ValueError, match="dtype is 'float8'"):
        find_codec("float8")
    with pytest.raises(ValueError, match="type int16"):
        codec_of(np.dtype(np.int16))
