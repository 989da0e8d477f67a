"""The batch size of a new store on a GPU, with stand-ins for the GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import gridcap.extract.job as job_module
import gridcap.extract.reading as reading_module
import gridcap.extract.writer as writer_module
from gridcap.extract.cluster.share import own_cores
from gridcap.extract.run import extract_features
from gridcap.extract.staging import NUM_SLOTS, PendingGrids
from gridcap.extract.tuning import choose_fastest_batch_size, measure_rate


def out_of_memory(size: int) -> float:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("rates", "largest", "expected"),
    [
        ({32: 100, 64: 180, 128: 300, 256: 310}, 1024, 128),  # stops rising
        ({32: 100, 64: 180, 128: 300, 256: 500}, 200, 128),  # the shards are small
        ({32: 100, 64: 180}, 1024, 64),  # out of memory
        ({}, 1024, 32),
        ({32: 100, 64: 50, 128: 1000}, 1024, 32),
        ({10: 100}, 10, 10),
    ],
)
def test_the_batch_size_is_doubled_until_the_throughput_stops_rising(
    rates: dict[int, float], largest: int, expected: int
) -> None:
    assert choose_fastest_batch_size(lambda size: rates.get(size) or out_of_memory(size), largest) == expected


def test_other_errors_are_raised() -> None:
    with pytest.raises(KeyError):
        choose_fastest_batch_size(lambda size: {32: 1.0, 64: 2.0}[size], 1024)


def test_the_rate_is_measured_with_as_many_pending_batches_as_in_an_extraction() -> None:
    pending, most = 0, 0

    class Encoder:
        side = 4

        def submit(self, images: np.ndarray) -> PendingGrids:
            nonlocal pending, most
            assert images.shape == (8, 4, 4, 3)
            pending += 1
            most = max(most, pending)

            def collect() -> np.ndarray:
                nonlocal pending
                pending -= 1
                return np.zeros(0)

            return PendingGrids(collect)

    assert measure_rate(Encoder(), 8, seconds=0.01) > 0
    assert (pending, most) == (0, NUM_SLOTS)


def test_the_plan_fixes_the_measured_batch_size(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(9)
    real = job_module.choose_device
    monkeypatch.setattr(job_module, "MIN_IMAGES", 9)
    monkeypatch.setattr(job_module, "GridEncoder", fake)
    sizes: list[int] = []

    def measure(encoder: Any, size: int) -> float:
        sizes.append(size)
        return size if size <= 64 else 65

    monkeypatch.setattr(job_module, "measure_rate", measure)
    assert job(folder).plan.batch_size == 32, "on a CPU, nothing is measured"
    monkeypatch.setattr(job_module, "choose_device", lambda name: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(job_module, "choose_decoder", lambda *_: job_module.load_decoder("pillow", real("cpu")))
    monkeypatch.setattr(job_module, "describe_features", cuda_features(job_module.describe_features))
    assert job(folder, extract__batch_size=7).plan.batch_size == 7
    assert job(folder, extract__compile="on").plan.batch_size == 256
    assert not sizes
    started = job(folder)
    assert started.plan.batch_size == 64
    assert sizes == [32, 64, 128]
    extract_features(started, show_progress=False)
    assert job(folder).plan == started.plan
    assert len(sizes) == 3, "the store keeps the batch size of its plan"


def cuda_features(describe: Any) -> Any:
    def described(*arguments: Any) -> dict[str, Any]:
        return {**describe(*arguments), "precision": "float32"}

    return described


def test_processes_of_one_machine_divide_its_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("gridcap.extract.cluster.share.available_cores", lambda: 16)
    assert own_cores({}) == 16
    assert own_cores({"LOCAL_WORLD_SIZE": "8"}) == 16, "inherited from another program"
    assert own_cores({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}) == 8
    assert own_cores({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "64"}) == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    provenance: Any = {"preprocessing": {"decoder": "pillow"}, "versions": {}}
    config: Any = SimpleNamespace(extract=SimpleNamespace(num_workers=None))
    extraction: Any = SimpleNamespace(config=config, plan=SimpleNamespace(provenance=provenance))
    monkeypatch.setattr(reading_module, "fit_in_memory", lambda count, size: count)
    assert reading_module.worker_count(extraction, on_gpu=True) == 8
    assert writer_module.writer_count(True, 100) == 4
