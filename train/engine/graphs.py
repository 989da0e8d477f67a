"""Capture of CUDA graphs, behind an interface that tests can replace on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

_WARMUP_RUNS = 3  # libraries allocate workspaces and select algorithms in the first runs


class Graphs(Protocol):
    """Captures functions as graphs."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture a function that reads and writes fixed tensors, and return a function that replays it.

        The function runs a few times. Any error of capturing it is raised.
        """


class CudaGraphs:
    """Graphs of one device that share a memory pool, so that only the largest one determines the memory in use.

    The results of a replay must be used before another graph is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Implement `Graphs.capture`."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP_RUNS):
                function()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        return graph.replay
