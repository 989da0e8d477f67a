"""Batches that do not fit in the memory of the device: halves, one warning, the same rows, a recorded batch size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gridcap.common.store.shard_reader import ShardReader
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.registry import EncoderSettings
from gridcap.extract.halving import HalvingEncoder
from gridcap.extract.run import extract_features
from gridcap.extract.staging import PendingGrids
from tests.extract.cli_helpers import RANDOM, fails, run
from tests.extract.store_helpers import assert_matches_photos, contents

KEYS = {"extract__batch_size": 8, "extract__shard_size": 10, "extract__views": "original,hflip"}


class SmallDevice:
    """An encoder that returns the first pixel of each image and has memory for `capacity` images."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.calls: list[tuple[int, int | None]] = []

    def submit(self, images: Any, batch_size: int | None = None) -> PendingGrids:
        self.calls.append((len(images), batch_size))
        if len(images) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        grids = np.array(images[:, 0, 0, :1], np.float32)
        return PendingGrids(lambda: grids)


def limit_memory(fake: Any, monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    real = fake.encode

    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        if len(images) > capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        grids: np.ndarray = real(self, images)
        return grids

    monkeypatch.setattr(fake, "encode", encode)


def batch_sizes(folder: Path) -> list[int | None]:
    return [ShardReader(path).batch_size for path in sorted(folder.glob("*.h5"))]


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 8])
def test_rows_keep_their_order_and_later_batches_start_with_the_size_that_fits(
    capacity: int, capsys: pytest.CaptureFixture[str]
) -> None:
    device = SmallDevice(capacity)
    halving = HalvingEncoder(device, 8)
    images = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1)
    fitting = {1: 1, 2: 2, 3: 2, 7: 4, 8: 8}[capacity]
    for _ in range(2):
        pending = halving.submit(images)
        assert pending.result().ravel().tolist() == list(range(8))
        assert pending.batch_size == fitting
    failed = [size for size, _ in device.calls if size > capacity]
    assert failed == [8, 4, 2][: len(failed)], "each size fails once"
    assert all(size <= (batch_size or 0) for size, batch_size in device.calls)
    assert capsys.readouterr().err.count("warning: out of memory") == len(failed)
    assert halving.submit(images, at_most=1).batch_size == 1


def test_other_errors_and_a_single_image_that_does_not_fit_are_raised() -> None:
    images = np.zeros((4, 1, 1, 1), np.uint8)
    with pytest.raises(torch.OutOfMemoryError):
        HalvingEncoder(SmallDevice(0), 4).submit(images)
    device = SmallDevice(4)
    device.submit = lambda *_: (_ for _ in ()).throw(ValueError("a bug"))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="a bug"):
        HalvingEncoder(device, 4).submit(images)


def test_a_store_is_complete_and_each_shard_records_the_computed_batch_size(
    fake: Any,
    photos: Any,
    job: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = photos(23, invalid={4: "text"})
    with monkeypatch.context() as patch:
        limit_memory(fake, patch, 4)
        limited = job(folder, **KEYS)
        extract_features(limited, show_progress=False)
    assert capsys.readouterr().err.count("warning: ") == 1
    assert_matches_photos(fake, folder, limited.output, {4: "not an image"})
    assert batch_sizes(limited.folder) == [4, 4, 4]
    whole = job(folder, tmp_path / "whole" / "s.h5", **KEYS)
    extract_features(whole, show_progress=False)
    assert batch_sizes(whole.folder) == [8, 8, 8]


def test_a_retry_computes_a_shard_as_it_was_computed_first(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = photos(12, invalid={3: "text"})
    keys = {**KEYS, "data__max_invalid": "50%"}
    retried, fresh = job(folder, **keys), job(folder, tmp_path / "fresh" / "s.h5", **keys)
    with monkeypatch.context() as patch:
        limit_memory(fake, patch, 4)
        extract_features(retried, show_progress=False)
        shutil.copy(folder / "0002.png", folder / "0003.png")
        extract_features(fresh, show_progress=False)
    fake.batches.clear()
    assert extract_features(retried, show_progress=False, retry=True).retried == 1
    assert fake.batches == [4, 4, 4, 4], "one batch of two views in halves, although there is enough memory now"
    assert contents(retried.folder) == contents(fresh.folder)


def test_the_batch_size_of_a_store_without_shards_may_change(
    fake: Any, photos: Any, no_launcher: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = photos(6)
    arguments = ("--images", folder, "--output", tmp_path / "s.h5", *RANDOM)
    with monkeypatch.context() as patch:
        limit_memory(fake, patch, 0)
        message = fails(1, *arguments, "--batch-size", 4)
    assert "out of GPU memory" in message
    assert "use a smaller --batch-size" in message
    result = run(*arguments, "--shard-size", 3, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    assert "replacing a different plan, which has no shards yet" in result.stderr
    assert batch_sizes(tmp_path / "s") == [2, 2]
    assert_matches_photos(fake, folder, tmp_path / "s.h5")
    (tmp_path / "s.h5").unlink()
    (tmp_path / "s" / "00001.h5").unlink()
    limit_memory(fake, monkeypatch, 0)
    message = fails(1, *arguments, "--batch-size", 1)
    assert "started with shard size 3 and batch size 2" in message
    assert "start a new --output with a smaller --batch-size" in message


def test_compiled_encoders_pad_batches_to_the_computed_size() -> None:
    """Without padding, the last bits of a grid would depend on the size of the last batch."""
    options = EncoderOptions(precision="float32", dtype="float32")
    encoder = GridEncoder("timm/resnet18", "random", options, EncoderSettings(image_size=32))
    sizes: list[int] = []
    network = encoder._network
    encoder._network = lambda images: (sizes.append(len(images)), network(images))[1]
    encoder._fixed_batch = 4
    images = np.random.default_rng(0).integers(0, 256, (3, encoder.side, encoder.side, 3), np.uint8)
    grids = HalvingEncoder(encoder, 4).submit(images).result()
    halves = HalvingEncoder(encoder, 4).submit(images, at_most=2).result()
    assert sizes == [4, 2, 2]
    np.testing.assert_allclose(halves, grids, rtol=1e-4, atol=1e-4)
