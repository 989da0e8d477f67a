"""Staging: no buffer is taken again before its grids are out."""

from __future__ import annotations

import contextlib

import pytest
import torch

from gridcap.extract.staging import Staging


@pytest.fixture
def gpu_events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A stand-in for torch.cuda that works at once on the CPU, and the events that were recorded and awaited."""
    events: list[tuple[str, int]] = []

    class Stream:
        def __init__(self, device: object) -> None: ...

        def wait_stream(self, other: object) -> None: ...

    class Event:
        def __init__(self) -> None:
            self.number = sum(kind == "record" for kind, _ in events)

        def record(self, stream: object) -> None:
            events.append(("record", self.number))

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


def test_a_staging_buffer_is_taken_again_only_when_its_grids_are_out(gpu_events: list[tuple[str, int]]) -> None:
    staging = Staging(torch.device("cpu"))
    images = [torch.full((2, 3), value, dtype=torch.uint8) for value in range(5)]
    pending = [staging.run(batch, lambda x: x.half() + 1) for batch in images]
    waits = [number for kind, number in gpu_events if kind == "wait"]
    assert waits == [0, 1], "five batches through three buffers: the first two had to make room"
    assert gpu_events.index(("wait", 0)) < gpu_events.index(("record", 3))
    for value, one in reversed(list(enumerate(pending))):
        assert (one.result() == value + 1).all(), "not another batch's grids"
    assert sorted(number for kind, number in gpu_events if kind == "wait") == [0, 1, 2, 3, 4]


def test_staging_takes_batches_of_any_size(gpu_events: list[tuple[str, int]]) -> None:
    staging = Staging(torch.device("cpu"))
    pending = [
        staging.run(torch.full((size, 3), size, dtype=torch.uint8), lambda x: x.float()) for size in (4, 4, 4, 1, 4)
    ]
    for size, one in zip((4, 4, 4, 1, 4), pending, strict=True):
        assert one.result().shape == (size, 3)
        assert (one.result() == size).all()
