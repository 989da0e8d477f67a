"""Import of every kind of source, and `gridcap import`."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import click.testing
import h5py
import numpy as np
import pytest

from gridcap.common.captions.records import ImageRecord, id_from_name
from gridcap.common.errors import FolderInUseError, GridcapError, MismatchError
from gridcap.common.store.reader import FeatureStore
from gridcap.extract.importers import sources
from gridcap.extract.importers.features import ImportRequest, import_features
from gridcap.extract.importers.matching import match_keys
from gridcap.extract.importers.source import SourceError
from gridcap.extract.importers.sources import open_source
from gridcap.extract.store_cli import import_features as command
from gridcap.extract.verify import verify_store

RECORDS = [ImageRecord(11, "b.jpg", ("a dog",)), ImageRecord(7, "a.jpg", ("a cat",))]


def grid(seed: int, shape: tuple[int, ...] = (3, 3, 5)) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype("f4")


def imported(source: Path, tmp_path: Path, records: list[ImageRecord] | None = RECORDS, dtype: str = "float32") -> Any:
    opened = open_source(source)
    pairs = match_keys(opened, records)
    import_features(ImportRequest(opened, pairs, source.name, tmp_path / "out.h5", "out", dtype, 2))
    return FeatureStore(tmp_path / "out.h5")


def assert_both(store: FeatureStore, dog: np.ndarray, cat: np.ndarray) -> None:
    assert store.image_id.tolist() == [11, 7], "images must be in the order of the captions file"
    assert store.file_name == ["b.jpg", "a.jpg"]
    assert store.valid.all()
    assert np.array_equal(store[0], dog)
    assert np.array_equal(store[store.row_of_image(7)], cat)


def test_import_of_a_folder_of_npy_files(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, seed in (("a.jpg", 1), ("b.jpg", 2), ("unused.jpg", 3)):
        np.save(folder / f"{name}.npy", grid(seed, (64, 70)))
    store = imported(folder, tmp_path)
    assert_both(store, grid(2, (64, 70)).reshape(8, 8, 70), grid(1, (64, 70)).reshape(8, 8, 70))
    assert store.provenance["encoder"] == "imported"
    assert store.provenance["layer"] == "folder of .npy"
    assert store.provenance["weights"]["name"] == "cache"


def test_import_of_a_folder_of_npz_files_by_image_id(tmp_path: Path) -> None:
    folder = tmp_path / "att"
    folder.mkdir()
    np.savez_compressed(folder / "7.npz", feat=grid(1), boxes=np.zeros(3))
    np.savez_compressed(folder / "11.npz", grid(2))
    assert_both(imported(folder, tmp_path), grid(2), grid(1))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_import_of_a_pickled_dict(tmp_path: Path, protocol: int, kind: Any) -> None:
    path = tmp_path / "encoded.pkl"
    path.write_bytes(pickle.dumps(kind({"a.jpg": grid(1), "b": grid(2)}), protocol))
    assert_both(imported(path, tmp_path), grid(2), grid(1))


@pytest.mark.parametrize("suffix", ["", "_grids", "_features"])
def test_import_of_hdf5_with_one_dataset_per_image(tmp_path: Path, suffix: str) -> None:
    with h5py.File(tmp_path / "g.h5", "w") as file:
        file[f"7{suffix}"], file[f"11{suffix}"] = grid(1), grid(2)
    assert_both(imported(tmp_path / "g.h5", tmp_path), grid(2), grid(1))


@pytest.mark.parametrize("names", [{"file_name": ["a.jpg", "b.jpg"]}, {"image_id": [7, 11]}])
def test_import_of_one_npz_with_a_scale(tmp_path: Path, names: dict[str, list[Any]]) -> None:
    features = np.random.default_rng(0).integers(0, 255, (2, 3, 3, 5), dtype=np.uint8)
    np.savez(tmp_path / "g.npz", features=features, scale=np.float32(0.5), **{k: np.array(v) for k, v in names.items()})
    assert_both(imported(tmp_path / "g.npz", tmp_path), features[1] * np.float32(0.5), features[0] * np.float32(0.5))


def test_import_of_one_hdf5_dataset(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "g.h5", "w") as file:
        file["features"] = np.stack([grid(1), grid(2)])
        file["file_name"] = ["a.jpg", "b.jpg"]
    assert_both(imported(tmp_path / "g.h5", tmp_path), grid(2), grid(1))


def test_without_captions_every_key_is_an_image_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps({"x.jpg": grid(1, (5,)), 42: grid(2, (5,))}))
    store = imported(path, tmp_path, records=None)
    assert store.image_id.tolist() == [id_from_name("x.jpg"), 42]
    assert store.grid_shape == (1, 1, 5)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_malicious_pickle_is_rejected_and_not_executed(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "malicious.pkl"
    path.write_bytes(pickle.dumps({"a.jpg": grid(1), "b.jpg": Malicious(tmp_path / "executed")}, protocol))
    with pytest.raises(SourceError, match=r"malicious\.pkl.*only NumPy arrays"):
        open_source(path)
    assert not (tmp_path / "executed").exists()


def test_an_object_array_is_rejected_and_not_executed(tmp_path: Path) -> None:
    folder = tmp_path / "npy"
    folder.mkdir()
    np.save(folder / "a.jpg.npy", np.array([Malicious(tmp_path / "executed")], dtype=object), allow_pickle=True)
    with pytest.raises(SourceError, match=r"a\.jpg"):
        imported(folder, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_images_of_different_shapes_are_rejected_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps({"a.jpg": grid(1), "b.jpg": grid(2, (2, 2, 5))}))
    with pytest.raises(SourceError, match=r"a\.jpg: has the shape \(3, 3, 5\), but the first image has \(2, 2, 5\)"):
        imported(path, tmp_path)
    assert not (tmp_path / "out.h5").exists()


def test_a_value_out_of_range_is_rejected_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps({"a.jpg": grid(1), "b.jpg": grid(2) * 1e6}))
    with pytest.raises(SourceError, match=r"b\.jpg") as caught:
        imported(path, tmp_path, dtype="float16")
    assert "--dtype float32" in caught.value.hint


def test_other_features_into_the_same_output_are_rejected(tmp_path: Path) -> None:
    for seed in (0, 5):
        (tmp_path / f"{seed}.pkl").write_bytes(pickle.dumps({"a.jpg": grid(seed), "b.jpg": grid(seed + 1)}))
    imported(tmp_path / "0.pkl", tmp_path)
    with pytest.raises(MismatchError, match="weights"):
        imported(tmp_path / "5.pkl", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.pkl", b"not a pickle"), ("a.npz", b"not a zip"), ("a.h5", b"not HDF5"), ("a.txt", b""), ("gone.pkl", None)],
)
def test_an_unreadable_source_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(GridcapError, match=name):
        open_source(tmp_path / name)


def test_the_command_counts_missing_features_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"a.jpg": grid(1)}))
    images = [{"id": 7, "file_name": "a.jpg"}, {"id": 11, "file_name": "b.jpg"}]
    captions = [{"id": 1, "image_id": 7, "caption": "a cat"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": captions}))
    arguments = [str(tmp_path / "p.pkl"), "--annotations", str(tmp_path / "c.json"), "--output", str(tmp_path / "o.h5")]
    run = click.testing.CliRunner().invoke
    dry = run(command, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "o.h5").exists()
    done = run(command, arguments)
    assert done.exit_code == 0, done.output
    assert "1 image of" in done.output
    assert "without features" in done.output
    assert FeatureStore(tmp_path / "o.h5").split == "o"
    assert run(command, [*arguments[:-1], "o.hdf"]).exit_code == 2


def test_a_rejected_import_does_not_modify_the_existing_store(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        np.savez(tmp_path / f"{name}.npz", features=np.full((3, 2, 2, 4), value, "f2"), file_name=["a", "b", "c"])
    run = click.testing.CliRunner().invoke
    assert run(command, [str(tmp_path / "one.npz"), "--output", str(tmp_path / "s.h5")]).exit_code == 0
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    rejected = run(command, [str(tmp_path / "two.npz"), "--output", str(tmp_path / "s.h5")])
    assert rejected.exit_code == 1
    assert "weights" in rejected.output
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_import_as_uint8(tmp_path: Path) -> None:
    grids = np.random.default_rng(0).random((3, 2, 2, 4)).astype("f4")
    np.savez(tmp_path / "f.npz", features=grids, file_name=["a.jpg", "b.jpg", "c.jpg"])
    arguments = [str(tmp_path / "f.npz"), "--output", str(tmp_path / "s.h5"), "--dtype", "uint8"]
    result = click.testing.CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    with FeatureStore(tmp_path / "s.h5") as store:
        np.testing.assert_allclose(store.rows(range(3)), grids, atol=0.004)
    np.savez(tmp_path / "f.npz", features=-grids, file_name=["a.jpg", "b.jpg", "c.jpg"])
    negative = click.testing.CliRunner().invoke(command, [*arguments[:2], str(tmp_path / "n.h5"), *arguments[3:]])
    assert negative.exit_code == 1
    assert "uint8 cannot represent" in negative.output


def test_item_20_bytes_keys_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bytes.pkl"
    path.write_bytes(pickle.dumps({b"a.jpg": grid(1), b"b.jpg": grid(2)}))
    assert_both(imported(path, tmp_path), grid(2), grid(1))


def test_item_20_keys_that_are_not_utf8_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "latin.pkl"
    path.write_bytes(pickle.dumps({b"\xe4.jpg": grid(1)}))
    with pytest.raises(SourceError, match=r"latin\.pkl.*utf-8"):
        open_source(path)


@pytest.mark.parametrize("names", [{"file_name": ["a", "a"]}, {"image_id": [7, 7]}, {"file_name": [b"a", b"a"]}])
@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_item_20_repeated_keys_are_rejected(tmp_path: Path, names: dict[str, list[Any]], suffix: str) -> None:
    path = tmp_path / f"repeated{suffix}"
    if suffix == ".npz":
        np.savez(path, features=np.stack([grid(1), grid(2)]), **{name: np.array(v) for name, v in names.items()})
    else:
        with h5py.File(path, "w") as file:
            file["features"] = np.stack([grid(1), grid(2)])
            file.update(names)
    with pytest.raises(SourceError, match=r"repeated.*occurs twice, at positions 0 and 1"):
        open_source(path)


def test_item_20_keys_that_differ_in_type_or_suffix_only_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "types.pkl").write_bytes(pickle.dumps({7: grid(1), "7": grid(2)}))
    with pytest.raises(SourceError, match="'7' occurs twice"):
        open_source(tmp_path / "types.pkl")
    with h5py.File(tmp_path / "suffixes.h5", "w") as file:
        file["7"], file["7_grids"] = grid(1), grid(2)
    with pytest.raises(SourceError, match="7 and 7_grids are for the same image"):
        open_source(tmp_path / "suffixes.h5")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_item_23_nan_features_do_not_suggest_another_dtype(tmp_path: Path, value: float, dtype: str) -> None:
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps({"a.jpg": grid(1), "b.jpg": np.full((3, 3, 5), value, "f4")}))
    with pytest.raises(SourceError, match=r"b\.jpg: contains NaN or infinity") as caught:
        imported(path, tmp_path, dtype=dtype)
    assert "dtype" not in caught.value.hint


def test_item_23_adaptive_region_features_are_named_as_unsupported(tmp_path: Path) -> None:
    folder = tmp_path / "cocobu_att"
    folder.mkdir()
    np.savez(folder / "7.npz", feat=grid(1, (36, 50)))
    np.savez(folder / "11.npz", feat=grid(2, (10, 50)))
    with pytest.raises(SourceError) as caught:
        imported(folder, tmp_path)
    assert "adaptive region features" in caught.value.hint
    assert "cocobu_att" not in str(command.epilog)


def test_item_30_one_large_hdf5_dataset_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 64
    with h5py.File(tmp_path / "large.h5", "w") as file:
        file["features"] = np.random.default_rng(0).random((count, 2, 2, 64)).astype("f4")
        file["file_name"] = [f"{i}.jpg" for i in range(count)]
    sizes: list[int] = []
    read = h5py.Dataset.__getitem__

    def recording(dataset: h5py.Dataset, *arguments: Any, **keywords: Any) -> Any:
        value = read(dataset, *arguments, **keywords)
        if dataset.name == "/features":
            sizes.append(value.nbytes)
        return value

    monkeypatch.setattr(h5py.Dataset, "__getitem__", recording)
    with imported(tmp_path / "large.h5", tmp_path / "out", records=None) as store:
        assert len(store) == count
    assert max(sizes) == 2 * 2 * 64 * 4, "one row at a time"


def test_item_01_two_imports_into_one_store_do_not_mix(tmp_path: Path) -> None:
    """Imports of the same and of other features start while the first one is writing."""
    for name, value in (("one", 1.0), ("two", 2.0)):
        np.savez(tmp_path / f"{name}.npz", features=np.full((4, 2, 2, 4), value, "f2"), file_name=list("abcd"))

    def request(name: str) -> ImportRequest:
        source = open_source(tmp_path / f"{name}.npz")
        return ImportRequest(source, match_keys(source, None), name, tmp_path / "s.h5", "s", "float16", 2)

    def start_others(_: int) -> None:
        for name in ("one", "two"):
            with pytest.raises(FolderInUseError, match="in use by process"):
                import_features(request(name))

    import_features(request("one"), start_others)
    with FeatureStore(tmp_path / "s.h5") as store:
        assert np.array_equal(store.rows(range(4)), np.ones((4, 2, 2, 4)))
    assert not verify_store(tmp_path / "s.h5").problems


def test_item_03_the_command_rejects_channel_first_features_and_takes_a_layout(tmp_path: Path) -> None:
    grids = np.random.default_rng(0).random((2, 3, 3, 20)).astype("f4")
    np.savez(tmp_path / "chw.npz", features=grids.transpose(0, 3, 1, 2), file_name=["a.jpg", "b.jpg"])
    arguments = [str(tmp_path / "chw.npz"), "--output", str(tmp_path / "s.h5"), "--dtype", "float32"]
    run = click.testing.CliRunner().invoke
    misread = run(command, arguments)
    assert misread.exit_code == 1
    assert "a.jpg: has the shape (20, 3, 3)" in misread.output
    assert "--layout chw" in misread.output
    assert not (tmp_path / "s.h5").exists()
    assert run(command, [*arguments, "--layout", "chw"]).exit_code == 0
    with FeatureStore(tmp_path / "s.h5") as store:
        assert np.array_equal(store[:], grids)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "x"), OSError(errno.EIO, "x")])
def test_item_11_a_source_that_the_system_cannot_read_is_not_called_corrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    path = tmp_path / "grids.h5"
    path.write_bytes(b"")
    monkeypatch.setattr(h5py, "File", fail)
    with pytest.raises(GridcapError) as caught:
        open_source(path)
    assert not isinstance(caught.value, SourceError)
    assert caught.value.message == f"{path}: {os.strerror(error.errno or 0)}"
    assert "use a folder" not in caught.value.hint


def test_item_11_an_array_that_the_system_cannot_read_is_not_called_corrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "a.jpg.npy", grid(1))
    source = open_source(tmp_path)
    request = ImportRequest(source, match_keys(source, None), "cache", tmp_path / "s.h5", "s")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(GridcapError) as caught:
        import_features(request)
    assert not isinstance(caught.value, SourceError)
    assert caught.value.message == f"cache: a.jpg: {os.strerror(errno.EIO)}"


def test_item_16_a_source_larger_than_memory_is_not_called_corrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise MemoryError

    path = tmp_path / "large.pkl"
    path.write_bytes(b"")
    monkeypatch.setattr("gridcap.extract.importers.sources.load_arrays", fail)
    with pytest.raises(MemoryError):
        open_source(path)


def test_item_23_following_the_hint_about_the_dtype_succeeds(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", features=np.full((3, 2, 2, 4), 1e6, "f4"), file_name=["a.jpg", "b.jpg", "c.jpg"])
    arguments = [str(tmp_path / "f.npz"), "--output", str(tmp_path / "s.h5")]
    run = click.testing.CliRunner().invoke
    failed = run(command, arguments)
    assert failed.exit_code == 1
    assert "pass --dtype float32" in failed.output
    done = run(command, [*arguments, "--dtype", "float32"])
    assert done.exit_code == 0, done.output


def test_item_25_corrected_features_replace_a_plan_without_shards(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    np.savez(path, features=np.full((3, 2, 2, 4), np.nan, "f4"), file_name=["a.jpg", "b.jpg", "c.jpg"])
    with pytest.raises(SourceError, match="NaN"):
        imported(path, tmp_path, records=None)
    features = np.ones((3, 2, 2, 4), "f4")
    features[1] = np.nan  # the first image is valid, so this attempt writes a plan
    np.savez(path, features=features, file_name=["a.jpg", "b.jpg", "c.jpg"])
    with pytest.raises(SourceError, match="NaN"):
        imported(path, tmp_path, records=None)
    np.savez(path, features=np.ones((3, 2, 2, 4), "f4"), file_name=["a.jpg", "b.jpg", "c.jpg"])
    with imported(path, tmp_path, records=None) as store:
        assert store.valid.all()


def test_an_import_whose_plan_was_replaced_writes_no_shard(tmp_path: Path) -> None:
    requests = {}
    for name, value in (("one", 1.0), ("two", 2.0)):
        np.savez(tmp_path / f"{name}.npz", features=np.full((2, 2, 2, 4), value, "f2"), file_name=["a", "b"])
        source = open_source(tmp_path / f"{name}.npz")
        requests[name] = ImportRequest(source, match_keys(source, None), name, tmp_path / name / "s.h5", "s")
    import_features(requests["two"])
    other = (tmp_path / "two" / "s" / "plan.json").read_text()

    def replace_plan(_: int) -> None:
        (tmp_path / "one" / "s" / "plan.json").write_text(other)

    with pytest.raises(MismatchError, match="replaced the plan"):
        import_features(requests["one"], replace_plan)
    assert not list((tmp_path / "one" / "s").glob("*.h5"))


def test_an_interrupted_import_resumes_with_the_missing_shards(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", features=np.ones((4, 2, 2, 4), "f2"), file_name=list("abcd"))
    imported(tmp_path / "f.npz", tmp_path, records=None).close()
    shards = sorted((tmp_path / "out").glob("*.h5"))
    (tmp_path / "out.h5").unlink()
    shards[1].unlink()
    kept = shards[0].stat().st_mtime_ns
    with imported(tmp_path / "f.npz", tmp_path, records=None) as store:
        assert store.valid.all()
    assert shards[0].stat().st_mtime_ns == kept


@pytest.mark.parametrize(("available", "warned"), [(100, True), (10**9, False), (None, False)])
def test_item_30_a_pickle_larger_than_memory_is_announced_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int | None, warned: bool
) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a.jpg": grid(1)}))
    events: list[str] = []
    monkeypatch.setattr(sources, "available_memory", lambda: available)
    load = sources.load_arrays
    monkeypatch.setattr(sources, "load_arrays", lambda path: events.append("load") or load(path))
    open_source(tmp_path / "a.pkl", notify=lambda message: events.append(f"warning: {message}"))
    assert len(events) == 1 + warned
    assert events[-1] == "load"
    assert not warned or "a.pkl: a pickle is loaded as a whole" in events[0]
