"""The shard: what was written is what is read, and what is not sound is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gridcap.common.errors import StoreError
from gridcap.common.store.shard_format import ALIGNMENT, ShardInfo, read_header
from gridcap.common.store.shard_reader import ShardReader
from gridcap.common.store.shard_writer import InvalidGridError, ShardWriter, _finite_rows

MakeGrids = Callable[..., np.ndarray]
MADE_BY: dict[str, Any] = {"index": 0, "plan": "p"}
WriteShard = Callable[..., ShardInfo]

# Anything that HDF5 can hold: no NUL, no lone surrogate.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


def read_all(reader: ShardReader) -> np.ndarray:
    out = np.empty(reader.shape, reader.dtype)
    for row in range(len(reader)):
        reader.read_row(row, out[row])
    return out


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def flip_byte_of_row(path: Path, row: int) -> None:
    with h5py.File(path) as file:
        features = file["features"]
        position = features.id.get_offset() + row * features[0].nbytes + 5
    with open(path, "r+b") as raw:
        raw.seek(position)
        byte = raw.read(1)[0]
        raw.seek(position)
        raw.write(bytes([byte ^ 0x40]))


@st.composite
def shards(draw: st.DrawFn) -> dict[str, Any]:
    """Everything a shard holds, in any shape and number type, written in batches of any size."""
    rows = draw(st.integers(1, 6))
    grid = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=3))
    width = draw(st.sampled_from([16, 32]))
    finite = st.floats(width=width, allow_nan=False, allow_infinity=False)
    return {
        "grids": draw(hnp.arrays(f"float{width}", (rows, *grid), elements=finite)),
        "ids": draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=rows, max_size=rows)),
        "names": draw(st.lists(TEXTS, min_size=rows, max_size=rows)),
        "rejects": draw(st.dictionaries(st.integers(0, rows - 1), TEXTS)),
        "batch": draw(st.integers(1, rows)),
    }


@settings(deadline=None, max_examples=50)
@given(shard=shards())
def test_a_shard_gives_back_what_was_written(shard: dict[str, Any]) -> None:
    grids, rejects = shard["grids"], shard["rejects"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00000.h5"
        attributes: dict[str, Any] = {"index": 3, "plan": "p", "provenance": {}}
        with ShardWriter(path, shard["ids"], shard["names"], grids.shape[1:], grids.dtype.name, attributes) as w:
            for start in range(0, len(grids), shard["batch"]):
                stop = start + shard["batch"]
                w.write(start, grids[start:stop].copy(), {r: why for r, why in rejects.items() if start <= r < stop})
            info = w.finish()
        with ShardReader(path) as reader:
            got = read_all(reader)
            assert reader.corrupted_rows() == []
            assert info == ShardInfo(3, "p", len(grids), len(rejects), path.stat().st_size, info.sha256)
            assert (reader.shape, reader.dtype) == (grids.shape, grids.dtype)
            assert reader.image_ids.tolist() == shard["ids"]
            assert reader.file_names == shard["names"]
            assert reader.rejects == rejects
            assert reader.valid.tolist() == [row not in rejects for row in range(len(grids))]
            assert (reader.index, reader.plan) == (3, "p")
            assert read_header(path) == info
        kept = reader.valid
        assert got[kept].tobytes() == grids[kept].tobytes()  # bytes: -0.0 is not 0.0
        assert np.isnan(got[~kept]).all()


def test_plain_h5py_opens_a_shard_and_numpy_maps_its_features(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard
) -> None:
    """The layout is a promise to other people's code: contiguous, aligned, little-endian, no compression.

    HDF5 aligns from 4096 bytes on: one row of real features is 256 KiB, so these rows are larger than elsewhere.
    """
    grids = make_grids(5 * 100).reshape(5, 20, 30, 4)
    write_shard(tmp_path / "s.h5", grids, rejects={3: "truncated JPEG"})
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
        assert (file["reject_row"][:].tolist(), file["reject_why"].asstr()[:].tolist()) == ([3], ["truncated JPEG"])
        assert (file.attrs["format"], file.attrs["version"]) == ("gridcap-shard", 2)
    mapped = np.memmap(tmp_path / "s.h5", "<f2", "r", offset, grids.shape)
    np.testing.assert_array_equal(mapped[[0, 1, 2, 4]], grids[[0, 1, 2, 4]])


def test_a_shard_has_the_same_bytes_however_and_whenever_it_is_written(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard
) -> None:
    """HDF5 records whole seconds where it records times at all, so the second file is made a second later."""
    grids, rejects = make_grids(7), {2: "not an image", 5: "empty file"}
    first = write_shard(tmp_path / "a" / "00000.h5", grids, rejects=rejects)
    time.sleep(1.01 - time.time() % 1)
    second = write_shard(tmp_path / "b" / "00000.h5", grids, rejects=rejects, batch=2)
    assert first == second
    assert (tmp_path / "a" / "00000.h5").read_bytes() == (tmp_path / "b" / "00000.h5").read_bytes()


@given(hnp.arrays(np.uint16, (3, 5)))
def test_float16_rows_are_finite_where_numpy_says_so(bits: np.ndarray) -> None:
    flat = bits.view(np.float16)
    assert _finite_rows(flat).tolist() == np.isfinite(flat).all(1).tolist()
    assert _finite_rows(flat[:, ::2]).tolist() == np.isfinite(flat[:, ::2]).all(1).tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_the_stored_type_cannot_hold_is_refused_with_the_image_name(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, value: float
) -> None:
    grids = make_grids(3)
    grids[1, 0, 2, 3] = value
    with pytest.raises(ValueError, match=r"folder/10\.jpg"):
        write_shard(tmp_path / "s.h5", grids)
    assert files_below(tmp_path) == []


def test_a_refused_row_may_hold_anything(tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard) -> None:
    grids = make_grids(3)
    grids[1] = np.inf
    write_shard(tmp_path / "s.h5", grids, rejects={1: "no such file"})
    with ShardReader(tmp_path / "s.h5") as reader:
        assert reader.valid.tolist() == [True, False, True]
        assert np.isnan(read_all(reader)[1]).all()


@pytest.mark.parametrize("rows_written", [0, 1, 3])
def test_leaving_the_writer_by_an_exception_leaves_no_file(
    tmp_path: Path, make_grids: MakeGrids, rows_written: int
) -> None:
    def write_some() -> None:
        with ShardWriter(tmp_path / "s.h5", [1, 2, 3], ["a", "b", "c"], (2, 3, 4), "float16", MADE_BY) as writer:
            if rows_written:
                writer.write(0, make_grids(rows_written), {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_some()
    assert files_below(tmp_path) == []


def test_leaving_the_writer_unfinished_leaves_the_shard_that_was_there(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard
) -> None:
    write_shard(tmp_path / "s.h5", make_grids(2))
    before = (tmp_path / "s.h5").read_bytes()
    with ShardWriter(tmp_path / "s.h5", [1], ["a"], (2, 3, 4), "float16", MADE_BY) as writer:
        writer.write(0, make_grids(1), {})
    assert files_below(tmp_path) == ["s.h5"]
    assert (tmp_path / "s.h5").read_bytes() == before


def test_a_shard_with_rows_never_written_cannot_be_finished(tmp_path: Path, make_grids: MakeGrids) -> None:
    with ShardWriter(tmp_path / "s.h5", [1, 2, 3], ["a", "b", "c"], (2, 3, 4), "float16", MADE_BY) as writer:
        writer.write(1, make_grids(1), {})
        with pytest.raises(ValueError, match="2 rows of original were never written"):
            writer.finish()
    assert files_below(tmp_path) == []


def test_a_shard_that_the_disk_garbled_is_not_given_its_name(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read back before the rename: a bit is turned between the flush and that check."""
    flipped = []

    def flush_and_flip(path: Path) -> None:
        if path.is_file():
            flip_byte_of_row(path, 1)
            flipped.append(path)

    monkeypatch.setattr("gridcap.common.store.shard.fsync_path", flush_and_flip)
    with pytest.raises(StoreError, match=r"s\.h5: rows \[1\]"):
        write_shard(tmp_path / "s.h5", make_grids(2))
    assert flipped
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("row", [0, 2, 4])
def test_damaged_rows_finds_the_row_of_a_flipped_bit(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, row: int
) -> None:
    write_shard(tmp_path / "s.h5", make_grids(5), rejects={4: "refused rows are checked too"})
    flip_byte_of_row(tmp_path / "s.h5", row)
    with ShardReader(tmp_path / "s.h5") as reader:
        assert reader.corrupted_rows() == [row]


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_a_checked_read_refuses_a_damaged_row_and_no_other(tmp_path: Path, make_grids: MakeGrids, dtype: str) -> None:
    path = tmp_path / "s.h5"
    grids = make_grids(3).astype(np.float32 if dtype == "uint8" else dtype)
    attributes = {"index": 0, "plan": "p", "provenance": {"dtype": dtype}}
    with ShardWriter(path, range(3), ["a", "b", "c"], grids.shape[1:], dtype, attributes) as writer:
        writer.write(0, np.abs(grids), {})
        writer.finish()
    with ShardReader(path) as reader:
        out, before = np.empty(grids.shape[1:], reader.dtype), np.empty(grids.shape[1:], reader.dtype)
        reader.read_row(1, before, check=True)
    flip_byte_of_row(path, 1)
    with ShardReader(path) as reader:
        for row in (0, 2):
            reader.read_row(row, out, check=True)
        reader.read_row(1, out)
        assert not np.array_equal(out, before), "unchecked, it is given as it is"
        with pytest.raises(StoreError, match=r"s\.h5: row 1 is damaged") as caught:
            reader.read_row(1, out, check=True)
        assert "--repair" in str(caught.value.hint)


@pytest.mark.parametrize("kept", [0, 1, 100, 4096, -1])
def test_a_truncated_shard_is_refused_with_its_name(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, kept: int
) -> None:
    path = tmp_path / "00007.h5"
    write_shard(path, make_grids(5))
    size = path.stat().st_size
    os.truncate(path, kept if kept >= 0 else size - 1)
    with pytest.raises(StoreError, match=r"00007\.h5"):
        ShardReader(path)


def test_a_shard_cut_short_after_it_was_opened_does_not_give_made_up_rows(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard
) -> None:
    path, grids = tmp_path / "s.h5", make_grids(3)
    write_shard(path, grids)
    with h5py.File(path) as file:
        end_of_row_1 = file["features"].id.get_offset() + 2 * grids[0].nbytes
    with ShardReader(path) as reader:
        out = np.empty(grids.shape[1:], np.float16)
        reader.read_row(0, out)  # now the file is open
        os.truncate(path, end_of_row_1 + 1)
        reader.read_row(1, out)
        np.testing.assert_array_equal(out, grids[1])
        with pytest.raises(StoreError, match=r"s\.h5: ends inside row 2"):
            reader.read_row(2, out)


def test_what_is_no_shard_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("captions, not features\n" * 100)
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["features"] = np.zeros((2, 8))
    (tmp_path / "folder").mkdir()
    for name, why in (
        ("text.h5", "not a readable HDF5 file"),
        ("foreign.h5", "no gridcap features"),
        ("folder", "is a folder"),
        ("missing.h5", "no such file"),
    ):
        with pytest.raises(StoreError, match=why) as caught:
            ShardReader(tmp_path / name)
        assert str(tmp_path / name) in caught.value.message


def test_a_shard_of_a_newer_version_is_refused_with_both_versions(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard
) -> None:
    write_shard(tmp_path / "s.h5", make_grids(1))
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file.attrs["version"] = 3
    with pytest.raises(StoreError, match=r"s\.h5: format version 3, .* version 2") as caught:
        ShardReader(tmp_path / "s.h5")
    assert "update" in caught.value.hint


@pytest.mark.parametrize("gone", ["features", "image_id", "file_name", "valid", "crc32", "reject_row", "reject_why"])
def test_a_shard_without_one_of_its_arrays_is_refused(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, gone: str
) -> None:
    write_shard(tmp_path / "s.h5", make_grids(2))
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        del file[gone]
    with pytest.raises(StoreError, match=gone):
        ShardReader(tmp_path / "s.h5")


@pytest.mark.parametrize("short", ["image_id", "file_name", "valid", "crc32"])
def test_a_shard_whose_arrays_have_different_lengths_is_refused(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, short: str
) -> None:
    write_shard(tmp_path / "s.h5", make_grids(3))
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        kept = file[short][:2]
        del file[short]
        file[short] = kept
    with pytest.raises(StoreError, match="different lengths"):
        ShardReader(tmp_path / "s.h5")


def test_a_compressed_rewrite_reads_the_same(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, rewrite_compressed: Callable[[Path, Path], None]
) -> None:
    write_shard(tmp_path / "ours.h5", make_grids(5), rejects={3: "not an image"})
    rewrite_compressed(tmp_path / "ours.h5", tmp_path / "theirs.h5")
    with ShardReader(tmp_path / "ours.h5") as ours, ShardReader(tmp_path / "theirs.h5") as theirs:
        assert read_all(theirs).tobytes() == read_all(ours).tobytes()
        assert theirs.corrupted_rows() == []
        assert theirs.rejects == ours.rejects
        assert theirs.provenance == ours.provenance
        assert theirs.file_names == ours.file_names


@pytest.mark.parametrize("compressed", [False, True])
def test_a_pickled_reader_reads_on_its_own(
    tmp_path: Path,
    make_grids: MakeGrids,
    write_shard: WriteShard,
    rewrite_compressed: Callable[[Path, Path], None],
    compressed: bool,
) -> None:
    """The open file stays behind: closing the original must not take the copy's descriptor away, or share it."""
    path, grids = tmp_path / "s.h5", make_grids(3)
    write_shard(path, grids)
    if compressed:
        rewrite_compressed(path, tmp_path / "z.h5")
        path = tmp_path / "z.h5"
    reader = ShardReader(path)
    read_all(reader)  # now its file is open
    copy = pickle.loads(pickle.dumps(reader))
    reader.close()
    np.testing.assert_array_equal(read_all(copy), grids)
    copy.close()


def test_a_closed_reader_opens_again_on_the_next_read(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard
) -> None:
    grids = make_grids(3)
    write_shard(tmp_path / "s.h5", grids)
    reader = ShardReader(tmp_path / "s.h5")
    for _ in range(2):
        np.testing.assert_array_equal(read_all(reader), grids)
        reader.close()


def test_every_file_that_threads_opened_is_closed(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reads of two threads at once: opening is held up, so that both find no open file."""
    grids = make_grids(4)
    write_shard(tmp_path / "s.h5", grids)
    opened: list[int] = []
    really_open = os.open

    def slow_open(path: Any, flags: int, *rest: Any) -> int:
        time.sleep(0.05)
        opened.append(really_open(path, flags, *rest))
        return opened[-1]

    reader, out = ShardReader(tmp_path / "s.h5"), np.empty_like(grids)
    monkeypatch.setattr("os.open", slow_open)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: reader.read_row(row, out[row]), range(4)))
    monkeypatch.undo()
    reader.close()
    np.testing.assert_array_equal(out, grids)
    assert opened
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from gridcap.common.store.shard_writer import ShardWriter

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    made_by = {"index": 0, "plan": "p"}
    with ShardWriter(Path(sys.argv[1]), list(range(200)), ["a"] * 200, (2, 3, 400), "float16", made_by) as writer:
        for start in range(0, 200, 10):
            writer.write(start, np.ones((10, 2, 3, 400), np.float16), {})
        writer.finish()
except OSError as error:
    print("OSError", error.errno)
"""


def test_a_full_disk_is_an_os_error_and_leaves_no_file(tmp_path: Path) -> None:
    """A limit on the file's size stands for the full disk: HDF5 meets it when it flushes, and again on closing."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "s.h5")], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("OSError"), done.stderr
    assert done.returncode == 0, done.stderr
    assert files_below(tmp_path) == []


def test_a_writer_that_cannot_begin_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        ShardWriter(tmp_path / "s.h5", [1], ["caf\udce9.jpg"], (2, 3, 4), "float16", MADE_BY)
    assert files_below(tmp_path) == []


def test_damaged_rows_finds_a_damaged_row_of_a_compressed_rewrite(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, rewrite_compressed: Callable[[Path, Path], None]
) -> None:
    write_shard(tmp_path / "ours.h5", make_grids(3))
    rewrite_compressed(tmp_path / "ours.h5", tmp_path / "theirs.h5")
    with h5py.File(tmp_path / "theirs.h5") as file:
        chunk = file["features"].id.get_chunk_info(1)
    with open(tmp_path / "theirs.h5", "r+b") as raw:
        raw.seek(chunk.byte_offset + chunk.size - 4)
        raw.write(b"\0\0\0\0")  # the checksum of zlib's stream
    with ShardReader(tmp_path / "theirs.h5") as reader:
        assert reader.corrupted_rows() == [1]


@pytest.mark.parametrize(("attribute", "value"), [("format", np.array([1, 2])), ("version", "two")])
def test_odd_attributes_are_refused_like_any_other_file(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard, attribute: str, value: object
) -> None:
    write_shard(tmp_path / "s.h5", make_grids(1))
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file.attrs[attribute] = value
    with pytest.raises(StoreError, match=r"s\.h5"):
        ShardReader(tmp_path / "s.h5")


def test_another_file_in_the_place_of_an_open_one_is_not_read(
    tmp_path: Path, make_grids: MakeGrids, write_shard: WriteShard
) -> None:
    """Its rows may lie elsewhere, and are of other images: a reader that comes back to it says so."""
    path = tmp_path / "s.h5"
    write_shard(path, make_grids(3))
    reader = ShardReader(path)
    copy = pickle.loads(pickle.dumps(reader))
    write_shard(path, make_grids(3, seed=9))
    for each in (reader, copy):
        with pytest.raises(StoreError, match=r"s\.h5: was replaced or changed"):
            read_all(each)


def test_8_bits_refuse_what_they_cannot_hold(tmp_path: Path, make_grids: MakeGrids) -> None:
    for value in (-1.0, 66000.0, np.inf, np.nan):
        with ShardWriter(tmp_path / "s.h5", [1], ["a.jpg"], (2, 3, 4), "uint8", MADE_BY) as writer:
            grid = np.full((1, 2, 3, 4), value, np.float32)
            with pytest.raises(InvalidGridError, match=r"a\.jpg.*uint8"):
                writer.write(0, grid, {})
