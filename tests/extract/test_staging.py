"""Staging: no buffer is reused before its grids have been copied."""

from __future__ import annotations

import contextlib

import pytest
import torch

from gridcap.extract.staging import Staging


@pytest.fixture
def gpu_events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Replace torch.cuda by a fake that runs on the CPU; return the recorded and awaited events."""
    events: list[tuple[str, int]] = []

    class Stream:
        def __init__(self, device: object) -> None: ...

        def wait_stream(self, other: object) -> None: ...

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.timing = enable_timing
            self.number = sum(kind == "record" for kind, _ in events)

        def record(self, stream: object) -> None:
            if not self.timing:
                events.append(("record", self.number))

        def elapsed_time(self, end: Event) -> float:
            assert self.timing
            assert end.timing
            return 250.0  # milliseconds

        def synchronize(self) -> None:
            events.append(("wait", self.number))

    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **more: real_empty(*args, **more))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return events


def test_a_buffer_is_reused_only_after_its_grids_have_been_copied(gpu_events: list[tuple[str, int]]) -> None:
    staging = Staging(torch.device("cpu"))
    images = [torch.full((2, 3), value, dtype=torch.uint8) for value in range(5)]
    pending = [staging.run(batch, lambda x: x.half() + 1) for batch in images]
    waits = [number for kind, number in gpu_events if kind == "wait"]
    assert waits == [0, 1], "five batches use three buffers: the first two were awaited"
    assert gpu_events.index(("wait", 0)) < gpu_events.index(("record", 3))
    for value, one in reversed(list(enumerate(pending))):
        assert (one.result() == value + 1).all(), "the grids of this batch"
    assert sorted(number for kind, number in gpu_events if kind == "wait") == [0, 1, 2, 3, 4]
    assert sum(staging.forward_seconds) == 5 * 0.25


def test_staging_accepts_batches_of_any_size(gpu_events: list[tuple[str, int]]) -> None:
    staging = Staging(torch.device("cpu"))
    pending = [
        staging.run(torch.full((size, 3), size, dtype=torch.uint8), lambda x: x.float()) for size in (4, 4, 4, 1, 4)
    ]
    for size, one in zip((4, 4, 4, 1, 4), pending, strict=True):
        assert one.result().shape == (size, 3)
        assert (one.result() == size).all()
