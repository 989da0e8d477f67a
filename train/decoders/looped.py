"""Deferred weight gradients for matmuls in a loop over time steps.

Autograd computes a weight-sized product per time step, rounds it to bfloat16 under autocast, and adds it to the sum
so far. Here, the inputs and output gradients of all steps are kept, and the weight gradient is computed in one matmul
at the end, which is faster and rounds only once.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name in PyTorch code)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gridcap.train.decoders.packed import can_pack, computes_in, pack


class LoopedLinear(nn.Linear):
    """`nn.Linear` whose weight gradient is deferred inside a `looped` block; the parameters are the same."""

    _loop: tuple[_LinearLoop, Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self._loop is None:
            return super().forward(inputs)
        loop, token = self._loop
        return _Product.apply(inputs.to(loop.weight.dtype), token, loop)  # type: ignore[no-any-return]


class LoopedMean:
    """Weighted means over the cells of an image, with deferred gradients for the cells.

    Args:
        cells: (B, P, E).
    """

    def __init__(self, cells: Tensor) -> None:
        self._cells = cells
        self._loop: tuple[_MeanLoop, Tensor] | None = None
        if torch.is_grad_enabled():
            loop = _MeanLoop(cells)
            self._loop = loop, _Sources.apply(loop, cells)

    def __call__(self, weights: Tensor) -> Tensor:
        """Map weights (B, K, P) to means (B, K, E) in the dtype of the cells."""
        weights = weights.to(self._cells.dtype)
        if self._loop is None:
            return weights @ self._cells
        loop, token = self._loop
        return _Product.apply(weights, token, loop)  # type: ignore[no-any-return]


@contextlib.contextmanager
def looped(module: nn.Module) -> Iterator[None]:
    """Defer the weight gradients of the `LoopedLinear` layers of a module that are called in this block.

    Has no effect when gradients are disabled.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, LoopedLinear)] if torch.is_grad_enabled() else []
    try:
        for layer in layers:
            loop = _LinearLoop(layer)
            layer._loop = loop, _Sources.apply(loop, layer.weight, layer.bias)
        yield
    finally:
        for layer in layers:
            layer._loop = None


class _Loop(abc.ABC):
    """The products of one loop with the same matrix.

    Attributes:
        inputs: inputs (..., in) of each call.
        gradients: call index -> gradient (..., out) of its output.
    """

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.gradients: dict[int, Tensor] = {}

    @abc.abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the product."""

    @abc.abstractmethod
    def backward(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the inputs."""

    @abc.abstractmethod
    def finish(self, inputs: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the gradients of the sources, from the calls that contribute to the loss."""


class _LinearLoop(_Loop):
    """inputs @ weight.t() + bias, in the autocast dtype."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._dtype, dtype = layer.weight.dtype, computes_in(layer)
        self.weight = layer.weight.detach().to(dtype)
        self._bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self._packed: Callable[[Tensor], Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.inputs and can_pack(self.weight, self.weight.dtype):  # the first call
            self._packed = pack(self.weight, self._bias, inputs.shape[:-1].numel())
        return F.linear(inputs, self.weight, self._bias) if self._packed is None else self._packed(inputs)

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient @ self.weight

    def finish(self, inputs: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
        outputs = torch.cat([gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients])
        weight = outputs.t() @ torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs])
        return weight.to(self._dtype), None if self._bias is None else outputs.sum(0).to(self._dtype)


class _MeanLoop(_Loop):
    """weights @ cells."""

    def __init__(self, cells: Tensor) -> None:
        super().__init__()
        self._cells = cells.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self._cells

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient @ self._cells.mT

    def finish(self, inputs: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
        return (torch.cat(inputs, 1).mT @ torch.cat(gradients, 1),)


class _Sources(torch.autograd.Function):
    """Return a token on which all products of a loop depend.

    Autograd calls `backward` here after that of all products. The products return no gradient for the token, which
    autograd accepts.
    """

    @staticmethod
    def forward(ctx: Any, loop: _Loop, matrix: Tensor, *others: Tensor | None) -> Tensor:
        ctx.loop, ctx.count = loop, 1 + len(others)
        ctx.set_materialize_grads(False)
        return matrix.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        loop: _Loop = ctx.loop
        gradients, loop.gradients = loop.gradients, {}
        if not gradients:
            return None, *(None,) * ctx.count
        return None, *loop.finish([loop.inputs[call] for call in gradients], list(gradients.values()))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, token: Tensor, loop: _Loop) -> Tensor:
        ctx.loop, ctx.call = loop, len(loop.inputs)
        product = loop.forward(inputs)
        loop.inputs.append(inputs.detach())
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        loop: _Loop = ctx.loop
        loop.gradients[ctx.call] = gradient
        return loop.backward(gradient), None, None
