"""The pipeline: whatever happens, a store holds just what encoding its images one by one gives."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gridcap.extract.plan as plan_module
import gridcap.extract.reading as reading_module
from gridcap.common.captions.folder import list_images
from gridcap.common.errors import ExtractionError, MismatchError, StoreError
from gridcap.common.files import this_machine
from gridcap.common.scenes import all_scenes, render
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard import ShardReader, ShardWriter
from gridcap.extract.cluster.share import Share
from gridcap.extract.run import extract_features, survey


def right_grids(fake: Any, folder: Path, dtype: str = "float16") -> np.ndarray:
    """What encoding the pictures one by one gives; they are 16 x 16, so no resizing is involved."""
    names = [record.file_name for record in list_images(folder).records]
    return np.concatenate([fake.grids(np.asarray(Image.open(folder / name))) for name in names]).astype(dtype)


def assert_right(fake: Any, folder: Path, index: Path, rejected: dict[int, str] | None = None) -> None:
    """Compare a store, row by row, with its folder of pictures."""
    rejected = rejected or {}
    records = list_images(folder).records
    with FeatureStore(index) as store:
        assert store.file_names == [r.file_name for r in records]
        assert store.image_ids.tolist() == [r.image_id for r in records]
        assert store.rejects == rejected
        assert (~store.valid).nonzero()[0].tolist() == sorted(rejected)
        grids = store.rows(range(len(store)))
    for row, record in enumerate(records):
        if row in rejected:
            assert np.isnan(grids[row]).all()
        else:
            want = fake.grids(np.asarray(Image.open(folder / record.file_name)))[0].astype(grids.dtype)
            assert grids[row].tobytes() == want.tobytes(), record.file_name


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def shards_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("[0-9]*.h5"))


def no_temporaries(features: Path) -> bool:
    return not [p for p in features.rglob(".*") if p.name.endswith(".tmp")]


# --------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize(("shard_size", "batch_size"), [(4, 3), (4, 4), (4, 32), (1, 1), (1024, 32), (11, 2), (5, 7)])
def test_a_store_is_what_encoding_one_by_one_gives(
    fake: Any, photos: Any, extracted: Any, shard_size: int, batch_size: int
) -> None:
    folder = photos(11)
    job, summary = extracted(folder, extract__shard_size=shard_size, extract__batch_size=batch_size)
    assert_right(fake, folder, job.output)
    assert summary.images == 11
    assert summary.shards == -(-11 // shard_size)
    assert summary.existing == 0
    assert shards_in(job.folder) == [f"{s:05}.h5" for s in range(summary.shards)]
    assert no_temporaries(job.output.parent)


def test_float32_keeps_what_float16_would_round(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(3)
    job, _ = extracted(folder, extract__dtype="float32")
    assert_right(fake, folder, job.output)
    with FeatureStore(job.output) as store:
        assert store.dtype == np.float32
    assert (right_grids(fake, folder, "float32") != right_grids(fake, folder).astype(np.float32)).any()


def test_a_batch_never_crosses_a_shards_border(fake: Any, photos: Any, extracted: Any) -> None:
    extracted(photos(10), extract__shard_size=4, extract__batch_size=3)
    assert fake.batches == [3, 1, 3, 1, 2]


def test_pictures_in_subfolders_and_captions_order_are_kept(fake: Any, photos: Any, job: Any, tmp_path: Path) -> None:
    folder = photos(6)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "0002.png").rename(folder / "deep" / "er" / "ünïcode 2.png")
    records = list_images(folder).records[::-1]
    prepared = job(folder, records=records, extract__shard_size=4)
    extract_features(prepared, show_progress=False)
    with FeatureStore(prepared.output) as store:
        assert store.file_names == [r.file_name for r in records]
        for record in records:
            want = fake.grids(np.asarray(Image.open(folder / record.file_name)))[0].astype(np.float16)
            np.testing.assert_array_equal(store.by_image_id(record.image_id), want)


def test_the_index_carries_split_and_provenance(fake: Any, photos: Any, extracted: Any) -> None:
    job, _ = extracted(photos(3))
    with FeatureStore(job.output) as store:
        assert store.split == "s"
        assert store.provenance == job.plan.provenance
    assert "weights: random" in (job.folder / "config.yaml").read_text()


def test_two_folders_with_the_same_pictures_give_the_same_bytes(
    fake: Any, photos: Any, extracted: Any, tmp_path: Path
) -> None:
    folder = photos(9, bad={4: "text"})
    extracted(folder, tmp_path / "one" / "s.h5", extract__shard_size=4)
    extracted(folder, tmp_path / "two" / "s.h5", extract__shard_size=4, extract__num_workers=1)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.pop("s/config.yaml") != two.pop("s/config.yaml")  # it says how many readers
    assert one == two
    assert len(one) == 6


# ------------------------------------------------------------------------------------------------- rejected images


def test_a_rejected_image_keeps_its_row_and_harms_no_other(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(11, bad={0: "", 5: "<html>", 6: "text", 10: "text"})
    job, summary = extracted(folder, extract__shard_size=4, extract__batch_size=2, data__max_invalid="4")
    reasons = {0: "empty file", 5: "not an image", 6: "not an image", 10: "not an image"}
    assert_right(fake, folder, job.output, reasons)
    assert dict(summary.invalid) == {"empty file": 1, "not an image": 3}


def test_a_missing_image_is_a_reject(fake: Any, photos: Any, job: Any) -> None:
    folder = photos(5)
    records = list_images(folder).records
    (folder / "0003.png").unlink()
    prepared = job(folder, records=records)
    summary = extract_features(prepared, show_progress=False)
    assert dict(summary.invalid) == {"missing": 1}
    with FeatureStore(prepared.output) as store:
        assert store.valid.tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("follow", [False, True])
def test_a_link_out_of_the_image_folder_is_a_reject_unless_links_are_followed(
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


def test_a_shard_of_nothing_but_rejects_is_a_shard_too(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(8, bad={4: "x", 5: "x", 6: "x", 7: "x"})
    job, _ = extracted(folder, extract__shard_size=4, data__max_invalid="50%")
    assert_right(fake, folder, job.output, dict.fromkeys(range(4, 8), "not an image"))


def test_too_many_bad_images_stop_the_run_and_leave_nothing_half_done(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(20, bad=dict.fromkeys(range(8, 14), "x"))
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


@pytest.mark.parametrize(("max_invalid", "accepted"), [("5", True), ("4", False), ("25%", True), ("24%", False)])
def test_the_limit_itself_is_allowed(fake: Any, photos: Any, extracted: Any, max_invalid: str, accepted: bool) -> None:
    folder = photos(20, bad=dict.fromkeys(range(5), "x"))
    with contextlib.nullcontext() if accepted else pytest.raises(ExtractionError):
        extracted(folder, data__max_invalid=max_invalid)


def test_running_again_does_not_get_past_the_limit_of_bad_images(fake: Any, photos: Any, extracted: Any) -> None:
    """Rejects in the shards of an earlier run count as well."""
    folder = photos(20, bad=dict.fromkeys(range(0, 20, 2), "x"))
    for _ in range(4):
        with pytest.raises(ExtractionError):
            extracted(folder, extract__shard_size=2, extract__batch_size=2, data__max_invalid="5")
        assert not (folder.parent / "features" / "s.h5").exists()


def test_a_lower_limit_than_the_rejects_that_are_stored_already_stops_the_run(
    fake: Any, photos: Any, extracted: Any
) -> None:
    """Even when the first batch of this run holds no bad image to show."""
    folder = photos(12, bad=dict.fromkeys(range(4), "x"))
    job, _ = extracted(folder, extract__shard_size=4, data__max_invalid="5")
    (job.folder / "00002.h5").unlink()
    job.output.unlink()
    with pytest.raises(ExtractionError, match="4 x not an image"):
        extracted(folder, extract__shard_size=4, data__max_invalid="2")


# ---------------------------------------------------------------------------------------------------- running again


def test_a_second_run_touches_nothing(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(9, bad={4: "text"})
    job, first = extracted(folder, extract__shard_size=4)
    features = job.output.parent
    before, stamps, built = contents(features), times(features), fake.built
    _, second = extracted(folder, extract__shard_size=4)
    assert contents(features) == before
    assert times(features) == stamps
    assert fake.built == built, "no encoder is built when there is nothing to do"
    assert (second.existing, second.shards, second.seconds) == (3, 3, 0)
    assert second.invalid == first.invalid


def test_other_batch_and_shard_sizes_do_not_disturb_a_complete_store(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(9)
    job, _ = extracted(folder, extract__shard_size=4, extract__batch_size=2)
    before = contents(job.output.parent)
    _, summary = extracted(folder, extract__shard_size=5, extract__batch_size=3)
    assert summary.shards == summary.existing == 3
    assert contents(job.output.parent) == before


@pytest.mark.parametrize("with_index", [True, False], ids=["index there", "index gone"])
def test_only_a_missing_shard_is_made_again_with_the_same_bytes(
    fake: Any, photos: Any, extracted: Any, with_index: bool
) -> None:
    folder = photos(10, bad={6: "text"})
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


def test_no_index_is_there_while_a_missing_shard_is_made_again(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its presence means complete: killed now, the store must not look so."""
    folder = photos(10)
    job, _ = extracted(folder, extract__shard_size=4)
    (job.folder / "00001.h5").unlink()
    real, seen = fake.encode, []

    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        seen.append(job.output.exists())
        return real(self, images)

    monkeypatch.setattr(fake, "encode", encode)
    extracted(folder, extract__shard_size=4)
    assert seen == [False]
    assert job.output.exists()


def test_a_missing_index_alone_is_written_without_an_encoder(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(6)
    job, _ = extracted(folder, extract__shard_size=4)
    before, built = contents(job.output.parent), fake.built
    job.output.unlink()
    extracted(folder, extract__shard_size=4)
    assert contents(job.output.parent) == before
    assert fake.built == built


def test_a_store_begun_with_other_sizes_is_finished_with_its_own(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(10)
    job, _ = extracted(folder, extract__shard_size=4, extract__batch_size=2)
    before = contents(job.output.parent)
    (job.folder / "00002.h5").unlink()
    extracted(folder, extract__shard_size=5, extract__batch_size=3)
    after = contents(job.output.parent)
    after.pop("s/config.yaml"), before.pop("s/config.yaml")
    assert after == before


def test_a_store_of_other_images_is_never_overwritten(fake: Any, photos: Any, extracted: Any) -> None:
    folder = photos(6)
    job, _ = extracted(folder)
    before = contents(job.output.parent)
    Image.new("RGB", (16, 16)).save(folder / "new.png")
    with pytest.raises(MismatchError, match="1 new"):
        extracted(folder)
    assert contents(job.output.parent) == before


def test_an_index_that_belongs_to_another_plan_is_refused(
    fake: Any, photos: Any, extracted: Any, tmp_path: Path
) -> None:
    job, _ = extracted(photos(6), tmp_path / "one" / "s.h5")
    other = tmp_path / "two" / "s.h5"
    other.parent.mkdir()
    shutil.copy(job.output, other)
    with pytest.raises(MismatchError, match=str(other)):
        extracted(photos(7, name="others"), other)
    assert other.read_bytes() == job.output.read_bytes()


def test_a_shard_of_another_plan_is_not_taken_for_ones_own(
    fake: Any, photos: Any, extracted: Any, tmp_path: Path
) -> None:
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
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_runs_left_behind_is_removed(
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


def test_temporary_files_of_workers_that_may_be_running_are_left_alone(
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


# --------------------------------------------------------------------------------------------------------- failures


def overflowing(fake: Any, monkeypatch: pytest.MonkeyPatch, number: int, value: float) -> None:
    """From picture `number` of photos() on, let its grid hold one value that float16 cannot."""
    poisoned = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    real = fake.encode

    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        grids = real(self, images)
        for image, grid in zip(images, grids, strict=True):
            if (image == poisoned).all():
                grid[1, 0, 2] = value
        return grids

    monkeypatch.setattr(fake, "encode", encode)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_value_that_the_stored_type_cannot_hold_names_the_image(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    folder = photos(10)
    overflowing(fake, monkeypatch, 5, value)
    with pytest.raises(ExtractionError) as caught:
        extracted(folder, extract__shard_size=4, extract__batch_size=2)
    assert "0005.png" in caught.value.message
    assert "float16" in caught.value.message
    assert "float32" in caught.value.hint
    features = folder.parent / "features"
    assert not (features / "s.h5").exists()
    assert "00001.h5" not in names_in(features / "s")
    assert no_temporaries(features)


@pytest.mark.parametrize("shard_size", [2, 4])
def test_after_a_failed_batch_no_shard_holds_the_grids_of_another(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch, shard_size: int
) -> None:
    """Batches that wait behind the failed one must not be written into its shard."""
    folder = photos(16)
    with monkeypatch.context() as poison:
        overflowing(fake, poison, 0, np.inf)
        with pytest.raises(ExtractionError, match=r"0000\.png"):
            extracted(folder, extract__shard_size=shard_size, extract__batch_size=2)
    assert "00000.h5" not in names_in(folder.parent / "features" / "s")
    job, _ = extracted(folder, extract__shard_size=shard_size, extract__batch_size=2)
    assert_right(fake, folder, job.output)


def test_a_full_disk_leaves_no_shard_with_the_grids_of_another(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullOnce(ShardWriter):
        calls = 0

        def write(self, *args: Any) -> None:
            type(self).calls += 1
            if self.calls == 2:
                raise OSError(28, "No space left on device")
            super().write(*args)

    folder = photos(16)
    monkeypatch.setattr(plan_module, "ShardWriter", FullOnce)
    with pytest.raises(OSError, match="No space"):
        extracted(folder, extract__shard_size=2, extract__batch_size=2)
    assert no_temporaries(folder.parent / "features")
    job, summary = extracted(folder, extract__shard_size=2, extract__batch_size=2)
    assert summary.existing >= 1, "what was done before the disk was full is kept"
    assert_right(fake, folder, job.output)


def failing_once(fake: Any, error: BaseException) -> Any:
    """An `encode` that fails at its fourth batch: in the middle of the second shard of four images in twos."""
    real, calls = fake.encode, []

    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 4:
            raise error
        return real(self, images)

    return encode


def test_an_error_of_the_encoder_leaves_whole_shards_and_no_temporary_file(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(12)
    encode = failing_once(fake, RuntimeError("CUDA error: an illegal memory access was encountered"))

    with monkeypatch.context() as patch:
        patch.setattr(fake, "encode", encode)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            extracted(folder, extract__shard_size=4, extract__batch_size=2)
    features = folder.parent / "features"
    assert names_in(features) == ["s"]
    lists = {path.name for path in (features / "s").glob("images-*.jsonl")}
    assert set(names_in(features / "s")) - lists <= {"00000.h5", "config.yaml", "plan.json"}
    job, _ = extracted(folder, extract__shard_size=4, extract__batch_size=2)
    assert_right(fake, folder, job.output)


def test_an_encoders_own_value_error_is_not_taken_for_an_overflow(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice to store float32 must not be given for a defect."""

    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        raise ValueError("something else")

    monkeypatch.setattr(fake, "encode", encode)
    with pytest.raises(Exception, match="something else") as caught:
        extracted(photos(4))
    assert "float32" not in getattr(caught.value, "hint", "")


def test_an_interrupt_leaves_whole_shards_and_no_temporary_file(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(12)
    encode = failing_once(fake, KeyboardInterrupt())

    with monkeypatch.context() as patch:
        patch.setattr(fake, "encode", encode)
        with pytest.raises(KeyboardInterrupt):
            extracted(folder, extract__shard_size=4, extract__batch_size=2)
    assert no_temporaries(folder.parent / "features")
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("read", "write"))]
    job, _ = extracted(folder, extract__shard_size=4, extract__batch_size=2)
    assert_right(fake, folder, job.output)


# ------------------------------------------------------------------------------------------------------ the pipeline


class Gauge:
    """How many images are between two points of the pipeline."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self.entered = self.left = self.most = 0

    def enter(self, count: int) -> None:
        with self._lock:
            self.entered += count
            self.most = max(self.most, self.entered - self.left)
            self._lock.notify_all()

    def leave(self, count: int) -> None:
        with self._lock:
            self.left += count

    def wait_until_still(self) -> None:
        """Until nothing has entered for a moment: whoever wants to run ahead has run ahead."""
        with self._lock:
            while self._lock.wait(0.05):
                pass


BATCH, BATCHES = 4, 30


def test_readers_run_ahead_of_a_slow_encoder_by_a_few_batches_only(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge()
    real_load, real_encode = reading_module.load_image, fake.encode

    def load(*args: Any) -> np.ndarray:
        gauge.enter(1)
        return real_load(*args)

    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        gauge.wait_until_still()
        gauge.leave(len(images))
        return real_encode(self, images)

    monkeypatch.setattr(reading_module, "load_image", load)
    monkeypatch.setattr(fake, "encode", encode)
    extracted(photos(BATCH * BATCHES), extract__shard_size=16, extract__batch_size=BATCH)
    assert gauge.entered == BATCH * BATCHES
    assert gauge.most <= 6 * BATCH, "memory must not grow with the number of images"
    assert gauge.most >= 2 * BATCH, "the next batch is read while this one is encoded"


def test_the_encoder_runs_ahead_of_a_slow_disk_by_a_few_batches_only(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge()
    real_encode = fake.encode

    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        gauge.enter(len(images))
        return real_encode(self, images)

    class SlowWriter(ShardWriter):
        def write(self, start: int, grids: np.ndarray, *more: Any) -> None:
            gauge.wait_until_still()
            gauge.leave(len(grids))
            super().write(start, grids, *more)

    monkeypatch.setattr(fake, "encode", encode)
    monkeypatch.setattr(plan_module, "ShardWriter", SlowWriter)
    extracted(photos(BATCH * BATCHES), extract__shard_size=16, extract__batch_size=BATCH)
    assert gauge.entered == BATCH * BATCHES
    assert gauge.most <= 6 * BATCH
    assert gauge.most >= 2 * BATCH, "the next batch is encoded while this one is written"


def test_images_are_read_by_several_threads(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three readers meet at a barrier; with fewer threads it would break."""
    barrier = threading.Barrier(3, timeout=20)
    real_load = reading_module.load_image

    def load(*args: Any) -> np.ndarray:
        barrier.wait()
        return real_load(*args)

    monkeypatch.setattr(reading_module, "load_image", load)
    folder = photos(12)
    job, _ = extracted(folder, extract__num_workers=3, extract__batch_size=6)
    assert_right(fake, folder, job.output)


# -------------------------------------------------------------------------------- the real thing, killed and resumed

PROGRAM = Path(sys.executable).parent / "extract-features"
PATIENCE = 300  # seconds until a test gives up; nothing is measured


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 small photos, one of which is none."""
    folder = tmp_path_factory.mktemp("scenes")
    for i in range(24):
        render(all_scenes()[i * 10], np.random.default_rng(i), 96).save(folder / f"{i:02}.jpg")
    (folder / "13.jpg").write_bytes((folder / "13.jpg").read_bytes()[:200])
    return folder


def command(scenes: Path, output: Path) -> list[str]:
    options = ["--weights", "random", "--shard-size", "8", "--batch-size", "8", "--device", "cpu"]
    return [str(PROGRAM), "--images", str(scenes), "--split", "scenes", "--output", str(output), *options]


def run_to_end(scenes: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command(scenes, output), *more], cwd=output.parent.parent, capture_output=True, text=True, timeout=PATIENCE
    )


@contextlib.contextmanager
def running_until(shard: str, scenes: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """Start an extraction and hand it over as soon as that shard is there."""
    process = subprocess.Popen(
        command(scenes, output),
        cwd=output.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests that were themselves started in the background have inherited a SIGINT that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not (output.with_suffix("") / shard).exists():
            assert process.poll() is None, f"ended before it made {shard}: {process.communicate()[0]}"
            assert time.monotonic() < deadline, f"never made {shard}"
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_then_interrupted_then_started_again_a_run_gives_the_very_same_files(
    scenes: Path, tmp_path: Path
) -> None:
    """As a run that nobody disturbed. All in one test, since every start of the program costs ten seconds."""
    calm = tmp_path / "calm" / "features" / "scenes.h5"
    rough = tmp_path / "rough" / "features" / "scenes.h5"
    for output in (calm, rough):
        output.parent.parent.mkdir()
    undisturbed = run_to_end(scenes, calm)
    assert undisturbed.returncode == 3, undisturbed.stderr
    assert "random weights" in undisturbed.stderr
    assert "truncated" in undisturbed.stdout
    expected = contents(calm.parent)
    assert set(expected) == {
        "scenes.h5",
        "scenes/plan.json",
        "scenes/config.yaml",
        *(f"scenes/0000{s}.h5" for s in range(3)),
        *(name for name in expected if name.startswith("scenes/images-")),
    }

    with running_until("00000.h5", scenes, rough) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not rough.exists()
    assert "00002.h5" not in shards_in(rough.with_suffix(""))
    stamps = times(rough.parent)

    with running_until("00001.h5", scenes, rough) as process:
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130, said
    assert "interrupted" in said
    assert "run the same command again" in said
    assert "Traceback" not in said
    mine = [p for p in rough.parent.rglob(".*.tmp") if f"-{process.pid}-" in p.name]
    assert not mine, "what was killed before may have left something, the interrupted run may not"
    assert not rough.exists()

    again = run_to_end(scenes, rough)
    assert again.returncode == 3, again.stderr
    assert contents(rough.parent) == expected
    assert times(rough.parent)["scenes/00000.h5"] == stamps["scenes/00000.h5"], "a sound shard is made once"
    stamps = times(rough.parent)

    third = run_to_end(scenes, rough, "--allow-invalid")
    assert third.returncode == 0, third.stderr
    assert "nothing to do" in third.stdout
    assert times(rough.parent) == stamps


# --------------------------------------------------------------------------------------------------- several workers


def test_workers_in_any_order_make_the_store_that_one_makes(
    fake: Any, photos: Any, job: Any, extracted: Any, tmp_path: Path
) -> None:
    folder = photos(21, bad={4: "text"})
    keys = {"extract__shard_size": 2, "extract__batch_size": 2}
    extracted(folder, tmp_path / "one" / "s.h5", **keys)
    summaries = []
    for worker in (2, 0, 3, 1):
        prepared = job(folder, tmp_path / "many" / "s.h5", **keys)
        summaries.append(extract_features(prepared, Share(worker, 4), show_progress=False))
    assert [s.complete for s in summaries] == [False, False, False, True]
    assert [s.written for s in summaries] == [3, 3, 2, 3]
    assert [s.invalid.total() for s in summaries] == [1, 0, 0, 1], "their own; at the end of the whole store"
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_another_number_of_workers_finishes_what_some_left(fake: Any, photos: Any, job: Any) -> None:
    prepared = job(photos(20), extract__shard_size=2)
    extract_features(prepared, Share(1, 4), show_progress=False)
    assert not extract_features(prepared, Share(0, 2), show_progress=False).complete
    last = extract_features(prepared, Share(1, 2), show_progress=False)
    assert (last.complete, last.written, last.existing) == (True, 2, 3)
    assert_right(fake, prepared.images, prepared.output)


def test_a_worker_without_work_still_completes_the_store(fake: Any, photos: Any, job: Any) -> None:
    prepared = job(photos(4), extract__shard_size=2)
    extract_features(prepared, Share(0, 1), show_progress=False)
    prepared.output.unlink()
    built = fake.built
    assert extract_features(prepared, Share(7, 8), show_progress=False).complete
    assert fake.built == built


def test_two_workers_with_the_same_shards_at_once_make_the_same_store(
    fake: Any, photos: Any, job: Any, extracted: Any, tmp_path: Path
) -> None:
    folder = photos(24)
    extracted(folder, tmp_path / "one" / "s.h5", extract__shard_size=4)
    prepared = job(folder, tmp_path / "both" / "s.h5", extract__shard_size=4)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(extract_features, prepared, show_progress=False) for _ in range(2)]
        assert all(run.result().complete for run in runs)
    assert contents(tmp_path / "both") == contents(tmp_path / "one")


# ---------------------------------------------------------------------------------------------------------- appended


def test_appended_images_become_new_shards_and_the_old_ones_are_not_touched(
    fake: Any, photos: Any, job: Any, tmp_path: Path
) -> None:
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
    assert_right(fake, folder, longer.output)
    assert extract_features(longer, show_progress=False).written == 0, "and the same list is complete now"


def test_the_store_stays_readable_until_what_was_appended_is_there(
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
        assert store.file_names[6] == "9.png"


# -------------------------------------------------------------------------------------------------- before the first


def test_what_does_not_fit_on_the_disk_is_not_begun(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = job(photos(12), extract__shard_size=4)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=12 * 2 * 2 * 3 * 2 - 1))
    with pytest.raises(ExtractionError, match="GiB are free") as caught:
        extract_features(prepared, show_progress=False)
    assert "--output" in caught.value.hint
    assert fake.built == 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=12 * 2 * 2 * 3 * 2))
    assert extract_features(prepared, show_progress=False).complete


def test_a_survey_counts_what_is_there_and_what_is_mine(fake: Any, photos: Any, job: Any) -> None:
    prepared = job(photos(10), extract__shard_size=2)
    extract_features(prepared, Share(0, 2), show_progress=False)
    state = survey(prepared, Share(1, 2))
    assert (state.existing, state.missing) == ([0, 2, 4], [1, 3])
    assert state.needed == 4 * 2 * 2 * 3 * 2
    assert survey(prepared, Share(0, 2)).missing == []


def test_an_index_that_another_worker_replaces_while_it_is_read_is_read_again(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill of one of three workers showed: the two others ended together, and one of them with an error."""
    prepared = job(photos(5, bad={2: "text"}))
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


def test_an_index_that_does_not_fit_its_shards_is_written_anew(
    fake: Any, photos: Any, job: Any, extracted: Any, tmp_path: Path
) -> None:
    """As when a retried shard took the place of the one that another worker was just indexing."""
    folder = photos(6, bad={4: "text"})
    prepared = job(folder, extract__shard_size=3)
    extract_features(prepared, show_progress=False)
    stale = prepared.output.read_bytes()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "0004.png")
    extract_features(prepared, show_progress=False, retry=True)
    right = prepared.output.read_bytes()
    prepared.output.write_bytes(stale)
    assert extract_features(prepared, show_progress=False).invalid.total() == 0
    assert prepared.output.read_bytes() == right


def test_a_shard_of_another_plan_never_gets_into_an_index(fake: Any, photos: Any, job: Any, tmp_path: Path) -> None:
    """Not even one of a share that this worker does not look at: its rows would stand under other images' ids."""
    one = job(photos(8), tmp_path / "one" / "s.h5", extract__shard_size=2)
    extract_features(one, show_progress=False)
    two = job(photos(7, name="others"), tmp_path / "two" / "s.h5", extract__shard_size=2)
    extract_features(two, Share(0, 2), show_progress=False)
    for name in ("00001.h5", "00003.h5"):
        shutil.copy(one.folder / name, two.folder / name)
    with pytest.raises(StoreError, match=r"00001\.h5: belongs to another plan"):
        extract_features(two, Share(0, 2), show_progress=False)
    assert not two.output.exists()


def test_a_worker_from_before_an_append_leaves_the_index_to_those_after_it(
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


def test_what_killed_runs_left_is_removed_before_room_is_made_for_more(
    fake: Any, photos: Any, job: Any, dead_process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = job(photos(4), extract__shard_size=2).save()
    left = prepared.folder / _temporary_name("00000.h5", this_machine(), dead_process)
    left.write_bytes(b"half a shard")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ExtractionError, match="GiB are free"):
        extract_features(prepared, show_progress=False)
    assert not left.exists()
