"""Shards are written atomically, verified, and identical for identical content."""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gridcap.common.errors import StoreError
from gridcap.common.store.codecs import _finite_rows, codec_of, find_codec
from gridcap.common.store.shard_format import ALIGNMENT, GridLayout, ShardInfo, ShardSpec, read_header
from gridcap.common.store.shard_reader import ShardReader
from gridcap.common.store.shard_writer import InvalidGridError, ShardWriter
from tests.common.store.helpers import files_below, flip_byte_of_row, read_all

MakeGrids = Callable[..., np.ndarray]
WriteShard = Callable[..., ShardInfo]

# Everything that HDF5 can store: no NUL, no lone surrogates.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


def spec_of(count: int, dtype: str = "float16", name: str = "a.jpg") -> ShardSpec:
    """The spec of a shard with `count` images."""
    return ShardSpec([(i, name) for i in range(count)], GridLayout((2, 3, 4), find_codec(dtype)), {}, plan="p")


@st.composite
def shards(draw: st.DrawFn) -> dict[str, Any]:
    """The content of a shard with any shape and float width, and the batch size to write it with."""
    rows = draw(st.integers(1, 6))
    grid = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=3))
    width = draw(st.sampled_from([16, 32]))
    finite = st.floats(width=width, allow_nan=False, allow_infinity=False)
    ids = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=rows, max_size=rows))
    names = draw(st.lists(TEXTS, min_size=rows, max_size=rows))
    return {
        "grids": draw(hnp.arrays(f"float{width}", (rows, *grid), elements=finite)),
        "images": list(zip(ids, names, strict=True)),
        "invalid_reasons": draw(st.dictionaries(st.integers(0, rows - 1), TEXTS)),
        "batch": draw(st.integers(1, rows)),
    }


@settings(deadline=None, max_examples=50)
@given(shard=shards())
def test_shard_round_trip(shard: dict[str, Any]) -> None:
    grids, reasons = shard["grids"], shard["invalid_reasons"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00000.h5"
        spec = ShardSpec(shard["images"], GridLayout(grids.shape[1:], codec_of(grids.dtype)), {}, 3, "p")
        with ShardWriter(path, spec) as writer:
            for start in range(0, len(grids), shard["batch"]):
                stop = start + shard["batch"]
                local = {row: reason for row, reason in reasons.items() if start <= row < stop}
                writer.write(start, grids[start:stop].copy(), local)
            info = writer.finish()
        with ShardReader(path) as reader:
            got = read_all(reader)
            assert reader.corrupted_rows() == []
            assert info == ShardInfo(3, "p", len(grids), len(reasons), path.stat().st_size, info.sha256)
            assert (reader.shape, reader.dtype) == (grids.shape, grids.dtype)
            assert list(zip(reader.image_id.tolist(), reader.file_name, strict=True)) == shard["images"]
            assert reader.invalid_reasons == reasons
            assert reader.valid.tolist() == [row not in reasons for row in range(len(grids))]
            assert (reader.index, reader.plan) == (3, "p")
            assert read_header(path) == info
        valid = reader.valid
        assert got[valid].tobytes() == grids[valid].tobytes()  # bytes: -0.0 is not 0.0
        assert np.isnan(got[~valid]).all()


def test_features_are_contiguous_aligned_and_readable_without_gridcap(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard
) -> None:
    """HDF5 aligns datasets from 4096 bytes on. A real grid has 256 KiB, so these grids are larger than elsewhere."""
    grids = make_grids(5 * 100).reshape(5, 20, 30, 4)
    write_shard(tmp_path / "s.h5", grids, invalid_reasons={3: "truncated JPEG"})
    with h5py.File(tmp_path / "s.h5") as file:
        features = file["features"]
        assert features.chunks is None
        assert features.compression is None
        assert features.dtype == np.float16
        assert features.id.get_type().get_order() == h5py.h5t.ORDER_LE
        offset = features.id.get_offset()
        assert offset % ALIGNMENT == 0
        assert ALIGNMENT == 4096
        np.testing.assert_array_equal(features[:3], grids[:3])
        assert np.isnan(features[3]).all()
        assert file["valid"].dtype == bool
        assert file["valid"][:].tolist() == [True, True, True, False, True]
        assert file["image_id"][:].tolist() == [0, 10, 20, 30, 40]
        assert file["file_name"].asstr()[4] == "folder/40.jpg"
        assert file["invalid_row"][:].tolist() == [3]
        assert file["invalid_reason"].asstr()[:].tolist() == ["truncated JPEG"]
        assert (file.attrs["format"], file.attrs["version"]) == ("gridcap-shard", 3)
    mapped = np.memmap(tmp_path / "s.h5", "<f2", "r", offset, grids.shape)
    np.testing.assert_array_equal(mapped[[0, 1, 2, 4]], grids[[0, 1, 2, 4]])


def test_same_content_gives_same_bytes(tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard) -> None:
    """HDF5 stores times in whole seconds where it stores them at all, so the second file is written a second later."""
    grids, reasons = make_grids(7), {2: "not an image", 5: "empty file"}
    first = write_shard(tmp_path / "a" / "00000.h5", grids, invalid_reasons=reasons)
    time.sleep(1.01 - time.time() % 1)
    second = write_shard(tmp_path / "b" / "00000.h5", grids, invalid_reasons=reasons, batch=2)
    assert first == second
    assert (tmp_path / "a" / "00000.h5").read_bytes() == (tmp_path / "b" / "00000.h5").read_bytes()


@given(hnp.arrays(np.uint16, (3, 5)))
def test_finite_rows_agrees_with_numpy(bits: np.ndarray) -> None:
    flat = bits.view(np.float16)
    assert _finite_rows(flat).tolist() == np.isfinite(flat).all(1).tolist()
    assert _finite_rows(flat[:, ::2]).tolist() == np.isfinite(flat[:, ::2]).all(1).tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_value_raises_error_that_names_the_image(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, value: float
) -> None:
    grids = make_grids(3)
    grids[1, 0, 2, 3] = value
    with pytest.raises(ValueError, match=r"folder/10\.jpg"):
        write_shard(tmp_path / "s.h5", grids)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_item_08_value_that_overflows_in_the_stored_type_is_not_marked_valid(tmp_path: Path, dtype: str) -> None:
    grids = np.ones((2, 2, 3, 4), dtype)
    grids[1, 0, 0, 0] = 1e6  # finite, but infinity in float16
    with ShardWriter(tmp_path / "s.h5", spec_of(2)) as writer:
        with pytest.raises(InvalidGridError, match=r"a\.jpg.*float16"):
            writer.write(0, grids, {})
        writer.write(0, grids, {1: "value out of range"})
        writer.finish()
    with ShardReader(tmp_path / "s.h5") as reader:
        assert reader.valid.tolist() == [True, False]


@pytest.mark.parametrize("value", [-1.0, 66000.0, np.inf, np.nan])
def test_uint8_rejects_values_that_it_cannot_represent(tmp_path: Path, value: float) -> None:
    with ShardWriter(tmp_path / "s.h5", spec_of(1, "uint8")) as writer:
        grid = np.full((1, 2, 3, 4), value, np.float32)
        with pytest.raises(InvalidGridError, match=r"a\.jpg.*uint8"):
            writer.write(0, grid, {})


def test_grid_of_invalid_image_may_contain_any_value(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard
) -> None:
    grids = make_grids(3)
    grids[1] = np.inf
    write_shard(tmp_path / "s.h5", grids, invalid_reasons={1: "no such file"})
    with ShardReader(tmp_path / "s.h5") as reader:
        assert reader.valid.tolist() == [True, False, True]
        assert np.isnan(read_all(reader)[1]).all()


@pytest.mark.parametrize("rows_written", [0, 1, 3])
def test_exception_removes_temporary_file(tmp_path: Path, make_grids: MakeGrids, rows_written: int) -> None:
    def write_some() -> None:
        with ShardWriter(tmp_path / "s.h5", spec_of(3)) as writer:
            if rows_written:
                writer.write(0, make_grids(rows_written), {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_some()
    assert files_below(tmp_path) == []


def test_unfinished_writer_keeps_existing_shard(tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard) -> None:
    write_shard(tmp_path / "s.h5", make_grids(2))
    before = (tmp_path / "s.h5").read_bytes()
    with ShardWriter(tmp_path / "s.h5", spec_of(1)) as writer:
        writer.write(0, make_grids(1), {})
    assert files_below(tmp_path) == ["s.h5"]
    assert (tmp_path / "s.h5").read_bytes() == before


def test_finish_raises_if_rows_are_missing(tmp_path: Path, make_grids: MakeGrids) -> None:
    with ShardWriter(tmp_path / "s.h5", spec_of(3)) as writer:
        writer.write(1, make_grids(1), {})
        with pytest.raises(ValueError, match="2 rows of original were never written"):
            writer.finish()
    assert files_below(tmp_path) == []


def test_shard_that_reads_back_differently_is_not_renamed(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit is flipped between the flush and the verification."""
    flipped = []

    def flush_and_flip(path: Path) -> None:
        if path.is_file():
            flip_byte_of_row(path, 1)
            flipped.append(path)

    monkeypatch.setattr("gridcap.common.store.shard_writer.fsync_path", flush_and_flip)
    with pytest.raises(StoreError, match=r"s\.h5: rows \[1\]"):
        write_shard(tmp_path / "s.h5", make_grids(2))
    assert flipped
    assert files_below(tmp_path) == []


def test_name_that_utf8_cannot_encode_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        ShardWriter(tmp_path / "s.h5", spec_of(1, name="caf\udce9.jpg"))
    assert files_below(tmp_path) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from gridcap.common.store.codecs import find_codec
from gridcap.common.store.shard_format import GridLayout, ShardSpec
from gridcap.common.store.shard_writer import ShardWriter

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
spec = ShardSpec([(i, "a") for i in range(200)], GridLayout((2, 3, 400), find_codec("float16")), {})
try:
    with ShardWriter(Path(sys.argv[1]), spec) as writer:
        for start in range(0, 200, 10):
            writer.write(start, np.ones((10, 2, 3, 400), np.float16), {})
        writer.finish()
except OSError as error:
    print("OSError", error.errno, error.filename)
"""


def test_full_disk_raises_os_error_and_leaves_no_file(tmp_path: Path) -> None:
    """A limit on the file size stands in for a full disk: HDF5 fails when it flushes, and again on closing."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "s.h5")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == f"OSError {errno.EFBIG} {tmp_path / 's.h5'}", done.stderr
    assert done.returncode == 0, done.stderr
    assert files_below(tmp_path) == []


def test_copied_row_keeps_its_bytes(tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard) -> None:
    grids = make_grids(2)
    write_shard(tmp_path / "old.h5", grids, invalid_reasons={1: "truncated"})
    with ShardReader(tmp_path / "old.h5") as old, ShardWriter(tmp_path / "new.h5", spec_of(2)) as writer:
        writer.copy(0, old)
        writer.copy(1, old, "empty file")
        writer.finish()
    with ShardReader(tmp_path / "new.h5") as new:
        np.testing.assert_array_equal(read_all(new)[0], grids[0])
        assert new.invalid_reasons == {1: "empty file"}
    flip_byte_of_row(tmp_path / "old.h5", 0)
    with (
        ShardReader(tmp_path / "old.h5") as old,
        ShardWriter(tmp_path / "new.h5", spec_of(2)) as writer,
        pytest.raises(StoreError, match="row 0 is corrupted"),
    ):
        writer.copy(0, old)
