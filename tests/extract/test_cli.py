"""The extract-features command: its output, its files, and its exit status."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import gridcap.extract.reading as reading_module
from gridcap.common.store.reader import FeatureStore
from tests.extract.cli_helpers import RANDOM, coco, fails, files, run


def test_a_folder_becomes_a_split_of_its_name(fake: Any, photos: Any, tmp_path: Path) -> None:
    result = run("--images", photos(5), *RANDOM)
    assert result.exit_code == 0, result.output
    with FeatureStore(tmp_path / "features" / "photos.h5") as store:
        assert len(store) == 5
        assert store.split == "photos"
        assert store.valid.all()
    assert re.search(r"done: features/photos\.h5: 5 images, 1 shard written", result.stdout)


def test_the_current_folder_may_be_the_folder_of_images(
    fake: Any, photos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos(2))
    result = run("--images", ".", *RANDOM)
    assert result.exit_code == 0, result.output
    assert Path("features", "photos.h5").exists()


def test_output_determines_the_store_and_the_split(fake: Any, photos: Any, tmp_path: Path) -> None:
    result = run("--images", photos(3), "--output", tmp_path / "elsewhere" / "mine.h5", *RANDOM)
    assert result.exit_code == 0, result.output
    assert FeatureStore(tmp_path / "elsewhere" / "mine.h5").split == "mine"
    assert not (tmp_path / "features").exists()


def test_a_configured_split_needs_no_other_flag(fake: Any, photos: Any, pipeline: Any, tmp_path: Path) -> None:
    folder = photos(6)
    captions = coco(tmp_path / "captions.json", {70: "0003.png", 7: "0001.png"})
    pipeline(train={"images": folder, "annotations": captions})
    result = run("--split", "train")
    assert result.exit_code == 0, result.output
    store = FeatureStore(tmp_path / "features" / "train.h5")
    assert store.image_id.tolist() == [70, 7]
    expected = fake.grids(np.asarray(Image.open(folder / "0001.png")))[0].astype(np.float16)
    np.testing.assert_array_equal(store[store.row_of_image(7)], expected)


def test_images_of_a_configured_split_keep_its_captions_and_limit(
    fake: Any, photos: Any, pipeline: Any, tmp_path: Path
) -> None:
    captions = coco(tmp_path / "captions.json", {70: "0003.png", 7: "0001.png"})
    pipeline(train={"images": tmp_path / "moved", "annotations": captions, "limit": 1})
    result = run("--split", "train", "--images", photos(6))
    assert result.exit_code == 0, result.output
    assert set(FeatureStore(tmp_path / "features" / "train.h5").image_id) < {70, 7}


def test_a_split_named_after_output_does_not_use_the_configured_split(
    fake: Any, photos: Any, pipeline: Any, tmp_path: Path
) -> None:
    pipeline(train={"images": tmp_path / "elsewhere", "annotations": coco(tmp_path / "c.json", {1: "other.png"})})
    result = run("--images", photos(3), "--output", "features/train.h5")
    assert result.exit_code == 0, result.output
    assert len(FeatureStore(tmp_path / "features" / "train.h5")) == 3


def test_kept_settings_and_complete_shards_are_printed(fake: Any, photos: Any, tmp_path: Path) -> None:
    folder = photos(6)
    arguments = ("--images", folder, "--output", "s.h5", *RANDOM)
    run(*arguments, "--shard-size", 2, "--batch-size", 2)
    (tmp_path / "s.h5").unlink()
    (tmp_path / "s" / "00001.h5").unlink()
    result = run(*arguments, "--shard-size", 4, "--batch-size", 1, "--dry-run")
    assert "started with shard size 2 and batch size 2" in result.output
    assert "already complete: 2 of 3 shards" in result.output
    assert not (tmp_path / "s.h5").exists()


def test_images_and_annotations_can_be_given_as_flags(fake: Any, photos: Any, tmp_path: Path) -> None:
    captions = coco(tmp_path / "captions.json", {3: "0002.png"})
    result = run("--images", photos(4), "--annotations", captions, "--output", "x.h5", *RANDOM)
    assert result.exit_code == 0, result.output
    assert FeatureStore(tmp_path / "x.h5").image_id.tolist() == [3]


def test_limit_selects_a_reproducible_random_subset(fake: Any, photos: Any, tmp_path: Path) -> None:
    folder = photos(20)
    names = []
    for output in ("a.h5", "b.h5"):
        result = run("--images", folder, "--limit", 6, "--output", output, "--split", "some", *RANDOM)
        assert result.exit_code == 0, result.output
        names.append(FeatureStore(tmp_path / output).file_name)
    assert names[0] == names[1]
    assert len(set(names[0])) == 6
    assert names[0] == sorted(names[0]), "in the order of the folder"
    assert names[0] != [f"{i:04}.png" for i in range(6)], "not the first ones"


def test_a_split_with_a_dot_in_its_name_can_be_chosen(fake: Any, photos: Any, pipeline: Any) -> None:
    pipeline(**{"coco.2017": {"images": photos(2)}})
    result = run("--split", "coco.2017", "--output", "c.h5")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "setting", [{"limit": "0"}, {"limit": "-3"}, {"batch-size": "0"}, {"max-invalid": "many"}, {"weights": "random:x"}]
)
def test_an_invalid_value_is_a_usage_error_and_writes_nothing(
    fake: Any, photos: Any, tmp_path: Path, setting: dict[str, str]
) -> None:
    ((flag, value),) = setting.items()
    result = run("--images", photos(3), "--weights", "random", f"--{flag}", value)
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "features").exists()


# Flags that select images


@pytest.mark.parametrize("key", ["data.splits.val.skip=3", "data.splits.val.limit=2", "data.splits.photos.skip=3"])
def test_item_19_images_do_not_silently_ignore_settings_of_splits(
    fake: Any, photos: Any, pipeline: Any, tmp_path: Path, key: str
) -> None:
    folder = photos(6)
    pipeline(val={"images": folder})
    error = fails(2, "--images", folder, "--set", key)
    assert f"--set {key}: has no effect with --images" in error
    assert "--limit, --skip" in error
    assert not (tmp_path / "features").exists()


def test_item_19_settings_of_another_split_are_a_usage_error(fake: Any, photos: Any, pipeline: Any) -> None:
    folder = photos(6)
    pipeline(train={"images": folder}, val={"images": folder})
    assert "on the selected split, train" in fails(2, "--split", "train", "--set", "data.splits.val.skip=3")


def test_item_19_settings_of_the_selected_split_are_used(fake: Any, photos: Any, pipeline: Any, tmp_path: Path) -> None:
    pipeline(val={"images": tmp_path / "moved"})
    result = run("--split", "val", "--images", photos(6), "--set", "data.splits.val.skip=4")
    assert result.exit_code == 0, result.output
    assert len(FeatureStore(tmp_path / "features" / "val.h5")) == 2


def test_a_features_folder_that_output_overrides_is_a_usage_error(fake: Any, photos: Any) -> None:
    arguments = ("--output", "x.h5", "--set", "data.features_dir=elsewhere")
    assert "has no effect with --output" in fails(2, "--images", photos(2), *RANDOM, *arguments)


def test_limit_skip_and_seed_select_disjoint_subsets(fake: Any, photos: Any, tmp_path: Path) -> None:
    folder = photos(10)

    def names(output: str, *flags: object) -> set[str]:
        result = run("--images", folder, "--output", output, *RANDOM, *flags)
        assert result.exit_code == 0, result.output
        return set(FeatureStore(tmp_path / output).file_name)

    first, rest = names("first.h5", "--limit", 4), names("rest.h5", "--skip", 4)
    assert (len(first), len(rest)) == (4, 6)
    assert not first & rest
    assert names("other.h5", "--limit", 4, "--seed", 1) != first


def test_num_workers_is_the_number_of_decoding_threads(fake: Any, photos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five threads meet at a barrier, which would break with fewer threads."""
    barrier = threading.Barrier(5, timeout=20)
    load_image = reading_module.load_image

    def load(*arguments: Any) -> np.ndarray:
        barrier.wait()
        return load_image(*arguments)

    monkeypatch.setattr(reading_module, "load_image", load)
    assert run("--images", photos(10), *RANDOM, "--num-workers", 5).exit_code == 0


# Output


def test_random_weights_cause_a_warning(fake: Any, photos: Any) -> None:
    result = run("--images", photos(2), *RANDOM)
    assert "WARNING: random weights" in result.stderr
    assert "--weights imagenet for real captions" in result.stderr


def test_a_local_weights_file_causes_no_warning(fake: Any, photos: Any, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"the fake encoder does not read it")
    result = run("--images", photos(2), "--weights", tmp_path / "w.pth")
    assert result.exit_code == 0, result.output
    assert "WARNING" not in result.output
    assert FeatureStore(tmp_path / "features" / "photos.h5").provenance["weights"]["random"] is False


def test_the_full_configuration_is_stored_with_the_shards_and_only_changed_settings_are_printed(
    fake: Any, photos: Any, tmp_path: Path
) -> None:
    arguments = ("--images", photos(2), *RANDOM, "--batch-size", 7, "--num-workers", 2)
    result = run(*arguments)
    (line,) = re.findall(r"^configuration: (.*)$", result.stdout, re.M)
    assert "extract.batch_size=7" in line
    assert "shard_size" not in line
    stored = yaml.safe_load((tmp_path / "features" / "photos" / "config.yaml").read_text())
    assert (stored["extract"]["batch_size"], stored["extract"]["num_workers"]) == (7, 2)
    assert list(stored["data"]["splits"]) == ["photos"]
    shown = re.search(r"configuration\n((?:  .*\n)+)", run(*arguments, "--dry-run").stdout)
    assert shown
    assert yaml.safe_load(shown[1]) == stored


def test_invalid_images_are_listed_by_reason_and_exit_with_status_3(fake: Any, photos: Any, tmp_path: Path) -> None:
    folder = photos(12, invalid={2: "", 5: "text", 9: "text"})
    result = run("--images", folder, *RANDOM, "--max-invalid", 3)
    assert result.exit_code == 3
    assert "invalid images: 3" in result.stdout
    assert re.search(r"^ +2  not an image  ", result.stdout, re.M)
    assert re.search(r"^ +1  empty file  \(0002\.png\)$", result.stdout, re.M)
    assert FeatureStore(tmp_path / "features" / "photos.h5").valid.sum() == 9

    again = run("--images", folder, *RANDOM, "--max-invalid", 3)
    assert again.exit_code == 3, "also if there is nothing to do"
    assert "nothing to do" in again.stdout
    assert "invalid images: 3" in again.stdout


def test_invalid_images_can_be_allowed(fake: Any, photos: Any) -> None:
    folder = photos(12, invalid={2: ""})
    result = run("--images", folder, *RANDOM, "--allow-invalid")
    assert result.exit_code == 0
    assert "invalid images: 1" in result.stdout
    assert run("--images", folder, *RANDOM, "--allow-invalid").exit_code == 0


def test_a_complete_store_is_reported_as_complete(fake: Any, photos: Any) -> None:
    folder = photos(4)
    first = run("--images", folder, *RANDOM)
    assert "nothing to do" not in first.stdout
    second = run("--images", folder, *RANDOM)
    assert second.exit_code == 0
    assert re.search(r"nothing to do: features/photos\.h5 is complete \(4 images, 1 shard\)", second.stdout)


def test_problems_of_the_captions_file_are_printed(fake: Any, photos: Any, tmp_path: Path) -> None:
    captions = coco(tmp_path / "captions.json", {1: "0001.png", 2: "0002.png", 3: "0003.png"})
    tree = json.loads(captions.read_text())
    tree["annotations"].append({"id": 9, "image_id": 777, "caption": "of nothing"})
    captions.write_text(json.dumps(tree))
    result = run("--images", photos(4), "--annotations", captions, *RANDOM, "--max-invalid", "50%")
    assert result.exit_code == 0, result.output
    assert re.search(r"note: .*captions\.json: 1 x annotation for an unknown image \(777\)", result.stderr)


# --dry-run


def test_a_dry_run_prints_the_plan_and_writes_nothing(fake: Any, photos: Any, tmp_path: Path) -> None:
    folder = photos(10)
    before = files(tmp_path)
    result = run("--images", folder, *RANDOM, "--shard-size", 4, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "plan: 10 images -> features/photos.h5 (3 shards" in result.stdout
    assert "nothing was written" in result.stdout
    assert files(tmp_path) == before
    assert fake.built == 0


def test_a_dry_run_downloads_no_weights(
    fake: Any, photos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = photos(3)
    before = files(tmp_path)
    result = run("--images", folder, "--weights", "imagenet", "--dry-run")
    assert result.exit_code == 0, result.output
    assert files(tmp_path) == before


# Usage errors


def test_neither_split_nor_images_is_a_usage_error(fake: Any) -> None:
    assert "--images" in fails(2)


def test_an_unknown_split_is_a_usage_error_that_lists_the_known_ones(fake: Any, photos: Any, pipeline: Any) -> None:
    folder = photos(2)
    pipeline(train={"images": folder}, val={"images": folder})
    error = fails(2, "--split", "tset")
    assert "tset" in error
    assert "train, val" in error


def test_an_unknown_split_with_limit_is_reported_as_unknown(fake: Any, photos: Any, pipeline: Any) -> None:
    pipeline(train={"images": photos(2)})
    assert "no such split" in fails(2, "--split", "tset", "--limit", 5)


def test_item_23_an_empty_image_folder_is_reported_before_weights_are_downloaded(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise AssertionError("tried to download weights")

    monkeypatch.setattr("gridcap.extract.encoders.torchvision.identify_cnn_weights", download)
    (tmp_path / "empty").mkdir()
    assert "empty: contains no images" in fails(1, "--images", tmp_path / "empty", "--output", tmp_path / "x.h5")


def test_a_missing_image_folder_is_an_error_that_names_it(fake: Any, tmp_path: Path) -> None:
    assert "no/such/place" in fails(1, "--images", "no/such/place", *RANDOM)
    (tmp_path / "file.jpg").touch()
    assert "file.jpg" in fails(1, "--images", "file.jpg", *RANDOM)


def test_a_folder_without_images_is_an_error_that_names_it(fake: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    assert "empty: contains no images" in fails(1, "--images", "empty", *RANDOM)


@pytest.mark.parametrize("output", ["features", "features.hdf5", "features.h5.gz"])
def test_an_output_that_is_not_an_h5_file_is_a_usage_error(fake: Any, photos: Any, tmp_path: Path, output: str) -> None:
    assert "must end in .h5" in fails(2, "--images", photos(2), "--output", output, *RANDOM)
    assert not (tmp_path / output).exists()


def test_a_missing_captions_file_is_an_error_that_names_it(fake: Any, photos: Any) -> None:
    assert "no.json" in fails(1, "--images", photos(2), "--annotations", "no.json", *RANDOM)


def test_a_missing_weights_file_is_an_error_that_names_it(fake: Any, photos: Any) -> None:
    assert "no.pth" in fails(1, "--images", photos(2), "--weights", "no.pth")


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_item_28_a_device_type_that_is_not_supported_is_a_usage_error(
    fake: Any, photos: Any, tmp_path: Path, device: str
) -> None:
    error = fails(2, "--images", photos(2), *RANDOM, "--device", device)
    assert f"--device {device}: {device} devices are not supported" in error
    assert not (tmp_path / "features").exists()


def test_an_unknown_encoder_is_a_usage_error(fake: Any, photos: Any) -> None:
    assert "vgg16" in fails(2, "--images", photos(2), "--encoder", "vgg16")


def test_half_precision_on_a_cpu_is_a_usage_error(fake: Any, photos: Any) -> None:
    error = fails(2, "--images", photos(2), "--weights", "random", "--precision", "float16", "--device", "cpu")
    assert "GPU" in error


def test_a_store_of_other_features_is_not_overwritten(fake: Any, photos: Any) -> None:
    folder = photos(3)
    assert run("--images", folder, *RANDOM).exit_code == 0
    before = Path("features/photos.h5").read_bytes()
    error = fails(1, "--images", folder, "--weights", "random:1", "--precision", "float32")
    assert "planned differently" in error
    assert "random:0" in error
    assert "random:1" in error
    assert Path("features/photos.h5").read_bytes() == before


def test_too_many_invalid_images_are_a_failure(fake: Any, photos: Any) -> None:
    error = fails(1, "--images", photos(4, invalid={0: "", 1: "", 2: ""}), *RANDOM)
    assert "3 of 4 images are invalid" in error
    assert not Path("features/photos.h5").exists()


def test_a_full_disk_is_a_failure_with_advice(fake: Any, photos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, images: np.ndarray) -> np.ndarray:
        raise OSError(28, "No space left on device", "features/photos/00000.h5")

    monkeypatch.setattr(fake, "encode", full)
    error = fails(1, "--images", photos(4), *RANDOM)
    assert "No space left" in error
    assert "rerun the command" in error


def test_control_c_ends_with_status_130(fake: Any, photos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Any, images: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "encode", interrupt)
    result = run("--images", photos(4), *RANDOM)
    assert result.exit_code == 130
    assert "rerun the command" in result.stderr


def test_help_names_the_exit_statuses_and_examples() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "Exit status" in result.stdout
    assert "extract-features --split train" in result.stdout
