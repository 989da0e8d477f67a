"""The extraction loop: failures leave complete shards only, and the stages run ahead by a few batches."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gridcap.extract.plan as plan_module
import gridcap.extract.reading as reading_module
from gridcap.common.errors import ExtractionError
from gridcap.common.store.shard_writer import ShardWriter
from tests.extract.cli_helpers import SMALL, fails
from tests.extract.store_helpers import (
    assert_matches_photos,
    names_in,
    no_temporaries,
)


def overflowing(fake: Any, monkeypatch: pytest.MonkeyPatch, number: int, value: float) -> None:
    """Make the grid of image `number` of photos() contain `value`."""
    target = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    real = fake.encode

    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        grids = real(self, images)
        for image, grid in zip(images, grids, strict=True):
            if (image == target).all():
                grid[1, 0, 2] = value
        return grids

    monkeypatch.setattr(fake, "encode", encode)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_value_that_the_dtype_cannot_store_is_an_error_that_names_the_image(
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


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"extract__precision": "float32"}, "check the file passed with --weights"),
        ({"extract__precision": "bfloat16"}, "pass --precision float32"),
    ],
)
def test_item_23_a_value_that_no_dtype_can_store_does_not_suggest_another_dtype(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch, keys: dict[str, str], expected: str
) -> None:
    overflowing(fake, monkeypatch, 1, np.nan)
    with pytest.raises(ExtractionError, match=r"0001\.png") as caught:
        extracted(photos(3), extract__dtype="float32", **keys)
    assert expected in caught.value.hint
    assert "--dtype" not in caught.value.hint


@pytest.mark.parametrize("shard_size", [2, 4])
def test_batches_queued_behind_a_failed_one_are_not_written_into_its_shard(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch, shard_size: int
) -> None:
    folder = photos(16)
    with monkeypatch.context() as patch:
        overflowing(fake, patch, 0, np.inf)
        with pytest.raises(ExtractionError, match=r"0000\.png"):
            extracted(folder, extract__shard_size=shard_size, extract__batch_size=2)
    assert "00000.h5" not in names_in(folder.parent / "features" / "s")
    job, _ = extracted(folder, extract__shard_size=shard_size, extract__batch_size=2)
    assert_matches_photos(fake, folder, job.output)


def test_a_full_disk_leaves_complete_shards_only(
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
    assert summary.existing >= 1, "shards written before the disk was full are kept"
    assert_matches_photos(fake, folder, job.output)


def failing_once(fake: Any, error: BaseException) -> Any:
    """Return an `encode` that fails at its fourth batch: in the middle of the second shard."""
    real, calls = fake.encode, []

    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 4:
            raise error
        return real(self, images)

    return encode


def test_an_encoder_error_leaves_complete_shards_and_no_temporary_file(
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
    assert_matches_photos(fake, folder, job.output)


def test_a_value_error_of_the_encoder_is_not_reported_as_an_overflow(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint to store float32 must not be given for a bug."""

    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        raise ValueError("something else")

    monkeypatch.setattr(fake, "encode", encode)
    with pytest.raises(Exception, match="something else") as caught:
        extracted(photos(4))
    assert "float32" not in getattr(caught.value, "hint", "")


def test_an_interrupt_leaves_complete_shards_and_no_temporary_file(
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
    assert_matches_photos(fake, folder, job.output)


# Queues


class Gauge:
    """Counts the images between two stages."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self.entered = self.left = self.max = 0

    def enter(self, count: int) -> None:
        with self._lock:
            self.entered += count
            self.max = max(self.max, self.entered - self.left)
            self._lock.notify_all()

    def leave(self, count: int) -> None:
        with self._lock:
            self.left += count

    def wait_until_still(self) -> None:
        """Wait until no image has entered for a moment, so that the stage before is as far ahead as it gets."""
        with self._lock:
            while self._lock.wait(0.05):
                pass


BATCH, BATCHES = 4, 30


def test_decoding_runs_ahead_of_a_slow_encoder_by_a_few_batches(
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
    assert gauge.max <= 6 * BATCH, "memory must not grow with the number of images"
    assert gauge.max >= 2 * BATCH, "the next batch is decoded while this one is encoded"


def test_the_encoder_runs_ahead_of_a_slow_disk_by_a_few_batches(
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
    assert gauge.max <= 6 * BATCH
    assert gauge.max >= 2 * BATCH, "the next batch is encoded while this one is written"


def test_images_are_decoded_by_num_workers_threads(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three threads meet at a barrier, which would break with fewer threads."""
    barrier = threading.Barrier(3, timeout=20)
    real_load = reading_module.load_image

    def load(*args: Any) -> np.ndarray:
        barrier.wait()
        return real_load(*args)

    monkeypatch.setattr(reading_module, "load_image", load)
    folder = photos(12)
    job, _ = extracted(folder, extract__num_workers=3, extract__batch_size=6)
    assert_matches_photos(fake, folder, job.output)


def test_the_summary_counts_encoded_images(fake: Any, photos: Any, extracted: Any) -> None:
    _, summary = extracted(photos(7), extract__batch_size=2)
    assert summary.encoded == 7
    assert 0 < summary.waiting_for_images + summary.waiting_for_writes < summary.running <= summary.seconds


# Memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of GPU memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "out of memory"),
    ],
)
def test_item_16_running_out_of_memory_is_explained(
    fake: Any,
    photos: Any,
    no_launcher: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: str,
) -> None:
    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        raise error

    monkeypatch.setattr(fake, "encode", encode)
    message = fails(1, "--images", photos(6), *SMALL)
    assert expected in message
    assert "(batch size 2)" in message
    assert "use a smaller --batch-size" in message
    assert no_temporaries(tmp_path / "features")
