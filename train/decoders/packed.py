"""Linear layers in a loop over words on a CPU: weights are cast and laid out for oneDNN once, not for every word."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gridcap.common.device import has_onednn

# With fewer a word reads every weight once and computes next to nothing: packing them takes as long as it saves.
_FEWEST_ROWS = 4


@contextlib.contextmanager
def packed(module: nn.Module, rows: int) -> Iterator[None]:
    """In this block the `nn.Linear` layers of a module have packed weights, where that is quicker.

    They compute the same up to rounding. It is for loops without gradient; with gradient, on a GPU, or with a torch
    that has no oneDNN it changes nothing. The weights must stay as they are in the block.

    Args:
        module: the layers are its own and those of its parts.
        rows: vectors that a layer is mostly given at once; with any other number it is right too.
    """
    changed: list[nn.Linear] = []
    try:
        for layer in module.modules() if rows >= _FEWEST_ROWS and not torch.is_grad_enabled() else ():
            if isinstance(layer, nn.Linear) and "forward" not in vars(layer) and (forward := _packed(layer, rows)):
                vars(layer)["forward"] = forward
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)  # None: another search with this decoder, by another thread


def can_pack(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether `pack` can be had for a weight on its device, to compute in `dtype`."""
    return weight.device.type == "cpu" and has_onednn(dtype, "_reorder_linear_weight", "_linear_pointwise")


def pack(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """A product with weights that are laid out for oneDNN, once and for all calls.

    Args:
        weight: (out, in), in the type to compute in.
        bias: (out,) in the same type, or none.
        rows: vectors that it is mostly given at once.

    Returns:
        (..., in) in that type -> (..., out), without gradient.
    """
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda inputs: torch.ops.mkldnn._linear_pointwise(inputs, laid_out, bias, "none", [], "")


def computes_in(layer: nn.Linear) -> torch.dtype:
    """Its weight's type, or what autocast wants."""
    kind = layer.weight.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else layer.weight.dtype


def _packed(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor] | None:
    dtype = computes_in(layer)
    if not can_pack(layer.weight, dtype):
        return None
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    product = pack(layer.weight.detach().to(dtype), bias, rows)

    def forward(inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_grad_enabled() or computes_in(layer) != dtype:  # another thread's call, which wants something else
            return type(layer).forward(layer, inputs)
        return product(inputs.to(dtype))

    return forward
