"""The public API of the package, from images to captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gridcap
from demo.shapes import write_shapes
from gridcap import Captioner, FeatureStore, extract_features, train_decoder
from gridcap.common.errors import CheckpointError, ConfigError, MismatchError, PathError, UserError

SMALL_DECODER = {"family": "lstm", "embed_size": 8, "hidden_size": 8}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rendered images and captions, and a pipeline.yaml that must not be read."""
    folder = tmp_path_factory.mktemp("api")
    write_shapes(folder / "shapes", {"train": 6, "val": 2, "test": 1})
    return folder


@pytest.fixture(autouse=True)
def folder_with_pipeline_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipeline.yaml").write_text("this is not a configuration\n")
    monkeypatch.chdir(tmp_path)


def extract(shapes: Path, split: str) -> Path:
    images, annotations = shapes / "shapes" / split, shapes / "shapes" / f"captions_{split}.json"
    output = shapes / f"{split}.h5"
    return extract_features(images, str(output), annotations, weights="random", device="cpu", progress=False)


@pytest.fixture(scope="module")
def stores(shapes: Path) -> dict[str, Path]:
    return {split: extract(shapes, split) for split in ("train", "val")}


def test_extract_features_writes_a_store_and_does_not_compute_it_twice(shapes: Path, stores: dict[str, Path]) -> None:
    with FeatureStore(stores["train"]) as store:
        assert len(store) == 6
        assert store.valid.all()
    shards = sorted(stores["train"].with_suffix("").glob("*.h5"))
    times = [path.stat().st_mtime_ns for path in shards]
    assert extract(shapes, "train") == stores["train"]
    assert [path.stat().st_mtime_ns for path in shards] == times


def test_train_decoder_writes_a_run_that_captioner_loads(shapes: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    captions = shapes / "shapes" / "captions_train.json"
    run = train_decoder(
        stores["train"],
        captions,
        tmp_path / "run",
        val_features=stores["val"],
        val_annotations=shapes / "shapes" / "captions_val.json",
        decoder=SMALL_DECODER,
        epochs=1,
        device="cpu",
        progress=False,
    )
    assert run == tmp_path / "run"
    captioner = Captioner.load(run, device="cpu")
    image = next((shapes / "shapes" / "val").iterdir())
    assert isinstance(captioner(image).text, str)
    with pytest.raises(CheckpointError, match="run"):
        train_decoder(stores["train"], captions, run, decoder=SMALL_DECODER, epochs=1, device="cpu", progress=False)


def test_training_images_are_rejected_for_validation(shapes: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    captions = shapes / "shapes" / "captions_train.json"
    validation = {"val_features": stores["train"], "val_annotations": captions}
    with pytest.raises(MismatchError, match=r"6 images in both .*train\.h5 and .*train\.h5"):
        train_decoder(stores["train"], captions, tmp_path / "run", decoder=SMALL_DECODER, device="cpu", **validation)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", [{"val_annotations": Path("val.json")}, {"patience": 1}])
def test_validation_settings_require_a_validation_store(
    shapes: Path, stores: dict[str, Path], tmp_path: Path, setting: dict[str, Any]
) -> None:
    captions = shapes / "shapes" / "captions_train.json"
    with pytest.raises(UserError, match="requires"):
        train_decoder(stores["train"], captions, tmp_path / "run", device="cpu", **setting)
    assert not (tmp_path / "run").exists()


def test_an_unknown_setting_suggests_a_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^settings: train\.epohs: unknown key; did you mean train\.epochs\?"):
        train_decoder("x.h5", "x.json", tmp_path, epohs=1)
    with pytest.raises(ConfigError, match=r"^settings: extract\.learning_rate: unknown key"):
        extract_features(tmp_path, "x.h5", learning_rate=1)


def test_limit_and_skip_select_disjoint_subsets(shapes: Path) -> None:
    images, subsets = shapes / "shapes" / "train", []
    for skip in (0, 2):
        output = extract_features(
            images, shapes / f"skip{skip}.h5", limit=2, skip=skip, weights="random", device="cpu", progress=False
        )
        with FeatureStore(output) as store:
            subsets.append(set(store.file_name))
    assert [len(subset) for subset in subsets] == [2, 2]
    assert not subsets[0] & subsets[1]


def test_invalid_paths_are_errors(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="nowhere: no such folder or archive of images"):
        extract_features("nowhere", "x.h5")
    with pytest.raises(UserError, match=r"must end in \.h5"):
        extract_features(tmp_path, "x.hdf5")


def test_every_public_name_can_be_imported() -> None:
    assert set(gridcap.__all__) <= set(dir(gridcap))
    for name in gridcap.__all__:
        assert getattr(gridcap, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gridcap.nothing
    assert (Path(gridcap.__file__).parent / "py.typed").is_file()
