"""Linear layers in a loop over words on a CPU: weights are cast and laid out for oneDNN once, not for every word."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from common.device import has_onednn

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
        for layer in module.modules() if rows >= _FEWEST_ROWS else ():
            if isinstance(layer, nn.Linear) and "forward" not in vars(layer) and _can_pack(layer):
                vars(layer)["forward"] = _packed(layer, rows)
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)  # None: another search with this decoder, by another thread


def _can_pack(layer: nn.Linear) -> bool:
    """Whether there are the operators for it, and no gradient is wanted."""
    return (
        layer.weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and has_onednn(_dtype(layer), "_reorder_linear_weight", "_linear_pointwise")
    )


def _dtype(layer: nn.Linear) -> torch.dtype:
    """What the layer computes in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype


def _packed(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    dtype = _dtype(layer)
    weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), rows)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_grad_enabled() or _dtype(layer) != dtype:  # another thread's call, which wants something else
            return type(layer).forward(layer, inputs)
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            inputs.to(dtype), weight, bias, "none", [], ""
        )

    return forward
