"""Packed linear layers for decoding loops on CPUs: cast and lay out the weights for oneDNN once per loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gridcap.common.device import has_onednn

MIN_ROWS = 4  # with fewer rows, a step is memory-bound and packing takes as long as it saves


@contextlib.contextmanager
def packed(module: nn.Module, rows: int) -> Iterator[None]:
    """Pack the weights of the `nn.Linear` layers of a module while the block runs, where that is faster.

    Results are equal up to rounding. Packing is for decoding loops; it has no effect when gradients are enabled, on a
    GPU, or if PyTorch was built without oneDNN. The weights must not change within the block.

    Args:
        module: module whose layers are packed, including submodules.
        rows: typical number of input vectors per call; any other number works too.
    """
    changed: list[nn.Linear] = []
    try:
        for layer in module.modules() if rows >= MIN_ROWS and not torch.is_grad_enabled() else ():
            if isinstance(layer, nn.Linear) and "forward" not in vars(layer) and (forward := _packed(layer, rows)):
                vars(layer)["forward"] = forward
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)  # already removed if another thread decodes with this decoder


def can_pack(weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether `pack` supports a weight on its device, computing in `dtype`."""
    return weight.device.type == "cpu" and has_onednn(dtype, "_reorder_linear_weight", "_linear_pointwise")


def pack(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """Return a linear map with weights in oneDNN's layout.

    Args:
        weight: (out, in) in the dtype to compute in.
        bias: (out,) in the same dtype, or None.
        rows: typical number of input vectors per call.

    Returns:
        A function from (..., in) to (..., out) in that dtype, without gradient.
    """
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda inputs: torch.ops.mkldnn._linear_pointwise(inputs, reordered, bias, "none", [], "")


def computes_in(layer: nn.Linear) -> torch.dtype:
    """Return the dtype a layer computes in: the autocast dtype if autocast is enabled, or else the weight's."""
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
        """Map (..., in) to (..., out)."""
        if torch.is_grad_enabled() or computes_in(layer) != dtype:  # called by another thread in another mode
            return type(layer).forward(layer, inputs)
        return product(inputs.to(dtype))

    return forward
