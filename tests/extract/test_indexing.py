"""The index: written last, only over shards of the same plan, and replaced safely."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gridcap.extract.indexing as indexing_module
from gridcap.common.errors import MismatchError, StoreAccessError, StoreError
from gridcap.common.store.reader import FeatureStore
from gridcap.extract.cluster.share import Share
from gridcap.extract.job import Extraction
from gridcap.extract.plan import Plan
from gridcap.extract.run import extract_features
from tests.extract.store_helpers import (
    contents,
)


def test_there_is_no_index_while_a_missing_shard_is_being_written(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index means a complete store, which would be wrong if the run were killed now."""
    folder = photos(10)
    job, _ = extracted(folder, extract__shard_size=4)
    (job.folder / "00001.h5").unlink()
    real, index_existed = fake.encode, []

    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        index_existed.append(job.output.exists())
        return real(self, images)

    monkeypatch.setattr(fake, "encode", encode)
    extracted(folder, extract__shard_size=4)
    assert index_existed == [False]
    assert job.output.exists()


def test_a_missing_index_is_written_without_building_an_encoder(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(6)
    job, _ = extracted(folder, extract__shard_size=4)
    before, built = contents(job.output.parent), fake.built
    job.output.unlink()
    extracted(folder, extract__shard_size=4)
    assert contents(job.output.parent) == before
    assert fake.built == built


def test_an_index_of_another_plan_is_an_error(fake: Any, photos: Any, extracted: Any, tmp_path: Path) -> None:
    job, _ = extracted(photos(6), tmp_path / "one" / "s.h5")
    other = tmp_path / "two" / "s.h5"
    other.parent.mkdir()
    shutil.copy(job.output, other)
    with pytest.raises(MismatchError, match=str(other)):
        extracted(photos(7, name="others"), other)
    assert other.read_bytes() == job.output.read_bytes()


def test_an_index_that_another_process_replaces_while_it_is_read_is_read_again(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen when two processes finished at the same time: one of them failed."""
    prepared = job(photos(5, invalid={2: "text"}))
    opened = []

    class Replaced(FeatureStore):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            opened.append(path)
            if len(opened) == 1:
                shutil.copy(path, path.with_suffix(".other"))
                path.with_suffix(".other").replace(path)

    monkeypatch.setattr("gridcap.extract.indexing.FeatureStore", Replaced)
    summary = extract_features(prepared, show_progress=False)
    assert summary.complete
    assert summary.examples == {"not an image": ["0002.png"]}
    assert len(opened) == 2


def test_an_index_that_does_not_match_its_shards_is_rewritten(
    fake: Any, photos: Any, job: Any, extracted: Any, tmp_path: Path
) -> None:
    """As if a shard had been replaced by --retry-invalid while another process was indexing it."""
    folder = photos(6, invalid={4: "text"})
    prepared = job(folder, extract__shard_size=3)
    extract_features(prepared, show_progress=False)
    stale = prepared.output.read_bytes()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "0004.png")
    extract_features(prepared, show_progress=False, retry=True)
    right = prepared.output.read_bytes()
    prepared.output.write_bytes(stale)
    assert extract_features(prepared, show_progress=False).invalid.total() == 0
    assert prepared.output.read_bytes() == right


def test_a_shard_of_another_plan_is_not_indexed(fake: Any, photos: Any, job: Any, tmp_path: Path) -> None:
    """Not even one of another process: its rows would be stored under the ids of other images."""
    one = job(photos(8), tmp_path / "one" / "s.h5", extract__shard_size=2)
    extract_features(one, show_progress=False)
    two = job(photos(7, name="others"), tmp_path / "two" / "s.h5", extract__shard_size=2)
    extract_features(two, Share(0, 2), show_progress=False)
    for name in ("00001.h5", "00003.h5"):
        shutil.copy(one.folder / name, two.folder / name)
    with pytest.raises(StoreError, match=r"00001\.h5: belongs to another plan"):
        extract_features(two, Share(0, 2), show_progress=False)
    assert not two.output.exists()


def test_a_process_started_before_an_append_does_not_write_the_index(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(4)
    older = job(folder, extract__shard_size=2)
    extract_features(older, show_progress=False)
    before = older.output.read_bytes()
    shutil.copy(folder / "0000.png", folder / "later.png")
    newer = job(folder, extract__shard_size=2, append=True)
    older = older.save()
    extract_features(newer, show_progress=False)
    after = newer.output.read_bytes()
    monkeypatch.setattr("gridcap.extract.run.indexed_digest", lambda *_: None)
    assert not extract_features(older, show_progress=False).complete
    assert newer.output.read_bytes() == after != before


# Other processes


@pytest.fixture
def complete(fake: Any, photos: Any, job: Any) -> Extraction:
    extraction: Extraction = job(photos(6), extract__shard_size=2)
    extract_features(extraction, show_progress=False)
    return extraction.save()


def test_item_13_an_index_that_another_process_removes_before_it_is_opened_is_missing(
    complete: Extraction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is removed between the check whether it exists and its opening."""
    real = indexing_module.read_index_plan

    def remove_then_open(path: Path) -> str:
        path.unlink(missing_ok=True)
        return real(path)

    monkeypatch.setattr(indexing_module, "read_index_plan", remove_then_open)
    assert indexing_module.indexed_digest(complete) is None


def test_item_13_an_index_that_is_removed_and_written_again_is_read(
    complete: Extraction, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = indexing_module.read_index_plan, []
    content = complete.output.read_bytes()

    def disappear_once(path: Path) -> str:
        calls.append(path)
        if len(calls) == 1:
            path.unlink()
            try:
                return real(path)
            finally:
                path.write_bytes(content)
        return real(path)

    monkeypatch.setattr(indexing_module, "read_index_plan", disappear_once)
    assert indexing_module.indexed_digest(complete) == complete.plan.digest()


def test_a_corrupted_index_is_an_error(complete: Extraction) -> None:
    content = bytearray(complete.output.read_bytes())
    content[-1] ^= 1
    complete.output.write_bytes(content)
    with pytest.raises(StoreError, match=str(complete.output)):
        indexing_module.indexed_digest(complete)


def test_item_14_a_stale_folder_listing_does_not_leave_the_store_without_an_index(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing omits the shards of another machine until this process changes the folder, as on NFS."""
    prepared = job(photos(8), extract__shard_size=2)
    extract_features(prepared, Share(0, 2), show_progress=False)
    listing: dict[str, tuple[int, list[int]]] = {}
    real_listing = Plan.existing_shards

    def cached_listing(plan: Plan, folder: Path) -> list[int]:
        changes = real_changes["count"]
        if listing.get("cache", (-1, []))[0] != changes:
            listing["cache"] = (changes, real_listing(plan, folder))
        return [shard for shard in listing["cache"][1] if shard % 2 or changes > 0]

    real_changes = {"count": 0}
    real_temporary_file = indexing_module.temporary_file

    def count_changes(path: Path) -> Any:
        real_changes["count"] += 1
        return real_temporary_file(path)

    monkeypatch.setattr(Plan, "existing_shards", cached_listing)
    monkeypatch.setattr(indexing_module, "temporary_file", count_changes)
    summary = extract_features(prepared, Share(1, 2), show_progress=False)
    assert real_changes["count"] > 0
    assert summary.complete
    assert prepared.output.exists()


def test_a_single_process_does_not_check_for_stale_listings(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing_module, "temporary_file", lambda _: 1 / 0)
    assert extract_features(job(photos(3)), show_progress=False).complete


def test_an_index_that_the_system_cannot_read_is_an_error_and_not_rewritten(
    complete: Extraction, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = complete.output.read_bytes()

    def fail(path: Path) -> None:
        raise StoreAccessError(f"{path}: input/output error", "check the disk")

    monkeypatch.setattr(indexing_module, "FeatureStore", fail)
    with pytest.raises(StoreAccessError, match="input/output error"):
        extract_features(complete, show_progress=False)
    assert complete.output.read_bytes() == before
