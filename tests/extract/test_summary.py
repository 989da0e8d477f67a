"""The summary of a run names the stage that the others wait for."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

import gridcap.extract.reading as reading_module
from gridcap.extract.messages import describe_throughput
from gridcap.extract.summary import Bottleneck, Summary
from tests.extract.cli_helpers import SMALL, run


@pytest.mark.parametrize(
    ("images", "writes", "gpu", "expected", "busy"),
    [
        (0.5, 0.2, None, Bottleneck.FORWARD, 0.93),
        (6.0, 1.0, None, Bottleneck.DECODING, 0.3),
        (1.0, 6.0, None, Bottleneck.DISK, 0.3),
        (0.0, 8.0, 9.5, Bottleneck.FORWARD, 0.95),  # the writers waited for the GPU
        (5.0, 2.0, 4.0, Bottleneck.DECODING, 0.4),
        (2.0, 5.0, 4.0, Bottleneck.DISK, 0.4),
        (0.2, 0.3, 4.0, Bottleneck.HOST, 0.4),
    ],
)
def test_the_bottleneck_is_the_stage_that_the_others_wait_for(
    images: float, writes: float, gpu: float | None, expected: Bottleneck, busy: float
) -> None:
    summary = Summary(
        100, 1, encoded=100, running=10.0, waiting_for_images=images, waiting_for_writes=writes, gpu_seconds=gpu
    )
    assert summary.bottleneck is expected
    assert summary.encoder_busy == pytest.approx(busy)


def described(summary: Summary, dtype: str = "float16", jpeg_decoder: str = "pillow") -> str:
    provenance = {"dtype": dtype, "preprocessing": {"decoder": jpeg_decoder}, "versions": {}}
    extraction: Any = SimpleNamespace(plan=SimpleNamespace(provenance=provenance))
    return describe_throughput(summary, extraction)


def test_the_line_names_the_rate_the_bottleneck_and_the_settings_that_may_help() -> None:
    counts: dict[str, Any] = {"images": 82_783, "shards": 81, "encoded": 82_783, "running": 14.2}
    assert described(Summary(**counts, gpu_seconds=12.922)) == (
        "82,783 images in 14.2 s, 5,830 images/s; GPU busy 91%; bound by the forward pass"
    )
    slow = Summary(**counts, gpu_seconds=5.68, waiting_for_images=8)
    assert described(slow).endswith("GPU busy 40%; bound by decoding (see --num-workers, --jpeg-decoder nvjpeg)")
    assert described(slow, jpeg_decoder="nvjpeg").endswith("bound by decoding (see --num-workers)")
    disk = Summary(**counts, waiting_for_writes=12)
    assert described(disk).endswith("encoder busy 15%; bound by the disk (see --dtype uint8)")
    assert described(disk, dtype="uint8").endswith("bound by the disk")


def test_slow_decoding_is_named(fake: Any, photos: Any, no_launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real_load = reading_module.load_image

    def load(*args: Any) -> Any:
        time.sleep(0.05)
        return real_load(*args)

    monkeypatch.setattr(reading_module, "load_image", load)
    result = run("--images", photos(6), "--num-workers", 1, *SMALL)
    assert re.search(r"6 images in \d\.\d s, \d+\.\d images/s; encoder busy \d+%; bound by decoding", result.output)
    assert "(see --num-workers)" in result.output
