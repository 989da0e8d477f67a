"""Runs: a store contains exactly what encoding its images one by one gives, however often a run is interrupted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gridcap.common.captions.images import list_images
from gridcap.common.errors import ExtractionError, MismatchError
from gridcap.common.files import this_machine
from gridcap.common.store.reader import FeatureStore
from gridcap.extract.cluster.share import Share
from gridcap.extract.run import extract_features, survey
from tests.extract.store_helpers import (
    assert_matches_photos,
    contents,
    no_temporaries,
    right_grids,
    shards_in,
    times,
)


@pytest.mark.parametrize(("shard_size", "batch_size"), [(4, 3), (4, 4), (4, 32), (1, 1), (1024, 32), (11, 2), (5, 7)])
def test_a_store_contains_what_encoding_one_by_one_returns(
    fake: Any, photos: Any, extracted: Any, shard_size: int, batch_size: int
) -> None:
    folder = photos(11)
    job, summary = extracted(folder, extract__shard_size=shard_size, extract__batch_size=batch_size)
    assert_matches_photos(fake, folder, job.output)
    assert summary.images == 11
    assert summary.shards == -(-11 // shard_size)
    assert summary.existing == 0
    assert shards_in(job.folder) == [f"{s:05}.h5" for s in range(summary.shards)]
    assert no_temporaries(job.output.parent)


def test_float32_is_not_rounded_to_float16(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(3)
    job, _ = extracted(folder, extract__dtype="float32")
    assert_matches_photos(fake, folder, job.output)
    with FeatureStore(job.output) as store:
        assert store.dtype == np.float32
    assert (right_grids(fake, folder, "float32") != right_grids(fake, folder).astype(np.float32)).any()


def test_a_batch_never_spans_two_shards(fake: Any, photos: Any, extracted: Any) -> None:
    extracted(photos(10), extract__shard_size=4, extract__batch_size=3)
    assert fake.batches == [3, 1, 3, 1, 2]


def test_subfolders_and_the_order_of_the_captions_file_are_kept(
    fake: Any, photos: Any, job: Any, tmp_path: Path
) -> None:
    folder = photos(6)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "0002.png").rename(folder / "deep" / "er" / "ünïcode 2.png")
    records = list_images(folder).records[::-1]
    prepared = job(folder, records=records, extract__shard_size=4)
    extract_features(prepared, show_progress=False)
    with FeatureStore(prepared.output) as store:
        assert store.file_name == [r.file_name for r in records]
        for record in records:
            expected = fake.grids(np.asarray(Image.open(folder / record.file_name)))[0].astype(np.float16)
            np.testing.assert_array_equal(store[store.row_of_image(record.image_id)], expected)


def test_the_index_contains_split_and_provenance(fake: Any, photos: Any, extracted: Any) -> None:
    job, _ = extracted(photos(3))
    with FeatureStore(job.output) as store:
        assert store.split == "s"
        assert store.provenance == job.plan.provenance
    assert "weights: random" in (job.folder / "config.yaml").read_text()


def test_identical_inputs_produce_identical_files(fake: Any, photos: Any, extracted: Any, tmp_path: Path) -> None:
    folder = photos(9, invalid={4: "text"})
    extracted(folder, tmp_path / "one" / "s.h5", extract__shard_size=4)
    extracted(folder, tmp_path / "two" / "s.h5", extract__shard_size=4, extract__num_workers=1)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.pop("s/config.yaml") != two.pop("s/config.yaml")  # it contains num_workers
    assert one == two
    assert len(one) == 6


# Reruns


def test_a_second_run_changes_nothing(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(9, invalid={4: "text"})
    job, first = extracted(folder, extract__shard_size=4)
    features = job.output.parent
    before, stamps, built = contents(features), times(features), fake.built
    _, second = extracted(folder, extract__shard_size=4)
    assert contents(features) == before
    assert times(features) == stamps
    assert fake.built == built, "no encoder is built if there is nothing to do"
    assert (second.existing, second.shards, second.seconds) == (3, 3, 0)
    assert second.invalid == first.invalid


def test_a_complete_store_ignores_other_batch_and_shard_sizes(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(9)
    job, _ = extracted(folder, extract__shard_size=4, extract__batch_size=2)
    before = contents(job.output.parent)
    _, summary = extracted(folder, extract__shard_size=5, extract__batch_size=3)
    assert summary.shards == summary.existing == 3
    assert contents(job.output.parent) == before


@pytest.mark.parametrize("with_index", [True, False], ids=["index exists", "index missing"])
def test_only_a_missing_shard_is_written_again_with_the_same_bytes(
    fake: Any, photos: Any, extracted: Any, with_index: bool
) -> None:
    folder = photos(10, invalid={6: "text"})
    job, _ = extracted(folder, extract__shard_size=4, extract__batch_size=2)
    features = job.output.parent
    before, stamps = contents(features), times(features)
    (job.folder / "00001.h5").unlink()
    if not with_index:
        job.output.unlink()
    fake.batches.clear()
    _, summary = extracted(folder, extract__shard_size=4, extract__batch_size=2)
    assert fake.batches == [2, 2]
    assert (summary.shards, summary.existing) == (3, 2)
    assert contents(features) == before
    for name in ("s/00000.h5", "s/00002.h5", "s/plan.json"):
        assert times(features)[name] == stamps[name]


def test_a_store_is_finished_with_the_sizes_it_was_started_with(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(10)
    job, _ = extracted(folder, extract__shard_size=4, extract__batch_size=2)
    before = contents(job.output.parent)
    (job.folder / "00002.h5").unlink()
    extracted(folder, extract__shard_size=5, extract__batch_size=3)
    after = contents(job.output.parent)
    after.pop("s/config.yaml"), before.pop("s/config.yaml")
    assert after == before


def test_a_store_of_other_images_is_not_overwritten(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(6)
    job, _ = extracted(folder)
    before = contents(job.output.parent)
    Image.new("RGB", (16, 16)).save(folder / "new.png")
    with pytest.raises(MismatchError, match="1 new"):
        extracted(folder)
    assert contents(job.output.parent) == before


def test_a_shard_of_another_plan_is_an_error(fake: Any, photos: Any, extracted: Any, tmp_path: Path) -> None:
    one, _ = extracted(photos(6), tmp_path / "one" / "s.h5", extract__shard_size=4)
    two, _ = extracted(photos(6, name="others"), tmp_path / "two" / "s.h5", extract__shard_size=3)
    two.output.unlink()
    shutil.copy(one.folder / "00000.h5", two.folder / "00000.h5")
    with pytest.raises(Exception, match=r"00000\.h5: belongs to another plan"):
        extracted(tmp_path / "others", two.output, extract__shard_size=3)


def _temporary_name(name: str, host: str, process: int) -> str:
    return f".{name}.{host}-{process}-0123abcd.tmp"


@pytest.fixture
def dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_temporary_files_of_killed_runs_are_removed(
    fake: Any, photos: Any, extracted: Any, tmp_path: Path, dead_process: int
) -> None:
    folder = tmp_path / "features" / "s"
    folder.mkdir(parents=True)
    stale = folder / _temporary_name("00001.h5", this_machine(), dead_process)
    stale.write_bytes(b"half a shard")
    stale_index = tmp_path / "features" / _temporary_name("s.h5", this_machine(), dead_process)
    stale_index.write_bytes(b"half an index")
    extracted(photos(6), extract__shard_size=4)
    assert not stale.exists()
    assert not stale_index.exists()


def test_temporary_files_of_processes_that_may_be_running_are_kept(
    fake: Any, photos: Any, extracted: Any, tmp_path: Path, dead_process: int
) -> None:
    folder = tmp_path / "features" / "s"
    folder.mkdir(parents=True)
    running = folder / _temporary_name("00001.h5", this_machine(), os.getpid())
    elsewhere = folder / _temporary_name("00001.h5", "another-machine", dead_process)
    for path in (running, elsewhere):
        path.write_bytes(b"half a shard")
    extracted(photos(6), extract__shard_size=4)
    assert running.exists()
    assert elsewhere.exists()


# Several processes


def test_processes_in_any_order_produce_the_store_of_one_process(
    fake: Any, photos: Any, job: Any, extracted: Any, tmp_path: Path
) -> None:
    folder = photos(21, invalid={4: "text"})
    keys = {"extract__shard_size": 2, "extract__batch_size": 2}
    extracted(folder, tmp_path / "one" / "s.h5", **keys)
    summaries = []
    for rank in (2, 0, 3, 1):
        prepared = job(folder, tmp_path / "many" / "s.h5", **keys)
        summaries.append(extract_features(prepared, Share(rank, 4), show_progress=False))
    assert [s.complete for s in summaries] == [False, False, False, True]
    assert [s.written for s in summaries] == [3, 3, 2, 3]
    assert [s.invalid.total() for s in summaries] == [1, 0, 0, 1], "of their shares; of the whole store at the end"
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_store_is_finished_by_another_number_of_processes(fake: Any, photos: Any, job: Any) -> None:
    prepared = job(photos(20), extract__shard_size=2)
    extract_features(prepared, Share(1, 4), show_progress=False)
    assert not extract_features(prepared, Share(0, 2), show_progress=False).complete
    last = extract_features(prepared, Share(1, 2), show_progress=False)
    assert (last.complete, last.written, last.existing) == (True, 2, 3)
    assert_matches_photos(fake, prepared.images, prepared.output)


def test_a_process_without_shards_writes_the_index(fake: Any, photos: Any, job: Any) -> None:
    prepared = job(photos(4), extract__shard_size=2)
    extract_features(prepared, Share(0, 1), show_progress=False)
    prepared.output.unlink()
    built = fake.built
    assert extract_features(prepared, Share(7, 8), show_progress=False).complete
    assert fake.built == built


def test_two_processes_may_write_the_same_shards_at_once(
    fake: Any, photos: Any, job: Any, extracted: Any, tmp_path: Path
) -> None:
    folder = photos(24)
    extracted(folder, tmp_path / "one" / "s.h5", extract__shard_size=4)
    prepared = job(folder, tmp_path / "both" / "s.h5", extract__shard_size=4)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(extract_features, prepared, show_progress=False) for _ in range(2)]
        assert all(run.result().complete for run in runs)
    assert contents(tmp_path / "both") == contents(tmp_path / "one")


# --append


def test_append_writes_new_shards_and_keeps_the_existing_ones(fake: Any, photos: Any, job: Any, tmp_path: Path) -> None:
    folder = photos(7)
    prepared = job(folder, extract__shard_size=3)
    extract_features(prepared, show_progress=False)
    before = times(prepared.folder)
    for i in range(7, 12):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i:04}.png")
    with pytest.raises(MismatchError, match="5 new"):
        job(folder, extract__shard_size=3)
    longer = job(folder, extract__shard_size=3, append=True)
    summary = extract_features(longer, show_progress=False)
    assert (summary.written, summary.existing, summary.shards, summary.complete) == (2, 3, 5, True)
    after = times(longer.folder)
    assert {name: after[name] for name in before if name.endswith("0.h5")} == {
        name: stamp for name, stamp in before.items() if name.endswith("0.h5")
    }
    assert_matches_photos(fake, folder, longer.output)
    assert extract_features(longer, show_progress=False).written == 0, "the same list is complete now"


def test_the_store_stays_readable_until_appended_shards_are_complete(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(6)
    prepared = job(folder, extract__shard_size=3)
    extract_features(prepared, show_progress=False)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "9.png")
    longer = job(folder, extract__shard_size=3, append=True)
    with monkeypatch.context() as patch:
        patch.setattr(fake, "encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract_features(longer, show_progress=False)
    with FeatureStore(longer.output) as store:
        assert len(store) == 6
    extract_features(longer, show_progress=False)
    with FeatureStore(longer.output) as store:
        assert len(store) == 7
        assert store.file_name[6] == "9.png"


# Survey


def test_shards_that_do_not_fit_on_the_disk_are_not_started(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = job(photos(12), extract__shard_size=4)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=12 * 2 * 2 * 3 * 2 - 1))
    with pytest.raises(ExtractionError, match="MiB are free") as caught:
        extract_features(prepared, show_progress=False)
    assert "--output" in caught.value.hint
    assert fake.built == 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=12 * 2 * 2 * 3 * 2))
    assert extract_features(prepared, show_progress=False).complete


def test_a_compressed_store_needs_the_space_of_one_uncompressed_shard(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, shard = job(photos(12), extract__shard_size=4, extract__dtype="float16-zstd"), 4 * 2 * 2 * 3 * 2
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=shard - 1))
    with pytest.raises(ExtractionError, match="one uncompressed shard needs") as caught:
        survey(prepared)
    assert "--shard-size" in caught.value.hint
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=shard))
    assert survey(prepared).needed == 3 * shard


def test_a_survey_lists_existing_shards_and_missing_shards_of_this_process(fake: Any, photos: Any, job: Any) -> None:
    prepared = job(photos(10), extract__shard_size=2)
    extract_features(prepared, Share(0, 2), show_progress=False)
    state = survey(prepared, Share(1, 2))
    assert (state.existing, state.missing) == ([0, 2, 4], [1, 3])
    assert state.needed == 4 * 2 * 2 * 3 * 2
    assert survey(prepared, Share(0, 2)).missing == []


def test_temporary_files_of_killed_runs_are_removed_before_the_disk_space_is_checked(
    fake: Any, photos: Any, job: Any, dead_process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = job(photos(4), extract__shard_size=2).save()
    leftover = prepared.folder / _temporary_name("00000.h5", this_machine(), dead_process)
    leftover.write_bytes(b"half a shard")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ExtractionError, match="MiB are free"):
        extract_features(prepared, show_progress=False)
    assert not leftover.exists()
