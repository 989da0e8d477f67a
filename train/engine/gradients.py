"""The forward and backward pass of a training step: operator by operator, or replayed as a CUDA graph.

A recurrent decoder launches a thousand small kernels per step, and the GPU waits for the host between them. A graph
launches all of them at once. It needs fixed shapes, so captions are padded to one of a few lengths; padding has no
weight in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gridcap.common.errors import TrainingError, first_line
from gridcap.train.data.batch import CaptionBatch
from gridcap.train.data.vocabulary import PAD
from gridcap.train.decoders.base import Decoder
from gridcap.train.engine.graphs import Graphs
from gridcap.train.engine.job import Runtime
from gridcap.train.objectives.base import Objective

LENGTHS = (12, 16, 20, 24, 31)  # input tokens per caption, BOS included; longer ones are padded to a multiple of 8
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # relative, of the loss and of the gradient norm


@dataclass
class _Captured:
    """A captured pass.

    Attributes:
        batch: the batch that it reads.
        terms: (number of terms,) float64, the summed terms of the loss that it writes.
        replay: runs it.
    """

    batch: CaptionBatch
    terms: Tensor
    replay: Callable[[], None]


class Gradients:
    """Adds the gradients of batches to those of the parameters.

    With graphs, a graph is captured for each shape of a full batch on first use, and its first replay is compared with
    the same pass without it. If a capture fails or the results differ, training continues without graphs.

    Args:
        decoder: decoder being trained.
        objective: loss to minimize.
        runtime: device and precision.
        graphs: captures the passes; None: run them operator by operator.
        required: raise an error instead of continuing without graphs.
    """

    def __init__(
        self,
        decoder: Decoder,
        objective: Objective,
        runtime: Runtime,
        graphs: Graphs | None = None,
        required: bool = False,
    ) -> None:
        self._decoder, self.objective, self._runtime = decoder, objective, runtime
        self._graphs = graphs if objective.capturable else None
        self._required = required
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._largest = 0  # images in the largest batch so far
        self.parameters = list(decoder.parameters())

    def compute(self, batches: Sequence[CaptionBatch], epoch: int) -> dict[str, Tensor]:
        """Set the gradients of the parameters to those of a step, and return the summed terms of the objective.

        Args:
            batches: batches in host memory. Some may be empty.
            epoch: index of the epoch, from 0.

        Returns:
            Name of a term -> its sum, (), float64.
        """
        self._zero()
        names, device = self.objective.term_names, self._runtime.device
        total = torch.zeros(len(names), dtype=torch.float64, device=device)
        for batch in batches:
            if len(batch.images) > 0:
                total = total + self._add(batch, epoch)
        self._complete()
        return dict(zip(names, total.unbind(), strict=True))

    def _zero(self) -> None:
        for parameter in self.parameters:
            if self._graphs is None:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()  # graphs write to the same tensor in every step

    def _complete(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:  # unused by this loss, or a rank without images in a short last step
                parameter.grad = torch.zeros_like(parameter)

    def _add(self, batch: CaptionBatch, epoch: int) -> Tensor:
        self._largest = max(self._largest, len(batch.images))
        if self._graphs is None or len(batch.images) < self._largest:  # the last batch of an epoch may be smaller
            return self._run(batch.to(self._runtime.device), epoch)
        length = padded_length(batch.tokens.shape[-1] - 1)
        key = (*batch.grids.shape, batch.tokens.shape[1], length, self.objective.variant(epoch))
        if key in self._captured:
            captured = self._captured[key]
            _fill(captured.batch, batch)
            captured.replay()
            return captured.terms.clone()  # another graph may overwrite it
        return self._capture(self._graphs, key, _pad(batch, length, self._runtime.device), epoch)

    def _run(self, batch: CaptionBatch, epoch: int) -> Tensor:
        """Run both passes and return the terms, (number of terms,) float64."""
        with self._runtime.autocast():
            loss, terms = self.objective(self._decoder, batch, epoch)
        loss.backward()  # type: ignore[no-untyped-call]
        return torch.stack([terms[name].double() for name in self.objective.term_names])

    def _write(self, terms: Tensor, batch: CaptionBatch, epoch: int) -> None:
        terms.copy_(self._run(batch, epoch))

    def _capture(self, graphs: Graphs, key: tuple[object, ...], batch: CaptionBatch, epoch: int) -> Tensor:
        """Capture a graph, check it, and return the terms of a batch; its gradients have been added."""
        before = [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]
        random_state = _random_state(self._runtime.device)

        def measure(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
            self._zero()
            _set_random_state(self._runtime.device, random_state)
            terms = run()
            self._complete()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            return terms, norm.double()

        expected, norm = measure(lambda: self._run(batch, epoch))
        terms = torch.empty_like(expected)
        problem = None
        try:
            replay = graphs.capture(lambda: self._write(terms, batch, epoch))
            captured = _Captured(batch, terms, replay)
            actual, replayed_norm = measure(lambda: _replay(captured))
            tolerance = _TOLERANCE[self._runtime.precision]
            if not torch.allclose(torch.stack([*actual, replayed_norm]), torch.stack([*expected, norm]), tolerance):
                problem = "its results differ from those without a graph"
        except RuntimeError as error:
            problem = first_line(error)
        if problem is None:
            self._captured[key] = captured
        else:
            self._disable(problem)
            actual, _ = measure(lambda: self._run(batch, epoch))
        torch._foreach_add_([p.grad for p in self.parameters if p.grad is not None], before)
        return actual

    def _disable(self, problem: str) -> None:
        if self._required:
            raise TrainingError(
                f"the training step cannot run as a CUDA graph: {problem}", "use --set train.cuda_graph=auto"
            )
        self._runtime.print(f"note: training continues without CUDA graphs: {problem}")
        self._graphs = None
        self._captured.clear()


def padded_length(length: int) -> int:
    """Return the number of input tokens that captions of a length are padded to."""
    return next((bucket for bucket in LENGTHS if bucket >= length), -(-length // 8) * 8)


def _pad(batch: CaptionBatch, length: int, device: torch.device) -> CaptionBatch:
    """Return a copy of a batch on a device, with captions of `length` input tokens and all of their targets."""
    b, k, _ = batch.tokens.shape
    tokens = torch.full((b, k, length + 1), PAD, device=device)
    padded = CaptionBatch(
        np.array(batch.images),
        torch.empty_like(batch.grids, device=device),
        tokens,
        torch.arange(b * k * length, device=device),
    )
    _fill(padded, batch)
    return padded


def _fill(static: CaptionBatch, batch: CaptionBatch) -> None:
    """Copy a batch into the tensors that a graph reads, without waiting for the device."""
    static.grids.copy_(batch.grids, non_blocking=True)
    static.tokens[..., batch.tokens.shape[-1] :].fill_(PAD)
    static.tokens[..., : batch.tokens.shape[-1]].copy_(batch.tokens, non_blocking=True)


def _replay(captured: _Captured) -> Tensor:
    captured.replay()
    return captured.terms.clone()


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
