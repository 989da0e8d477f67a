"""Invalid images that are read again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gridcap.common.errors import ExtractionError, StoreError
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_format import read_header
from gridcap.extract.cluster.share import Share
from gridcap.extract.run import extract_features
from tests.extract.store_helpers import (
    contents,
    write_image,
)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_retried_images_produce_the_store_of_a_first_run_with_valid_images(
    fake: Any, photos: Any, job: Any, tmp_path: Path, dtype: str
) -> None:
    keys = {"extract__shard_size": 4, "extract__batch_size": 2, "extract__dtype": dtype}
    keys["extract__views"] = "original,hflip"
    folder = photos(11, invalid={1: "text", 2: "text", 9: "text", 10: ""})
    prepared = job(folder, tmp_path / "retried" / "s.h5", **keys, data__max_invalid="50%")
    assert extract_features(prepared, show_progress=False).invalid.total() == 4
    untouched = (prepared.folder / "00001.h5").stat().st_mtime_ns
    for i in (1, 9):
        write_image(folder / f"{i:04}.png", i)
    fake.batches.clear()
    summary = extract_features(prepared, show_progress=False, retry=True)
    assert (summary.retried, summary.written, summary.complete) == (2, 0, True)
    assert summary.invalid == {"not an image": 1, "empty file": 1}
    assert sum(fake.batches) <= 2 * 2 * 2, "two batches of two, each in two views"
    assert (prepared.folder / "00001.h5").stat().st_mtime_ns == untouched

    fresh = job(folder, tmp_path / "fresh" / "s.h5", **keys, data__max_invalid="50%")
    extract_features(fresh, show_progress=False)
    assert contents(tmp_path / "retried") == contents(tmp_path / "fresh")


def test_retrying_images_that_are_still_invalid_changes_nothing(fake: Any, photos: Any, job: Any) -> None:
    prepared = job(photos(6, invalid={4: "text"}), extract__shard_size=3)
    extract_features(prepared, show_progress=False)
    before = contents(prepared.output.parent)
    built = fake.built
    summary = extract_features(prepared, show_progress=False, retry=True)
    assert (summary.retried, summary.invalid.total()) == (0, 1)
    assert contents(prepared.output.parent) == before
    assert fake.built == built + 1


def test_a_new_reason_replaces_the_old_one(fake: Any, photos: Any, job: Any) -> None:
    folder = photos(6, invalid={4: "text"})
    prepared = job(folder, extract__shard_size=3)
    extract_features(prepared, show_progress=False)
    (folder / "0004.png").unlink()
    extract_features(prepared, show_progress=False, retry=True)
    with FeatureStore(prepared.output) as store:
        assert store.invalid_reasons == {4: "missing"}


def test_a_rerun_completes_a_store_killed_between_a_retried_shard_and_the_index(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(6, invalid={4: "text"})
    prepared = job(folder, extract__shard_size=3)
    extract_features(prepared, show_progress=False)
    write_image(folder / "0004.png", 1)
    with monkeypatch.context() as patch:
        patch.setattr("gridcap.extract.indexing.write_planned_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract_features(prepared, show_progress=False, retry=True)
    assert not prepared.output.exists(), "the old index contains the checksum of the old shard"
    assert extract_features(prepared, show_progress=False).complete
    with FeatureStore(prepared.output) as store:
        assert store.valid.all()
    info = read_header(prepared.folder / "00001.h5")
    assert info is not None
    assert info.invalid == 0


def test_a_corrupted_row_is_not_copied_into_a_rewritten_shard(fake: Any, photos: Any, job: Any) -> None:
    folder = photos(4, invalid={1: "text"})
    prepared = job(folder, data__max_invalid="50%")
    extract_features(prepared, show_progress=False)
    shard = prepared.folder / "00000.h5"
    with h5py.File(shard) as file:
        offset = file["features"].id.get_offset() + 3 * 2 * 2 * 3 * 2
    content = bytearray(shard.read_bytes())
    content[offset] ^= 4
    shard.write_bytes(content)
    write_image(folder / "0001.png", 1)
    with pytest.raises(StoreError, match="row 3 is corrupted"):
        extract_features(prepared, show_progress=False, retry=True)
    assert shard.read_bytes() == content, "it is kept for gridcap verify to report"


def test_processes_may_retry_at_the_same_time(fake: Any, photos: Any, job: Any, tmp_path: Path) -> None:
    folder = photos(24, invalid=dict.fromkeys(range(0, 24, 3), "text"))
    keys = {"extract__shard_size": 2, "data__max_invalid": "50%"}
    prepared = job(folder, tmp_path / "retried" / "s.h5", **keys)
    extract_features(prepared, show_progress=False)
    for i in range(0, 24, 3):
        write_image(folder / f"{i:04}.png", i)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(extract_features, prepared, Share(i, 3), show_progress=False, retry=True) for i in range(3)]
        assert sum(run.result().retried for run in runs) == 8
    assert extract_features(prepared, show_progress=False).complete
    fresh = job(folder, tmp_path / "fresh" / "s.h5", **keys)
    extract_features(fresh, show_progress=False)
    assert contents(tmp_path / "retried") == contents(tmp_path / "fresh")


def test_a_process_that_does_not_complete_the_store_counts_invalid_images_after_the_retry(
    fake: Any, photos: Any, job: Any
) -> None:
    folder = photos(8, invalid={0: "text", 1: "text"})
    prepared = job(folder, extract__shard_size=2, data__max_invalid="50%")
    assert extract_features(prepared, Share(0, 2), show_progress=False).invalid.total() == 2
    write_image(folder / "0001.png", 1)
    summary = extract_features(prepared, Share(0, 2), show_progress=False, retry=True)
    assert not summary.complete
    assert (summary.retried, summary.invalid.total()) == (1, 1)


def test_a_retried_value_that_cannot_be_stored_is_an_error_that_names_the_image(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(3, invalid={1: "text"})
    prepared = job(folder, data__max_invalid="50%")
    extract_features(prepared, show_progress=False)
    write_image(folder / "0001.png", 1)
    monkeypatch.setattr(fake, "encode", lambda self, images: np.full((len(images), 2, 2, 3), np.inf, "f2"))
    with pytest.raises(ExtractionError, match=r"0001\.png"):
        extract_features(prepared, show_progress=False, retry=True)
