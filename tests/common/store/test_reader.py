"""The feature store reads like a NumPy array, and h5py reads the same values."""

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

from gridcap.common.errors import InvalidImageError, StoreError
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_format import GridLayout, ShardInfo, ShardSpec, read_header
from gridcap.common.store.shard_writer import ShardWriter
from tests.torture.forge import sign_index

SIZES = (3, 4, 2)  # rows of each shard of the shared store
INVALID = {1: "not an image", 5: "empty file", 6: "no such file"}
VALID = [0, 2, 3, 4, 7, 8]

WriteStore = Callable[..., tuple[Path, np.ndarray]]
Provenance = dict[str, Any]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, write_store: WriteStore) -> tuple[Path, np.ndarray]:
    """The index of a store with invalid images, and its grids. Tests must not change it."""
    return write_store(tmp_path_factory.mktemp("features") / "train.h5", SIZES, INVALID)


@pytest.fixture(scope="module")
def valid_store(tmp_path_factory: pytest.TempPathFactory, write_store: WriteStore) -> tuple[Path, np.ndarray]:
    """The index of a store without invalid images, and its grids. Tests must not change it."""
    return write_store(tmp_path_factory.mktemp("features") / "train.h5", SIZES)


# --------------------------------------------------------------------------------------------- indexing


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.integers(-9, 8), max_size=30), threads=st.integers(1, 3), give_out=st.booleans())
def test_rows_returns_any_rows_in_any_order_with_repeats(
    store: tuple[Path, np.ndarray], rows: list[int], threads: int, give_out: bool
) -> None:
    path, grids = store
    out = np.full((len(rows), *grids.shape[1:]), 7, grids.dtype) if give_out else None
    with FeatureStore(path, threads) as features:
        got = features.rows(rows, out=out, allow_invalid=True)
    assert out is None or got is out
    assert (got.shape, got.dtype) == ((len(rows), *grids.shape[1:]), grids.dtype)
    np.testing.assert_array_equal(got, grids[rows])


@pytest.mark.parametrize(
    "key",
    [
        0,
        -1,
        np.int64(4),
        slice(2, 5),
        slice(None, None, -2),
        slice(-3, 100),
        [3, 5, 8],
        [-1, 0],
        [],
        range(1, 9, 3),
        np.array([8, 2], np.uint8),
        np.array([-9, 8]),
        np.arange(9) % 2 == 0,
        [True] * 9,
        np.zeros(9, bool),
    ],
    ids=str,
)
def test_indexing_follows_numpy(valid_store: tuple[Path, np.ndarray], key: Any) -> None:
    path, grids = valid_store
    with FeatureStore(path) as features:
        got = features[key]
    want = grids[key]
    assert got.shape == want.shape
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "key",
    [9, -10, [0, 9], [0, -10], [True, False], np.ones(8, bool), np.ones(10, bool), True, "3", 1.0, [0.5]],
    ids=str,
)
def test_invalid_index_raises_index_error(valid_store: tuple[Path, np.ndarray], key: Any) -> None:
    with FeatureStore(valid_store[0]) as features, pytest.raises(IndexError):
        features[key]


@pytest.mark.parametrize("key", [(0, 1), [[0, 1]]], ids=str)
def test_indexing_has_one_axis(valid_store: tuple[Path, np.ndarray], key: Any) -> None:
    with FeatureStore(valid_store[0]) as features, pytest.raises(IndexError):
        features[key]


@pytest.mark.parametrize("as_text", [False, True])
def test_store_attributes(store: tuple[Path, np.ndarray], provenance: Provenance, as_text: bool) -> None:
    path, grids = store
    with FeatureStore(str(path) if as_text else path) as features:
        assert features.path == path
        assert len(features) == len(grids)
        assert features.image_id.dtype == np.int64
        assert features.image_id.tolist() == [10 * row for row in range(9)]
        assert features.file_name == [f"folder/{10 * row}.jpg" for row in range(9)]
        assert features.valid.dtype == bool
        assert np.flatnonzero(features.valid).tolist() == VALID
        assert features.invalid_reasons == INVALID
        assert (features.grid_shape, features.dtype) == (grids.shape[1:], np.float16)
        assert (features.split, features.provenance) == ("train", provenance)
        assert "images=9" in repr(features)


@pytest.mark.parametrize("key", [1, [0, 1], slice(None)], ids=str)
def test_invalid_image_raises_error_with_name_and_reason(store: tuple[Path, np.ndarray], key: Any) -> None:
    with FeatureStore(store[0]) as features, pytest.raises(InvalidImageError, match=r"folder/10\.jpg.*not an image"):
        features[key]


def test_valid_mask_selects_valid_images(store: tuple[Path, np.ndarray]) -> None:
    path, grids = store
    with FeatureStore(path) as features:
        np.testing.assert_array_equal(features[features.valid], grids[VALID])
        assert np.isnan(features.rows([1], allow_invalid=True)).all()


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 6), (4, [4, 2]), (6, [6]), (100, [6])])
def test_batches_skip_invalid_images(store: tuple[Path, np.ndarray], batch_size: int, sizes: list[int]) -> None:
    path, grids = store
    with FeatureStore(path) as features:
        batches = list(features.batches(batch_size))
        everything = list(features.batches(5, allow_invalid=True))
        with pytest.raises(ValueError, match="batch_size"):
            list(features.batches(0))
    assert [len(ids) for _, ids in batches] == sizes
    assert np.concatenate([ids for _, ids in batches]).tolist() == [10 * row for row in VALID]
    np.testing.assert_array_equal(np.concatenate([part for part, _ in batches]), grids[VALID])
    assert [len(ids) for _, ids in everything] == [5, 4]
    np.testing.assert_array_equal(np.concatenate([part for part, _ in everything]), grids)


def test_row_of_image(store: tuple[Path, np.ndarray]) -> None:
    with FeatureStore(store[0]) as features:
        assert [features.row_of_image(10 * row) for row in range(9)] == list(range(9))
        with pytest.raises(KeyError):
            features.row_of_image(5)


@pytest.fixture
def two_views(tmp_path: Path, make_grids: Callable[..., np.ndarray]) -> tuple[Path, np.ndarray]:
    """A single-shard store whose second view is the negated first."""
    grids, views = make_grids(3), ["original", "hflip"]
    provenance = {"grid_shape": [2, 3, 4], "dtype": "float16", "views": views}
    spec = ShardSpec(list(enumerate("abc")), GridLayout.from_provenance(provenance), provenance)
    with ShardWriter(tmp_path / "s.h5", spec) as writer:
        writer.write(0, grids.copy(), {})
        writer.write(0, -grids, {}, "hflip")
        writer.finish()
    return tmp_path / "s.h5", grids


def test_rows_of_views(two_views: tuple[Path, np.ndarray]) -> None:
    path, grids = two_views
    with FeatureStore(path) as features:
        assert features.views == ("original", "hflip")
        np.testing.assert_array_equal(features[:], grids)
        np.testing.assert_array_equal(features.rows([2, 0], views="hflip"), -grids[[2, 0]])
        np.testing.assert_array_equal(features.rows([2, 0], views=[1, 0]), [-grids[2], grids[0]])
        np.testing.assert_array_equal(np.concatenate([g for g, _ in features.batches(2, view="hflip")]), -grids)
        for views in ([-1], [2], [0, 0]):
            with pytest.raises(IndexError, match="view"):
                features.rows([0], views=views)
        with pytest.raises(StoreError, match="no view 'vflip'") as caught:
            features.rows([0], views="vflip")
        assert "original, hflip" in caught.value.hint


@pytest.mark.parametrize("out", [np.zeros((1, 2, 3, 4), np.float32), np.zeros((1, 4, 3, 4), np.float16)])
def test_out_of_another_type_or_shape_raises(store: tuple[Path, np.ndarray], out: np.ndarray) -> None:
    with FeatureStore(store[0]) as features, pytest.raises(ValueError, match="out"):
        features.rows([0], out=out)


def test_file_names_are_a_sequence(store: tuple[Path, np.ndarray]) -> None:
    names = [f"folder/{10 * row}.jpg" for row in range(9)]
    with FeatureStore(store[0]) as features:
        assert len(features.file_name) == 9
        assert features.file_name[-1] == names[-1]
        for part in (slice(2, 4), slice(None), slice(None, None, -2), slice(5, 2)):
            assert features.file_name[part] == names[part]
        assert list(features.file_name) == names
        with pytest.raises(IndexError):
            features.file_name[9]


# ----------------------------------------------------------------------------- threads, processes, files


def test_concurrent_reads(valid_store: tuple[Path, np.ndarray]) -> None:
    path, grids = valid_store
    orders = [np.random.default_rng(seed).integers(0, len(grids), 20) for seed in range(40)]
    with FeatureStore(path, num_threads=2) as features, ThreadPoolExecutor(8) as pool:
        for order, got in zip(orders, pool.map(features.rows, orders), strict=True):
            np.testing.assert_array_equal(got, grids[order])


def test_pickled_store_opens_its_own_files(valid_store: tuple[Path, np.ndarray]) -> None:
    path, grids = valid_store
    features = FeatureStore(path)
    features[:]  # opens files and threads
    copy = pickle.loads(pickle.dumps(features))
    features.close()
    np.testing.assert_array_equal(copy[:], grids)
    copy.close()


def test_closed_store_reopens_on_the_next_read(valid_store: tuple[Path, np.ndarray]) -> None:
    path, grids = valid_store
    features = FeatureStore(path)
    for _ in range(2):
        np.testing.assert_array_equal(features[:], grids)
        features.close()


FORK = """
import os, sys, time
from gridcap import FeatureStore

features = FeatureStore(sys.argv[1])
features[:]
list(features._pool.map(time.sleep, [0.1] * 2))  # now both threads are running
child = os.fork()
if child == 0:
    features[:]
    features.close()
    features[:]
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_process_reads_and_closes(valid_store: tuple[Path, np.ndarray]) -> None:
    """As in the workers of a DataLoader on Linux. The timeout only ends a deadlock."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK, str(valid_store[0])], check=True, timeout=60)


FORK_WHILE_LOCKED = """
import os, sys, threading
from gridcap.common.store.pinned_file import open_lock
from gridcap.common.store.reader import FeatureStore

features = FeatureStore(sys.argv[1])
features[0]
held, done = threading.Event(), threading.Event()

def hold():
    with open_lock(), features._shards._locked():
        held.set()
        done.wait()

threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    if sys.argv[2] == "close":
        features.close()
    os._exit(0 if features[[0, 5, 8]].shape[0] == 3 else 1)
_, status = os.waitpid(child, 0)
done.set()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("first", ["read", "close"])
def test_process_forked_while_locked_does_not_deadlock(valid_store: tuple[Path, np.ndarray], first: str) -> None:
    """The thread that holds the locks does not exist in the child and never releases them."""
    command = [sys.executable, "-W", "ignore", "-c", FORK_WHILE_LOCKED, str(valid_store[0]), first]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_number_of_open_files_is_bounded(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gridcap.common.store.open_shards.MAX_OPEN_SHARDS", 3)
    path, grids = write_store(tmp_path / "train.h5", sizes=(2,) * 12)
    shards = {shard.resolve() for shard in (tmp_path / "train").iterdir()}

    def count_open() -> int:
        return sum(link.resolve() in shards for link in Path("/proc/self/fd").iterdir())

    with FeatureStore(path) as features:
        rng = np.random.default_rng(0)
        for _ in range(40):
            rows = rng.integers(0, 24, 2)
            np.testing.assert_array_equal(features[rows], grids[rows])
            assert count_open() <= 3
        np.testing.assert_array_equal(features[::-1], grids[::-1])
        assert count_open() <= 3, "one read that touches all shards"
    assert count_open() == 0


LOW_LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np
from gridcap import FeatureStore

with FeatureStore(sys.argv[1]) as features:
    assert features[:].shape[0] == len(features)
    assert features[np.random.default_rng(0).permutation(len(features))].shape[0] == len(features)
"""


def test_one_read_may_touch_more_shards_than_the_limit_of_open_files(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5", sizes=(1,) * 100)
    done = subprocess.run([sys.executable, "-c", LOW_LIMIT, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_concurrent_reads_do_not_close_each_others_files(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gridcap.common.store.open_shards.MAX_OPEN_SHARDS", 1)
    path, grids = write_store(tmp_path / "train.h5", sizes=(2,) * 8)

    def read(seed: int) -> bool:
        rows = np.random.default_rng(seed).integers(0, 16, 5)
        return bool((features[rows] == grids[rows]).all())

    with FeatureStore(path) as features, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(300)))


# --------------------------------------------------------------------------------------- kinds of stores


def test_single_shard_is_a_store(
    tmp_path: Path,
    make_grids: Callable[..., np.ndarray],
    write_shard: Callable[..., ShardInfo],
    provenance: Provenance,
) -> None:
    grids = make_grids(4)
    write_shard(tmp_path / "feats.h5", grids, invalid_reasons={2: "not an image"})
    with FeatureStore(tmp_path / "feats.h5") as features:
        assert len(features) == 4
        assert (features.split, features.provenance) == ("train", provenance)
        assert features.invalid_reasons == {2: "not an image"}
        np.testing.assert_array_equal(features[[3, 0]], grids[[3, 0]])


def test_store_with_a_compressed_shard_reads_the_same(
    tmp_path: Path, write_store: WriteStore, rewrite_compressed: Callable[[Path, Path], None]
) -> None:
    path, grids = write_store(tmp_path / "train.h5")
    shard = tmp_path / "train" / "00001.h5"
    rewrite_compressed(shard, tmp_path / "z.h5")
    (tmp_path / "z.h5").replace(shard)
    order = [8, 3, 4, 0, 6, 5, 3]
    with FeatureStore(path) as features:
        np.testing.assert_array_equal(features[order], grids[order])


PLAIN_H5PY = """
import sys
import h5py, numpy
with h5py.File(sys.argv[1], "r") as file:
    numpy.savez(sys.argv[2], features=file["features"][:], valid=file["valid"][:], ids=file["image_id"][:],
                names=file["file_name"].asstr()[:].astype("U"))
assert "gridcap" not in sys.modules
"""


def test_plain_h5py_reads_the_same_values(store: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """In a process that imports only h5py and NumPy and runs in another folder."""
    path, grids = store
    subprocess.run([sys.executable, "-c", PLAIN_H5PY, str(path), str(tmp_path / "got.npz")], check=True, cwd=tmp_path)
    got = np.load(tmp_path / "got.npz")
    assert got["features"].dtype == grids.dtype
    np.testing.assert_array_equal(got["features"], grids)
    with FeatureStore(path) as features:
        np.testing.assert_array_equal(got["features"], features.rows(slice(None), allow_invalid=True))
        assert got["ids"].tolist() == features.image_id.tolist()
        assert got["valid"].tolist() == features.valid.tolist()
        assert got["names"].tolist() == features.file_name


def test_moved_store_reads_the_same(tmp_path: Path, write_store: WriteStore) -> None:
    path, grids = write_store(tmp_path / "old" / "features" / "train.h5")
    (tmp_path / "old").rename(tmp_path / "new")
    path = tmp_path / "new" / "features" / "train.h5"
    with FeatureStore(path) as features, h5py.File(path) as file:
        np.testing.assert_array_equal(features[:], grids)
        np.testing.assert_array_equal(file["features"][:], grids)


def test_missing_shard_raises_here_and_is_nan_for_plain_h5py(tmp_path: Path, write_store: WriteStore) -> None:
    """HDF5 hides a missing source behind the fill value, which is NaN because zeros could be features."""
    path, grids = write_store(tmp_path / "train.h5")
    (tmp_path / "train" / "00001.h5").unlink()
    with pytest.raises(StoreError, match=r"00001\.h5: no such file"):
        FeatureStore(path)
    with h5py.File(path) as file:
        assert np.isnan(file["features"][3:7]).all()
        np.testing.assert_array_equal(file["features"][:3], grids[:3])
        np.testing.assert_array_equal(file["features"][7:], grids[7:])


def test_same_store_has_the_same_bytes(tmp_path: Path, write_store: WriteStore) -> None:
    """HDF5 stores times in whole seconds where it stores them at all, so the second store is written a second later."""
    write_store(tmp_path / "a" / "train.h5", SIZES, INVALID)
    time.sleep(1.01 - time.time() % 1)
    write_store(tmp_path / "b" / "train.h5", SIZES, INVALID)
    for name in ("train.h5", "train/00000.h5", "train/00002.h5"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["100%best", "a%b"])
def test_percent_sign_in_the_name_of_a_store(tmp_path: Path, write_store: WriteStore, name: str) -> None:
    path, grids = write_store(tmp_path / f"{name}.h5")
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["features"][:], grids)


# ---------------------------------------------------------------------------------------- errors on opening


def test_store_without_index_is_reported_as_incomplete(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    path.unlink()
    with pytest.raises(StoreError, match=r"train\.h5: not complete yet") as caught:
        FeatureStore(path)
    assert "same extract-features command" in caught.value.hint


def test_folder_instead_of_index_raises_error_that_names_the_index(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with pytest.raises(StoreError, match="is a folder") as caught:
        FeatureStore(path.with_suffix(""))
    assert str(path) in caught.value.hint


def test_shard_of_another_plan_raises(
    tmp_path: Path,
    write_store: WriteStore,
    make_grids: Callable[..., np.ndarray],
    write_shard: Callable[..., ShardInfo],
) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    write_shard(tmp_path / "train" / "00002.h5", make_grids(2), first=7, index=2, plan="another plan")
    with pytest.raises(StoreError, match=r"00002\.h5: belongs to another store"):
        FeatureStore(path)


def test_shard_with_another_number_of_rows_raises(
    tmp_path: Path,
    write_store: WriteStore,
    make_grids: Callable[..., np.ndarray],
    write_shard: Callable[..., ShardInfo],
) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    write_shard(tmp_path / "train" / "00002.h5", make_grids(3), first=7, index=2)
    with pytest.raises(StoreError, match="has 3 rows, but the index has 2"):
        FeatureStore(path)


@pytest.mark.parametrize("name", ["../train/00000.h5", "train/../../00000.h5", "/etc/passwd"])
def test_index_with_a_shard_outside_its_folder_raises(tmp_path: Path, write_store: WriteStore, name: str) -> None:
    path, _ = write_store(tmp_path / "train.h5", sizes=(3,))
    with h5py.File(path, "r+") as file:
        del file["shard_name"]
        file["shard_name"] = np.array([name.encode()], h5py.string_dtype("utf-8", len(name)))
    sign_index(path)
    with pytest.raises(StoreError, match="outside its folder"):
        FeatureStore(path)


def test_index_of_another_version_raises(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 4
    sign_index(path)
    with pytest.raises(StoreError, match="format version 4"):
        FeatureStore(path)


@pytest.mark.parametrize("missing", ["shard_name", "shard_rows", "provenance"])
def test_index_without_a_part_raises(tmp_path: Path, write_store: WriteStore, missing: str) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with h5py.File(path, "r+") as file:
        if missing == "provenance":
            del file.attrs[missing]
        else:
            del file[missing]
    sign_index(path)
    with pytest.raises(StoreError, match=r"train\.h5: corrupted index"):
        FeatureStore(path)


@pytest.mark.parametrize("layout", ['"grid_shape": 3', '"dtype": "object"', '"views": 1', '"grid_shape": [0, "a"]'])
def test_index_with_an_impossible_layout_raises(tmp_path: Path, write_store: WriteStore, layout: str) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["provenance"] = f'{{"grid_shape": [2, 3, 4], "dtype": "float16", {layout}}}'
    sign_index(path)
    with pytest.raises(StoreError, match=r"train\.h5: corrupted index"):
        FeatureStore(path)


def test_exchanged_shards_raise(tmp_path: Path, write_store: WriteStore) -> None:
    """The index lists image ids by row: with two shards exchanged, images would get each other's grids."""
    path, _ = write_store(tmp_path / "train.h5", sizes=(3, 3))
    one, two = tmp_path / "train" / "00000.h5", tmp_path / "train" / "00001.h5"
    shutil.move(one, tmp_path / "x.h5")
    shutil.move(two, one)
    shutil.move(tmp_path / "x.h5", two)
    with pytest.raises(StoreError, match=r"0000\d\.h5: is shard"):
        FeatureStore(path)


def test_shard_with_other_grids_than_the_indexed_one_raises(
    tmp_path: Path,
    write_store: WriteStore,
    make_grids: Callable[..., np.ndarray],
    write_shard: Callable[..., ShardInfo],
) -> None:
    """Same plan, position, and number of rows: only the checksum differs."""
    path, _ = write_store(tmp_path / "train.h5")
    write_shard(tmp_path / "train" / "00001.h5", make_grids(4, seed=77), first=3, index=1)
    with pytest.raises(StoreError, match=r"00001\.h5: belongs to another store"):
        FeatureStore(path)


def test_truncated_shard_is_detected_when_the_store_is_opened(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    shard = tmp_path / "train" / "00002.h5"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(StoreError, match=r"00002\.h5: truncated"):
        FeatureStore(path)


def test_item_23_remedy_for_a_truncated_single_shard_covers_imported_stores(
    tmp_path: Path, make_grids: Callable[..., np.ndarray], write_shard: Callable[..., Any]
) -> None:
    """`extract-features` cannot recreate a store that `gridcap import` wrote."""
    write_shard(tmp_path / "imported.h5", make_grids(3))
    os.truncate(tmp_path / "imported.h5", (tmp_path / "imported.h5").stat().st_size - 10)
    with pytest.raises(StoreError, match=r"imported\.h5: truncated") as caught:
        read_header(tmp_path / "imported.h5")
    assert "gridcap import" in caught.value.hint


def test_repeated_image_id_raises_error_that_names_both_images(tmp_path: Path, write_store: WriteStore) -> None:
    path, grids = write_store(tmp_path / "train.h5")
    with h5py.File(path, "r+") as file:
        file["image_id"][5] = 20
    sign_index(path)
    with FeatureStore(path) as features:
        with pytest.raises(StoreError, match=r"folder/20\.jpg and folder/50\.jpg have the same image id 20"):
            features.row_of_image(0)
        np.testing.assert_array_equal(features[5], grids[5])
