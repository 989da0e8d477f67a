"""The store: many shards as one array, for our reader and for anyone's h5py."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import MismatchError, StoreError
from common.header import pack_header
from common.shard import ShardInfo
from common.store import FeatureStore, check_same_features, differences
from torture.forge import sign_index

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

    monkeypatch.setattr("common.store.unpack_header", removed)
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
    monkeypatch.setattr("common.store._virtual_datasets", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_store(tmp_path / "train.h5")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []


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
from common.store import FeatureStore

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


# ---------------------------------------------------------------------------------------- same features?

CHANGES: dict[str, tuple[Any, tuple[str, ...]]] = {  # key -> another value, and what the message must show
    "encoder": ("resnet101", ("inception_v3", "resnet101")),
    "layer": ("layer4", ("Mixed_7c", "layer4")),
    "weights": ({"name": "mine.pth", "sha256": "cd" * 32}, ("imagenet", "abababab", "mine.pth", "cdcdcdcd")),
    "preprocessing": ({"geometry": "crop", "side": 299}, ("stretch", "crop")),
    "grid_shape": ([2, 3, 8], ("[2, 3, 4]", "[2, 3, 8]")),
    "dtype": ("float32", ("float16", "float32")),
}


def test_the_same_features_are_accepted_whatever_else_differs(provenance: Provenance) -> None:
    other = {**deepcopy(provenance), "versions": {"torch": "9.9"}, "precision": "bfloat16"}
    check_same_features(provenance, other, "runs/x was trained on", "test.h5 holds")


def test_weights_are_told_apart_by_their_sha256_not_their_name(provenance: Provenance) -> None:
    other = deepcopy(provenance)
    other["weights"]["name"] = "/elsewhere/inception_v3.pth"
    assert differences(provenance, other) == []


@pytest.mark.parametrize(
    "changed", [c for n in range(1, 4) for c in itertools.combinations(CHANGES, n)] + [tuple(CHANGES)]
)
def test_every_difference_of_features_is_listed_and_no_other(provenance: Provenance, changed: tuple[str, ...]) -> None:
    found = {**provenance, **{key: CHANGES[key][0] for key in changed}}
    with pytest.raises(MismatchError) as caught:
        check_same_features(provenance, found, "runs/x was trained on", "test.h5 holds")
    message = caught.value.what
    assert message.startswith("runs/x was trained on other features than test.h5 holds: ")
    assert [line.split()[0].partition(".")[0] for line in message.partition(": ")[2].split("; ")] == list(changed)
    for text in itertools.chain.from_iterable(CHANGES[key][1] for key in changed):
        assert text in message


def test_a_provenance_that_lacks_a_key_differs_in_it(provenance: Provenance) -> None:
    found = {key: value for key, value in provenance.items() if key != "layer"}
    (line,) = differences(provenance, found)
    assert line.startswith("layer")


def test_weights_of_unknown_sha256_are_the_same_only_if_all_else_is(provenance: Provenance) -> None:
    one, two = {"weights": {"name": "theirs"}}, {"weights": {"name": "others"}}
    assert differences({**provenance, **one}, {**provenance, **one}) == []
    assert len(differences({**provenance, **one}, {**provenance, **two})) == 1


# ------------------------------------------------------------------------------------------------------ many shards


def test_no_more_files_are_open_than_allowed_however_many_shards_there_are(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.store._OPEN_SHARDS", 3)
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
    monkeypatch.setattr("common.store._OPEN_SHARDS", 1)
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
from common.header import opening
from common.store import FeatureStore

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
