"""import-features: every known layout, matched with captions, and never a line of code from a pickle."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import click.testing
import h5py
import numpy as np
import pytest

from gridcap.common.captions.records import ImageRecord, id_from_name
from gridcap.common.errors import MismatchError, UserError
from gridcap.common.store.reader import FeatureStore
from gridcap.extract.importers.features import as_grid, import_features, match_keys, open_source
from gridcap.extract.store_cli import import_features as command

RECORDS = [ImageRecord(11, "b.jpg", ("a dog",)), ImageRecord(7, "a.jpg", ("a cat",))]


def grid(seed: int, shape: tuple[int, ...] = (3, 3, 5)) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype("f4")


def imported(source: Path, tmp_path: Path, records: list[ImageRecord] | None = RECORDS, dtype: str = "float32") -> Any:
    opened = open_source(source)
    import_features(opened, source.name, match_keys(opened, records), tmp_path / "out.h5", "out", dtype, 2)
    return FeatureStore(tmp_path / "out.h5")


def assert_both(store: FeatureStore, dog: np.ndarray, cat: np.ndarray) -> None:
    assert store.image_id.tolist() == [11, 7], "the order of the captions file"
    assert store.file_name == ["b.jpg", "a.jpg"]
    assert store.valid.all()
    assert np.array_equal(store[0], dog)
    assert np.array_equal(store[store.row_of_image(7)], cat)


def test_a_folder_of_npy_as_in_tensorflows_tutorial(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, seed in (("a.jpg", 1), ("b.jpg", 2), ("unused.jpg", 3)):
        np.save(folder / f"{name}.npy", grid(seed, (64, 6)))
    store = imported(folder, tmp_path)
    assert_both(store, grid(2, (64, 6)).reshape(8, 8, 6), grid(1, (64, 6)).reshape(8, 8, 6))
    assert store.provenance["encoder"] == "imported"
    assert store.provenance["layer"] == "folder of .npy"
    assert store.provenance["weights"]["name"] == "cache"


def test_a_folder_of_npz_by_image_id(tmp_path: Path) -> None:
    folder = tmp_path / "att"
    folder.mkdir()
    np.savez_compressed(folder / "7.npz", feat=grid(1), boxes=np.zeros(3))
    np.savez_compressed(folder / "11.npz", grid(2))
    assert_both(imported(folder, tmp_path), grid(2), grid(1))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_pickled_dict_in_every_protocol(tmp_path: Path, protocol: int, kind: Any) -> None:
    path = tmp_path / "encoded.pkl"
    path.write_bytes(pickle.dumps(kind({"a.jpg": grid(1), "b": grid(2)}), protocol))
    assert_both(imported(path, tmp_path), grid(2), grid(1))


@pytest.mark.parametrize("suffix", ["", "_grids", "_features"])
def test_hdf5_with_a_dataset_an_image(tmp_path: Path, suffix: str) -> None:
    with h5py.File(tmp_path / "g.h5", "w") as file:
        file[f"7{suffix}"], file[f"11{suffix}"] = grid(1), grid(2)
    assert_both(imported(tmp_path / "g.h5", tmp_path), grid(2), grid(1))


@pytest.mark.parametrize("names", [{"file_name": ["a.jpg", "b.jpg"]}, {"image_id": [7, 11]}])
def test_arrays_in_one_file_with_a_scale(tmp_path: Path, names: dict[str, list[Any]]) -> None:
    features = np.random.default_rng(0).integers(0, 255, (2, 3, 3, 5), dtype=np.uint8)
    np.savez(tmp_path / "g.npz", features=features, scale=np.float32(0.5), **{k: np.array(v) for k, v in names.items()})
    assert_both(imported(tmp_path / "g.npz", tmp_path), features[1] * np.float32(0.5), features[0] * np.float32(0.5))


def test_arrays_in_one_hdf5_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "g.h5", "w") as file:
        file["features"] = np.stack([grid(1), grid(2)])
        file["file_name"] = ["a.jpg", "b.jpg"]
    assert_both(imported(tmp_path / "g.h5", tmp_path), grid(2), grid(1))


def test_without_captions_every_key_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps({"x.jpg": grid(1, (5,)), 42: grid(2, (5,))}))
    store = imported(path, tmp_path, records=None)
    assert store.image_id.tolist() == [id_from_name("x.jpg"), 42]
    assert store.grid_shape == (1, 1, 5)


def test_shapes_become_grids_or_are_refused() -> None:
    assert as_grid(grid(0, (49, 4))).shape == (7, 7, 4)
    assert as_grid(grid(0, (4,))).shape == (1, 1, 4)
    assert as_grid(grid(0, (2, 3, 4))).shape == (2, 3, 4)
    for wrong in (grid(0, (50, 4)), grid(0, (1, 2, 3, 4)), np.array(["a"])):
        with pytest.raises(ValueError, match=r"grid|numbers"):
            as_grid(wrong)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_that_runs_code_is_refused_without_running_it(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"a.jpg": grid(1), "b.jpg": Evil(tmp_path / "ran")}, protocol))
    with pytest.raises(UserError, match=r"evil\.pkl.*only numpy arrays"):
        open_source(path)
    assert not (tmp_path / "ran").exists()


def test_an_object_array_cannot_smuggle_code_in(tmp_path: Path) -> None:
    folder = tmp_path / "npy"
    folder.mkdir()
    np.save(folder / "a.jpg.npy", np.array([Evil(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"a\.jpg"):
        imported(folder, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_images_of_different_shapes_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps({"a.jpg": grid(1), "b.jpg": grid(2, (2, 2, 5))}))
    with pytest.raises(UserError, match=r"a\.jpg: has the shape \(3, 3, 5\), and the first has \(2, 2, 5\)"):
        imported(path, tmp_path)
    assert not (tmp_path / "out.h5").exists()


def test_a_value_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps({"a.jpg": grid(1), "b.jpg": grid(2) * 1e6}))
    with pytest.raises(UserError, match=r"b\.jpg"):
        imported(path, tmp_path, dtype="float16")


def test_other_features_into_the_same_output_are_refused(tmp_path: Path) -> None:
    for seed in (0, 5):
        (tmp_path / f"{seed}.pkl").write_bytes(pickle.dumps({"a.jpg": grid(seed), "b.jpg": grid(seed + 1)}))
    imported(tmp_path / "0.pkl", tmp_path)
    with pytest.raises(MismatchError, match="weights"):
        imported(tmp_path / "5.pkl", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.pkl", b"not a pickle"), ("a.npz", b"not a zip"), ("a.h5", b"not HDF5"), ("a.txt", b""), ("gone.pkl", None)],
)
def test_what_cannot_be_read_is_a_users_error_that_names_it(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        open_source(tmp_path / name)


def test_the_command_counts_what_is_missing_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
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
    assert "1 images of" in done.output
    assert "have no features" in done.output
    assert FeatureStore(tmp_path / "o.h5").split == "o"
    assert run(command, [*arguments[:-1], "o.hdf"]).exit_code == 2


def test_captions_of_other_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"z.jpg": grid(1)}))
    with pytest.raises(UserError, match=r"none of the 2 images.*b\.jpg against z\.jpg"):
        match_keys(open_source(tmp_path / "p.pkl"), RECORDS)


def test_a_refused_import_leaves_the_store_that_is_there_as_it_was(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        np.savez(tmp_path / f"{name}.npz", features=np.full((3, 2, 2, 4), value, "f2"), file_name=["a", "b", "c"])
    run = click.testing.CliRunner().invoke
    assert run(command, [str(tmp_path / "one.npz"), "--output", str(tmp_path / "s.h5")]).exit_code == 0
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    refused = run(command, [str(tmp_path / "two.npz"), "--output", str(tmp_path / "s.h5")])
    assert refused.exit_code == 2
    assert "weights" in refused.output
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_features_are_imported_in_8_bits_too(tmp_path: Path) -> None:
    grids = np.random.default_rng(0).random((3, 2, 2, 4)).astype("f4")
    np.savez(tmp_path / "f.npz", features=grids, file_name=["a.jpg", "b.jpg", "c.jpg"])
    words = [str(tmp_path / "f.npz"), "--output", str(tmp_path / "s.h5"), "--dtype", "uint8"]
    result = click.testing.CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    with FeatureStore(tmp_path / "s.h5") as store:
        np.testing.assert_allclose(store.rows(range(3)), grids, atol=0.004)
    np.savez(tmp_path / "f.npz", features=-grids, file_name=["a.jpg", "b.jpg", "c.jpg"])
    negative = click.testing.CliRunner().invoke(command, [*words[:2], str(tmp_path / "n.h5"), *words[3:]])
    assert negative.exit_code == 2
    assert "uint8 cannot represent" in negative.output
