"""The estimate of the duration of a run."""

from __future__ import annotations

import torch

from gridcap.train.engine.estimate import STEPS, RunEstimate


def lines(steps: int, seconds: list[float]) -> list[str | None]:
    estimate = RunEstimate(steps, torch.device("cpu"))
    return [estimate.add(value) for value in seconds]


def test_the_estimate_comes_once_and_ignores_the_first_steps() -> None:
    texts = lines(1_020, [60.0] * 5 + [0.5] * 35)
    assert [index for index, text in enumerate(texts) if text] == [STEPS - 1]
    text = texts[STEPS - 1]
    assert text is not None
    assert text.startswith("about 8 min of training left at 0.5 s per step; ")
    assert text.endswith(" GiB of memory")


def test_a_run_that_ends_soon_needs_no_estimate() -> None:
    assert not any(lines(STEPS, [1.0] * STEPS))
