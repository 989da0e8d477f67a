"""The store: many shards as one array, for our reader and for anyone's h5py."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
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

from gridcap.common.errors import StoreError
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_format import ShardInfo
from tests.torture.forge import sign_index

SIZES = (3, 4, 2)  # rows of the shards of the store that all reading tests share
REJECTS = {1: "not an image", 5: "empty file", 6: "no such file"}

WriteStore = Callable[..., tuple[Path, np.ndarray]]
Provenance = dict[str, Any]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, write_store: WriteStore) -> tuple[Path, np.ndarray]:
    """The index of a store with refused images, and its rows. Not to be changed."""
    return write_store(tmp_path_factory.mktemp("features") / "train.h5", SIZES, REJECTS)


# ---------------------------------------------------------------------------------------------- reading


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.integers(0, sum(SIZES) - 1), max_size=30), threads=st.integers(1, 3), give_out=st.booleans())
def test_rows_are_those_written_in_any_order_and_with_repeats(
    store: tuple[Path, np.ndarray], rows: list[int], threads: int, give_out: bool
) -> None:
    path, grids = store
    out = np.full((len(rows), *grids.shape[1:]), 7, grids.dtype) if give_out else None
    with FeatureStore(path, threads) as features:
        got = features.rows(rows, out)
    assert out is None or got is out
    assert (got.shape, got.dtype) == ((len(rows), *grids.shape[1:]), grids.dtype)
    np.testing.assert_array_equal(got, grids[rows])


def test_a_store_says_what_it_holds(store: tuple[Path, np.ndarray], provenance: Provenance) -> None:
    path, grids = store
    with FeatureStore(path) as features:
        assert len(features) == len(grids)
        assert features.image_ids.tolist() == [10 * row for row in range(9)]
        assert features.file_names == [f"folder/{10 * row}.jpg" for row in range(9)]
        assert features.valid.tolist() == [row not in REJECTS for row in range(9)]
        assert features.rejects == REJECTS
        assert (features.grid_shape, features.dtype) == (grids.shape[1:], np.float16)
        assert (features.split, features.provenance) == ("train", provenance)


def test_a_grid_is_found_by_its_image_id(store: tuple[Path, np.ndarray]) -> None:
    path, grids = store
    with FeatureStore(path) as features:
        for row in range(len(grids)):
            np.testing.assert_array_equal(features.by_image_id(10 * row), grids[row])
            np.testing.assert_array_equal(features.row(row), grids[row])
        with pytest.raises(KeyError):
            features.by_image_id(5)


@pytest.mark.parametrize("rows", [[-1], [9], [0, 1, 9], [0, -9]])
def test_a_row_outside_of_the_store_is_an_index_error(store: tuple[Path, np.ndarray], rows: list[int]) -> None:
    """Never Python's counting from the end, and never another shard's bytes."""
    with FeatureStore(store[0]) as features, pytest.raises(IndexError, match="0 to 8"):
        features.rows(rows)


def test_many_threads_read_one_store_at_once(store: tuple[Path, np.ndarray]) -> None:
    path, grids = store
    orders = [np.random.default_rng(seed).integers(0, len(grids), 20) for seed in range(40)]
    with FeatureStore(path, threads=2) as features, ThreadPoolExecutor(8) as pool:
        for order, got in zip(orders, pool.map(features.rows, orders), strict=True):
            np.testing.assert_array_equal(got, grids[order])


def test_a_pickled_store_reads_on_its_own(store: tuple[Path, np.ndarray]) -> None:
    path, grids = store
    features = FeatureStore(path)
    features.rows(range(9))  # files and threads are open now
    copy = pickle.loads(pickle.dumps(features))
    features.close()
    np.testing.assert_array_equal(copy.rows(range(9)), grids)
    copy.close()


def test_a_closed_store_opens_again_on_the_next_read(store: tuple[Path, np.ndarray]) -> None:
    path, grids = store
    features = FeatureStore(path)
    for _ in range(2):
        np.testing.assert_array_equal(features.rows(range(9)), grids)
        features.close()


def test_a_single_shard_is_a_store(
    tmp_path: Path,
    make_grids: Callable[..., np.ndarray],
    write_shard: Callable[..., ShardInfo],
    provenance: Provenance,
) -> None:
    grids = make_grids(4)
    write_shard(tmp_path / "feats.h5", grids, rejects={2: "not an image"})
    with FeatureStore(tmp_path / "feats.h5") as features:
        assert len(features) == 4
        assert (features.split, features.provenance) == ("train", provenance)
        assert features.rejects == {2: "not an image"}
        np.testing.assert_array_equal(features.rows([3, 0]), grids[[3, 0]])


def test_a_store_with_a_compressed_shard_reads_the_same(
    tmp_path: Path, write_store: WriteStore, rewrite_compressed: Callable[[Path, Path], None]
) -> None:
    path, grids = write_store(tmp_path / "train.h5")
    shard = tmp_path / "train" / "00001.h5"
    rewrite_compressed(shard, tmp_path / "z.h5")
    (tmp_path / "z.h5").replace(shard)
    order = [8, 3, 4, 0, 6, 5, 3]
    with FeatureStore(path) as features:
        np.testing.assert_array_equal(features.rows(order), grids[order])


# ------------------------------------------------------------------------------------ other people's code

PLAIN_H5PY = """
import sys
import h5py, numpy
with h5py.File(sys.argv[1], "r") as file:
    numpy.savez(sys.argv[2], features=file["features"][:], valid=file["valid"][:], ids=file["image_id"][:],
                names=file["file_name"].asstr()[:].astype("U"))
assert not {"common", "extract", "train", "caption"} & set(sys.modules)
"""


def test_plain_h5py_reads_from_the_index_what_our_reader_reads(store: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """In a process of its own that has only h5py and numpy, started in another folder."""
    path, grids = store
    subprocess.run([sys.executable, "-c", PLAIN_H5PY, str(path), str(tmp_path / "got.npz")], check=True, cwd=tmp_path)
    got = np.load(tmp_path / "got.npz")
    assert got["features"].dtype == grids.dtype
    np.testing.assert_array_equal(got["features"], grids)
    with FeatureStore(path) as features:
        for row in range(len(features)):
            np.testing.assert_array_equal(got["features"][row], features.row(row))
        assert got["ids"].tolist() == features.image_ids.tolist()
        assert got["valid"].tolist() == features.valid.tolist()
        assert got["names"].tolist() == features.file_names


def test_a_moved_store_still_reads(tmp_path: Path, write_store: WriteStore) -> None:
    path, grids = write_store(tmp_path / "here" / "features" / "train.h5")
    (tmp_path / "here").rename(tmp_path / "there")
    path = tmp_path / "there" / "features" / "train.h5"
    with FeatureStore(path) as features, h5py.File(path) as file:
        np.testing.assert_array_equal(features.rows(range(9)), grids)
        np.testing.assert_array_equal(file["features"][:], grids)


def test_a_missing_shard_is_an_error_here_and_nan_for_plain_h5py(tmp_path: Path, write_store: WriteStore) -> None:
    """HDF5 hides a missing source file behind the fill value: NaN, since zeros would pass for features."""
    path, grids = write_store(tmp_path / "train.h5")
    (tmp_path / "train" / "00001.h5").unlink()
    with pytest.raises(StoreError, match=r"00001\.h5: no such file"):
        FeatureStore(path)
    with h5py.File(path) as file:
        assert np.isnan(file["features"][3:7]).all()
        np.testing.assert_array_equal(file["features"][:3], grids[:3])
        np.testing.assert_array_equal(file["features"][7:], grids[7:])


def test_a_store_has_the_same_bytes_whenever_it_is_written(tmp_path: Path, write_store: WriteStore) -> None:
    """HDF5 records whole seconds where it records times at all, so the second store is made a second later."""
    write_store(tmp_path / "a" / "train.h5", SIZES, REJECTS)
    time.sleep(1.01 - time.time() % 1)
    write_store(tmp_path / "b" / "train.h5", SIZES, REJECTS)
    for name in ("train.h5", "train/00000.h5", "train/00002.h5"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["100%best", "a%b"])
def test_a_per_cent_sign_in_the_name_of_a_store_is_a_letter_like_any_other(
    tmp_path: Path, write_store: WriteStore, name: str
) -> None:
    path, grids = write_store(tmp_path / f"{name}.h5")
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["features"][:], grids)


# ------------------------------------------------------------------------------------------ what is refused


def test_a_store_without_its_index_is_not_complete_yet(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    path.unlink()
    with pytest.raises(StoreError, match=r"train\.h5: not complete yet") as caught:
        FeatureStore(path)
    assert "same extract-features command" in caught.value.hint


def test_the_folder_given_for_the_index_is_refused_with_the_index_named(
    tmp_path: Path, write_store: WriteStore
) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with pytest.raises(StoreError, match="is a folder") as caught:
        FeatureStore(path.with_suffix(""))
    assert str(path) in caught.value.hint


def test_a_shard_of_another_plan_is_refused_with_its_name(
    tmp_path: Path,
    write_store: WriteStore,
    make_grids: Callable[..., np.ndarray],
    write_shard: Callable[..., ShardInfo],
) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    write_shard(tmp_path / "train" / "00002.h5", make_grids(2), first=7, index=2, plan="another plan")
    with pytest.raises(StoreError, match=r"00002\.h5: belongs to another store"):
        FeatureStore(path)


def test_a_shard_with_another_number_of_rows_is_refused(
    tmp_path: Path,
    write_store: WriteStore,
    make_grids: Callable[..., np.ndarray],
    write_shard: Callable[..., ShardInfo],
) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    write_shard(tmp_path / "train" / "00002.h5", make_grids(3), first=7, index=2)
    with pytest.raises(StoreError, match="has 3 rows, and the index says 2"):
        FeatureStore(path)


@pytest.mark.parametrize("name", ["../train/00000.h5", "train/../../00000.h5", "/etc/passwd"])
def test_an_index_that_names_a_shard_outside_of_its_folder_is_refused(
    tmp_path: Path, write_store: WriteStore, name: str
) -> None:
    path, _ = write_store(tmp_path / "train.h5", sizes=(3,))
    with h5py.File(path, "r+") as file:
        del file["shard_name"]
        file["shard_name"] = np.array([name.encode()], h5py.string_dtype("utf-8", len(name)))
    sign_index(path)
    with pytest.raises(StoreError, match="outside of its folder"):
        FeatureStore(path)


def test_an_index_of_a_newer_version_is_refused(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 3
    sign_index(path)
    with pytest.raises(StoreError, match="format version 3"):
        FeatureStore(path)


@pytest.mark.parametrize("gone", ["shard_name", "shard_rows", "provenance"])
def test_an_index_without_one_of_its_parts_is_refused(tmp_path: Path, write_store: WriteStore, gone: str) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with h5py.File(path, "r+") as file:
        if gone == "provenance":
            del file.attrs[gone]
        else:
            del file[gone]
    sign_index(path)
    with pytest.raises(StoreError, match=r"train\.h5"):
        FeatureStore(path)


def test_shards_that_changed_places_are_refused(tmp_path: Path, write_store: WriteStore) -> None:
    """The index lists the image ids by row; with two shards exchanged it would give images each other's grids."""
    path, _ = write_store(tmp_path / "train.h5", sizes=(3, 3))
    one, two = tmp_path / "train" / "00000.h5", tmp_path / "train" / "00001.h5"
    shutil.move(one, tmp_path / "x.h5")
    shutil.move(two, one)
    shutil.move(tmp_path / "x.h5", two)
    with pytest.raises(StoreError, match=r"0000\d\.h5"):
        FeatureStore(path)


@pytest.mark.parametrize("out", [np.zeros((1, 2, 3, 4), np.float32), np.zeros((1, 4, 3, 4), np.float16)])
def test_rows_does_not_fill_an_array_of_another_type_or_shape(store: tuple[Path, np.ndarray], out: np.ndarray) -> None:
    with FeatureStore(store[0]) as features, pytest.raises(ValueError, match="out"):
        features.rows([0], out)


FORKED = """
import os, sys
from pathlib import Path
from gridcap.common.store.reader import FeatureStore

features = FeatureStore(Path(sys.argv[1]))
features.rows(range(9))
child = os.fork()
if child == 0:
    features.rows(range(9))
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_reads_too(store: tuple[Path, np.ndarray]) -> None:
    """As in a torch DataLoader's workers on Linux. The time limit is there only to end a hang."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, str(store[0])], check=True, timeout=30)


def test_no_more_files_are_open_than_allowed_however_many_shards_there_are(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gridcap.common.store.reader._OPEN_SHARDS", 3)
    path, grids = write_store(tmp_path / "train.h5", sizes=(2,) * 12)
    mine = {p.resolve() for p in (tmp_path / "train").iterdir()}

    def open_now() -> int:
        return sum(link.resolve() in mine for link in Path("/proc/self/fd").iterdir())

    with FeatureStore(path) as features:
        rng = np.random.default_rng(0)
        for _ in range(40):
            rows = rng.integers(0, 24, 2)
            np.testing.assert_array_equal(features.rows(rows), grids[rows])
            assert open_now() <= 3
        np.testing.assert_array_equal(features.rows(range(24)), grids), "a batch may need more at once"
        features.row(0)
        assert open_now() <= 3
    assert open_now() == 0


def test_readers_in_many_threads_never_lose_their_file_to_others(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gridcap.common.store.reader._OPEN_SHARDS", 1)
    path, grids = write_store(tmp_path / "train.h5", sizes=(2,) * 8)

    def read(seed: int) -> bool:
        rows = np.random.default_rng(seed).integers(0, 16, 5)
        return bool((features.rows(rows) == grids[rows]).all())

    with FeatureStore(path) as features, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(300)))


def test_a_shard_made_again_with_other_numbers_is_not_the_one_that_was_indexed(
    tmp_path: Path,
    write_store: WriteStore,
    make_grids: Callable[..., np.ndarray],
    write_shard: Callable[..., ShardInfo],
) -> None:
    """Same plan, same place, same number of rows: only the hash tells."""
    path, _ = write_store(tmp_path / "train.h5")
    write_shard(tmp_path / "train" / "00001.h5", make_grids(4, seed=77), first=3, index=1)
    with pytest.raises(StoreError, match=r"00001\.h5: belongs to another store"):
        FeatureStore(path)


def test_a_truncated_shard_is_found_when_the_store_is_opened(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    shard = tmp_path / "train" / "00002.h5"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(StoreError, match=r"00002\.h5: truncated"):
        FeatureStore(path)


def test_two_images_with_one_id_are_named_and_not_confused(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with h5py.File(path, "r+") as file:
        file["image_id"][5] = 20
    sign_index(path)
    with FeatureStore(path) as features:
        with pytest.raises(StoreError, match=r"folder/20\.jpg and folder/50\.jpg share the image id 20"):
            features.row_of_image(0)
        np.testing.assert_array_equal(features.row(5), features.rows([5])[0])


def test_file_names_are_a_sequence_like_any_other(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with FeatureStore(path) as features:
        names = [f"folder/{10 * row}.jpg" for row in range(9)]
        assert (len(features.file_names), features.file_names[-1], features.file_names[2:4]) == (
            9,
            names[-1],
            names[2:4],
        )
        assert list(features.file_names) == names
        with pytest.raises(IndexError):
            features.file_names[9]


FORK_UNDER_LOCKS = """
import os, sys, threading
from pathlib import Path
from gridcap.common.store.pinned_file import open_lock
from gridcap.common.store.reader import FeatureStore

features = FeatureStore(Path(sys.argv[1]))
features.row(0)
held, done = threading.Event(), threading.Event()

def hold():
    with opening(), features._lock:
        held.set()
        done.wait()

threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    os._exit(0 if features.rows([0, 5, 8]).shape[0] == 3 else 1)
_, status = os.waitpid(child, 0)
done.set()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_child_forked_while_another_thread_reads_does_not_wait_for_it(
    store: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    """That thread is not there in the child, and would never let go of its locks."""
    done = subprocess.run([sys.executable, "-c", FORK_UNDER_LOCKS, str(store[0])], timeout=60, cwd=Path.cwd())
    assert done.returncode == 0
