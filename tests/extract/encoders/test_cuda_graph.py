"""The forward pass as a CUDA graph, with a stand-in for the GPU: a replay computes into the captured buffer again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gridcap.extract.encoders.cuda_graph as graph_module
import gridcap.extract.encoders.grid_encoder as encoder_module
from gridcap.extract.encoders.cuda_graph import WARMUP_PASSES, GraphedForward
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.registry import EncoderSettings


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[GraphedForward]:
    """Replace the CUDA graph of torch; return the replayed passes."""
    done: list[GraphedForward] = []

    class Stream:
        def __init__(self, device: object = None) -> None: ...

        def wait_stream(self, other: object) -> None: ...

    class Graphed(GraphedForward):
        def __init__(self, forward: Any, images: Tensor) -> None:
            super().__init__(forward, images)
            self._graph.replay = self._replay  # type: ignore[method-assign]

        def _replay(self) -> None:
            done.append(self)
            self._grids.copy_(self._forward(self._images))

    @contextlib.contextmanager
    def capture(graph: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {}))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(graph_module, "GraphedForward", Graphed)
    monkeypatch.setattr(encoder_module, "GraphedForward", Graphed)
    return done


def test_grids_are_not_overwritten_by_the_next_replay(replays: list[GraphedForward]) -> None:
    calls: list[int] = []

    def forward(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.float() * 2

    graphed = graph_module.GraphedForward(forward, torch.zeros(2, 3, dtype=torch.uint8))
    assert calls == [2] * (WARMUP_PASSES + 1)
    batches = [torch.full((2, 3), value, dtype=torch.uint8) for value in range(3)]
    grids = [graphed(batch) for batch in batches]
    for batch, grid in zip(batches, grids, strict=True):
        assert torch.equal(grid, batch.float() * 2)
    assert len(replays) == 3
    assert torch.equal(graphed(batches[1][:1]), grids[1][:1])
    assert len(replays) == 3, "another shape is computed without the graph"


def test_a_compiled_encoder_on_a_gpu_replays_its_graph_also_for_the_last_batch(
    replays: list[GraphedForward], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "_compile", lambda network, device: network)
    settings = EncoderSettings(image_size=32)
    eager = GridEncoder("timm/resnet18", "random", EncoderOptions("float32", "cpu", "float32"), settings)
    graphed = GridEncoder("timm/resnet18", "random", EncoderOptions("float32", "cpu", "float32"), settings)
    graphed.device = type("Device", (), {"type": "cuda"})()  # type: ignore[assignment]
    monkeypatch.setattr(torch.Tensor, "to", _to_cpu(torch.Tensor.to))
    graphed._fixed_batch = 4
    graphed._warm_up("timm/resnet18", 4)
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    pending = [graphed.submit(images[:4]), graphed.submit(images[4:])]
    assert len(replays) == 2
    grids = np.concatenate([one.result() for one in pending])
    np.testing.assert_allclose(grids, eager.encode(images), rtol=1e-4, atol=1e-4)


def _to_cpu(real: Any) -> Any:
    def to(self: Tensor, *arguments: Any, **more: Any) -> Tensor:
        if arguments and getattr(arguments[0], "type", None) == "cuda":
            return self
        result: Tensor = real(self, *arguments, **more)
        return result

    return to
