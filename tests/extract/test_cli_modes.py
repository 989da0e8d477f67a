"""The extract-features command with --append, --retry-invalid, --views, and --compile."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gridcap.common.store.reader import FeatureStore
from tests.extract.cli_helpers import SMALL, fails, files, run


def test_append_prints_the_number_of_new_images(fake: Any, photos: Any, no_launcher: Any, tmp_path: Path) -> None:
    folder = photos(4)
    assert run("--images", folder, *SMALL).exit_code == 0
    shutil.copy(folder / "0000.png", folder / "later.png")
    assert "--append" in fails(1, "--images", folder, *SMALL)
    before = files(tmp_path)
    dry = run("--images", folder, *SMALL, "--append", "--dry-run")
    assert "to append: 1 image to the existing 4" in dry.stdout, dry.output
    assert files(tmp_path) == before
    done = run("--images", folder, *SMALL, "--append")
    assert done.exit_code == 0, done.output
    assert "already complete: 2 of 3 shards" in done.stdout
    assert "5 images, 1 shard written (2 already complete)" in done.stdout
    assert "nothing to do" in run("--images", folder, *SMALL).stdout
    with FeatureStore(tmp_path / "features" / "photos.h5") as store:
        np.testing.assert_array_equal(store[0], store[4])


def test_retry_prints_the_number_of_images_that_are_valid_now(fake: Any, photos: Any, no_launcher: Any) -> None:
    folder = photos(6, invalid={1: "text", 2: "text"})
    assert run("--images", folder, *SMALL, "--max-invalid", "50%").exit_code == 3
    shutil.copy(folder / "0000.png", folder / "0001.png")
    again = run("--images", folder, *SMALL, "--max-invalid", "50%", "--retry-invalid")
    assert again.exit_code == 3, again.output
    assert "retried: 1 image valid now" in again.stdout
    assert "invalid images: 1" in again.stdout
    assert "--submit" in fails(2, "--images", folder, *SMALL, "--retry-invalid", "--submit", "slurm", "--num-jobs", 2)


def test_views_are_a_list_that_starts_with_original(fake: Any, photos: Any, no_launcher: Any, tmp_path: Path) -> None:
    folder = photos(3)
    result = run("--images", folder, *SMALL, "--views", "original,hflip")
    assert result.exit_code == 0, result.output
    assert "views original, hflip" in result.stdout
    with FeatureStore(tmp_path / "features" / "photos.h5") as store:
        assert store.views == ("original", "hflip")
    for wrong in ("hflip", "original,upside-down", "original,original"):
        assert "views" in fails(2, "--images", folder, *SMALL, "--views", wrong, "--output", "x.h5")


def test_nvjpeg_without_a_gpu_is_an_error(fake: Any, photos: Any, no_launcher: Any, tmp_path: Path) -> None:
    assert "nvjpeg" in fails(2, "--images", photos(2), *SMALL, "--jpeg-decoder", "nvjpeg")
    assert not (tmp_path / "features").exists()


def test_a_store_started_with_compile_resumes_with_compile(
    fake: Any, photos: Any, no_launcher: pytest.MonkeyPatch
) -> None:
    folder = photos(4)
    assert run("--images", folder, *SMALL, "--compile", "on").exit_code == 0
    assert "nothing to do" in run("--images", folder, *SMALL).stdout, "auto follows the plan on disk"
    assert "compile: expected true, got false" in fails(1, "--images", folder, *SMALL, "--compile", "off")


def test_free_disk_space_is_printed_and_checked_before_the_first_image(
    fake: Any, photos: Any, no_launcher: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = photos(4)
    assert "to write: 2 shards, 0 MiB" in run("--images", folder, *SMALL, "--dry-run").stdout
    no_launcher.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    assert "MiB are free" in fails(1, "--images", folder, *SMALL)
    assert not list((tmp_path / "features").rglob("*.h5"))
