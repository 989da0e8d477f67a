"""Convolutions for a CPU: weights laid out for oneDNN once, and not for every batch, and ReLU in the same pass.

It is what torch.compile makes of them with frozen weights, by the same operators of torch, without half a minute of
compiling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d

from common.device import choose_precision


class PackedConvolution(nn.Module):
    """A convolution with a bias, and ReLU: (B, C, H, W) in channels_last memory -> the same of other sizes.

    Args:
        layer: the convolution, in its final number type.
        shape: of what it will be given; for another batch size it is right too, and a little slower.
    """

    def __init__(self, layer: nn.Conv2d, shape: torch.Size) -> None:
        super().__init__()
        self._settings = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        self._bias = layer.bias
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        self._weight: Tensor = reorder(layer.weight.detach().to_mkldnn(), *self._settings, list(shape))

    def forward(self, images: Tensor) -> Tensor:
        """As the convolution, and ReLU."""
        return torch.ops.mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
            images, self._weight, self._bias, *self._settings, "relu", [], ""
        )


def can_pack(precision: torch.dtype) -> bool:
    """Whether this torch has oneDNN, and the operators, which it keeps for its compiler; for bfloat16 they want a CPU
    that computes in it."""
    return (
        precision in (torch.float32, choose_precision("auto", torch.device("cpu")))
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


@torch.inference_mode()
def pack_convolutions(trunk: nn.Module, image: Tensor, batch_size: int) -> None:
    """Replace the convolutions of a CNN whose BatchNorms are folded: those that a ReLU follows, as in InceptionV3.

    Args:
        trunk: on a CPU, frozen, in its final number type and memory format.
        image: (1, C, H, W), one that it could be given, of any content.
        batch_size: of the batches that it will be given.
    """
    shapes: dict[nn.Module, torch.Size] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes[layer] = torch.Size((batch_size, *inputs[0].shape[1:]))

    blocks = [(parent, name, child) for parent in trunk.modules() for name, child in parent.named_children()
              if isinstance(child, BasicConv2d)]  # fmt: skip
    hooks = [block.register_forward_pre_hook(note) for _, _, block in blocks]
    trunk(image)
    for hook in hooks:
        hook.remove()
    for parent, name, block in blocks:
        setattr(parent, name, PackedConvolution(block.conv, shapes[block]))
