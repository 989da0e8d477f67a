"""Invalid images: they keep their rows, and too many of them stop the run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from gridcap.common.captions.images import list_images
from gridcap.common.errors import ExtractionError
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_reader import ShardReader
from gridcap.extract.run import extract_features
from tests.extract.store_helpers import (
    assert_matches_photos,
    no_temporaries,
    shards_in,
)


def test_an_invalid_image_keeps_its_row_and_affects_no_other(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(11, invalid={0: "", 5: "<html>", 6: "text", 10: "text"})
    job, summary = extracted(folder, extract__shard_size=4, extract__batch_size=2, data__max_invalid="4")
    reasons = {0: "empty file", 5: "not an image", 6: "not an image", 10: "not an image"}
    assert_matches_photos(fake, folder, job.output, reasons)
    assert dict(summary.invalid) == {"empty file": 1, "not an image": 3}


def test_a_missing_image_is_invalid(fake: Any, photos: Any, job: Any) -> None:
    folder = photos(5)
    records = list_images(folder).records
    (folder / "0003.png").unlink()
    prepared = job(folder, records=records)
    summary = extract_features(prepared, show_progress=False)
    assert dict(summary.invalid) == {"missing": 1}
    with FeatureStore(prepared.output) as store:
        assert store.valid.tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("follow", [False, True])
def test_a_link_out_of_the_image_folder_is_invalid_unless_links_are_followed(
    fake: Any, photos: Any, job: Any, tmp_path: Path, follow: bool
) -> None:
    folder = photos(5)
    (folder / "0003.png").rename(tmp_path / "secret.png")
    (folder / "0003.png").symlink_to(tmp_path / "secret.png")
    prepared = job(folder, **{"data.follow_links": follow})
    summary = extract_features(prepared, show_progress=False)
    with FeatureStore(prepared.output) as store:
        assert store.valid.tolist() == [True, True, True, follow, True]
    assert all("follow_links=true allows it" in reason for reason in summary.invalid)


def test_item_17_images_in_a_linked_folder_are_extracted(fake: Any, photos: Any, job: Any, tmp_path: Path) -> None:
    folder = photos(5)
    (tmp_path / "elsewhere").mkdir()
    (folder / "0003.png").rename(tmp_path / "elsewhere" / "0003.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    records = list_images(folder, follow_links=True).records
    prepared = job(folder, records=records, **{"data.follow_links": True})
    extract_features(prepared, show_progress=False)
    with FeatureStore(prepared.output) as store:
        assert list(store.file_name)[-1] == "linked/0003.png"
        assert store.valid.all()


def test_a_shard_may_contain_invalid_images_only(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(8, invalid={4: "x", 5: "x", 6: "x", 7: "x"})
    job, _ = extracted(folder, extract__shard_size=4, data__max_invalid="50%")
    assert_matches_photos(fake, folder, job.output, dict.fromkeys(range(4, 8), "not an image"))


def test_too_many_invalid_images_stop_the_run_without_partial_files(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(20, invalid=dict.fromkeys(range(8, 14), "x"))
    with pytest.raises(ExtractionError) as caught:
        extracted(folder, extract__shard_size=4, extract__batch_size=2, data__max_invalid="5")
    message = f"{caught.value.message} {caught.value.hint}"
    for text in ("not an image", "00", "5", "--max-invalid", str(folder)):
        assert text in message
    features = folder.parent / "features"
    assert not (features / "s.h5").exists()
    assert no_temporaries(features)
    for name in shards_in(features / "s"):
        with ShardReader(features / "s" / name) as shard:
            assert shard.corrupted_rows() == []


@pytest.mark.parametrize(("valid", "suggested"), [(0, False), (1, True)])
def test_item_23_a_higher_limit_is_not_suggested_if_all_images_are_invalid(
    fake: Any, photos: Any, extracted: Any, valid: int, suggested: bool
) -> None:
    folder = photos(20, invalid=dict.fromkeys(range(valid, 20), "x"))
    with pytest.raises(ExtractionError) as caught:
        extracted(folder, extract__batch_size=10)
    assert ("--max-invalid" in caught.value.hint) == suggested


@pytest.mark.parametrize(("max_invalid", "accepted"), [("5", True), ("4", False), ("25%", True), ("24%", False)])
def test_exactly_max_invalid_images_are_allowed(
    fake: Any, photos: Any, extracted: Any, max_invalid: str, accepted: bool
) -> None:
    folder = photos(20, invalid=dict.fromkeys(range(5), "x"))
    with contextlib.nullcontext() if accepted else pytest.raises(ExtractionError):
        extracted(folder, data__max_invalid=max_invalid)


def test_rerunning_does_not_bypass_the_limit(fake: Any, photos: Any, extracted: Any) -> None:
    """Invalid images in the shards of an earlier run count as well."""
    folder = photos(20, invalid=dict.fromkeys(range(0, 20, 2), "x"))
    for _ in range(4):
        with pytest.raises(ExtractionError):
            extracted(folder, extract__shard_size=2, extract__batch_size=2, data__max_invalid="5")
        assert not (folder.parent / "features" / "s.h5").exists()


def test_more_invalid_images_in_existing_shards_than_the_limit_stop_the_run(
    fake: Any, photos: Any, extracted: Any
) -> None:
    """Even if the first batch of this run has no invalid image to name."""
    folder = photos(12, invalid=dict.fromkeys(range(4), "x"))
    job, _ = extracted(folder, extract__shard_size=4, data__max_invalid="5")
    (job.folder / "00002.h5").unlink()
    job.output.unlink()
    with pytest.raises(ExtractionError, match="4 x not an image"):
        extracted(folder, extract__shard_size=4, data__max_invalid="2")
