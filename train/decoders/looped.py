"""Products in a loop over words: the gradient of what stays the same is made once, for all words.

Autograd makes a product as large as the weights for every word, rounds it to bfloat16 under autocast, and adds it to
the sum of those before. Kept until the end, the inputs and the gradients of all words are one product, which is
quicker, and rounded once.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gridcap.train.decoders.packed import can_pack, computes_in, pack


class LoopedLinear(nn.Linear):
    """As `nn.Linear`, with its parameters; inside `looped` as above."""

    _loop: tuple[_LinearLoop, Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self._loop is None:
            return super().forward(inputs)
        loop, token = self._loop
        return _Product.apply(inputs.to(loop.weight.dtype), token, loop)  # type: ignore[no-any-return]


class LoopedMean:
    """Weighted means of an image's cells, for all words of a loop as above.

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
        """(B, K, P) -> (B, K, E) in the cells' type."""
        weights = weights.to(self._cells.dtype)
        if self._loop is None:
            return weights @ self._cells
        loop, token = self._loop
        return _Product.apply(weights, token, loop)  # type: ignore[no-any-return]


@contextlib.contextmanager
def looped(module: nn.Module) -> Iterator[None]:
    """The block is a loop that calls the `LoopedLinear` layers of a module. Without gradient it changes nothing."""
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
    """One loop's products with the same matrix.

    Attributes:
        inputs: (..., in) of each call.
        gradients: (..., out), call -> that of its output.
    """

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.gradients: dict[int, Tensor] = {}

    @abc.abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """The product."""

    @abc.abstractmethod
    def backward(self, gradient: Tensor) -> Tensor:
        """The gradient of its inputs."""

    @abc.abstractmethod
    def finish(self, inputs: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients of the sources, from those calls that the loss has seen."""


class _LinearLoop(_Loop):
    """inputs @ weight.t() + bias, in the type that autocast wants."""

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
        every = torch.cat([gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients])
        by_weight = every.t() @ torch.cat([some.reshape(-1, some.shape[-1]) for some in inputs])
        return by_weight.to(self._dtype), None if self._bias is None else every.sum(0).to(self._dtype)


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
    """Gives a token that all products of a loop depend on: autograd asks here when it has asked all of them. They have
    no gradient for it, which autograd passes on as well."""

    @staticmethod
    def forward(ctx: Any, loop: _Loop, matrix: Tensor, *others: Tensor | None) -> Tensor:
        ctx.loop, ctx.count = loop, 1 + len(others)
        ctx.set_materialize_grads(False)
        return matrix.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        loop: _Loop = ctx.loop
        asked, loop.gradients = loop.gradients, {}
        if not asked:
            return None, *(None,) * ctx.count
        return None, *loop.finish([loop.inputs[call] for call in asked], list(asked.values()))


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
