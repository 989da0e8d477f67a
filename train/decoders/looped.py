"""A linear layer that a loop over words calls again and again: its weights' gradient is made once, for all words.

Autograd makes a product as large as the weights for every word, rounds it to bfloat16 under autocast, and adds it to
the sum of those before. Kept until the end, the inputs and the gradients of all words are one product, which is
quicker, and rounded once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LoopedLinear(nn.Linear):
    """As `nn.Linear`, with its parameters; inside `looped` as above."""

    _loop: tuple[_Loop, Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self._loop is None:
            return super().forward(inputs)
        loop, token = self._loop
        return _Product.apply(inputs.to(loop.weight.dtype), token, loop)  # type: ignore[no-any-return]


@contextlib.contextmanager
def looped(module: nn.Module) -> Iterator[None]:
    """The block is a loop that calls the `LoopedLinear` layers of a module. Without gradient it changes nothing."""
    layers = [layer for layer in module.modules() if isinstance(layer, LoopedLinear)] if torch.is_grad_enabled() else []
    try:
        for layer in layers:
            loop = _Loop(layer)
            layer._loop = loop, _Weights.apply(layer.weight, layer.bias, loop)
        yield
    finally:
        for layer in layers:
            layer._loop = None


class _Loop:
    """One loop's calls of a layer.

    Attributes:
        weight, bias: in the type that the products are made in, without gradient.
        inputs: (n, in) of each call.
        gradients: (n, out), call -> that of its output.
    """

    def __init__(self, layer: nn.Linear) -> None:
        kind = layer.weight.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if casts else layer.weight.dtype
        self.weight = layer.weight.detach().to(dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.inputs: list[Tensor] = []
        self.gradients: dict[int, Tensor] = {}


class _Weights(torch.autograd.Function):
    """Gives a token that all products of a loop depend on: autograd asks here when it has asked all of them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, loop: _Loop) -> Tensor:
        ctx.loop, ctx.dtype = loop, weight.dtype
        return weight.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        loop: _Loop = ctx.loop
        asked, loop.gradients = loop.gradients, {}
        if not asked:
            return None, None, None
        gradients = torch.cat(list(asked.values()))
        inputs = torch.cat([loop.inputs[call] for call in asked])
        by_weight = (gradients.t() @ inputs).to(ctx.dtype)
        return by_weight, None if loop.bias is None else gradients.sum(0, dtype=ctx.dtype), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, token: Tensor, loop: _Loop) -> Tensor:
        ctx.loop, ctx.call, ctx.token = loop, len(loop.inputs), token
        loop.inputs.append(inputs.detach().reshape(-1, inputs.shape[-1]))
        return F.linear(inputs, loop.weight, loop.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        loop: _Loop = ctx.loop
        loop.gradients[ctx.call] = gradient.reshape(-1, gradient.shape[-1])
        return gradient @ loop.weight, ctx.token.detach(), None
