"""Convolutions for a CPU: weights laid out for oneDNN once, and not for every batch, and ReLU in the same pass.

It is what torch.compile makes of them with frozen weights, by the same operators of torch, without half a minute of
compiling. One thing is more: where a mean over neighbors comes before a 1 x 1 convolution, it comes after it. Both are
linear and each leaves alone what the other sums over, and after it there are a fourth to a tenth of the channels.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor, fx, nn
from torchvision.models.inception import BasicConv2d

from gridcap.common.device import has_onednn


class PackedConvolution(nn.Module):
    """A convolution with a bias, and ReLU: (B, C, H, W) in channels_last memory -> the same of other sizes.

    Args:
        layer: the convolution, in its final number type.
        shape: of what it will be given; for another batch size it is right too, and a little slower.
        pool: what of `torch.nn.functional.avg_pool2d` lies before it, for a 1 x 1 convolution: all but the images.
    """

    def __init__(self, layer: nn.Conv2d, shape: torch.Size, pool: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._settings = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        self._bias, self._pool = layer.bias, pool
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        self._weight: Tensor = reorder(layer.weight.detach().to_mkldnn(), *self._settings, list(shape))

    def forward(self, images: Tensor) -> Tensor:
        """As the convolution, and ReLU."""
        if self._pool is None:
            return self._convolve(images, self._bias, "relu")
        pooled = F.avg_pool2d(self._convolve(images, None, "none"), **self._pool)
        if self._bias is not None:  # after the mean, in which what is around the image counts as zeros
            pooled += self._bias[:, None, None]
        return pooled.relu_()

    def _convolve(self, images: Tensor, bias: Tensor | None, then: str) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
            images, self._weight, bias, *self._settings, then, [], ""
        )


def can_pack(precision: torch.dtype) -> bool:
    """Whether there are the operators for it."""
    return has_onednn(precision, "_convolution_pointwise") and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, BasicConv2d) or super().is_leaf_module(module, name)


@torch.inference_mode()
def pack_convolutions(trunk: nn.Module, image: Tensor, batch_size: int) -> nn.Module:
    """Pack the convolutions of a CNN whose BatchNorms are folded: those that a ReLU follows, as in InceptionV3.

    Args:
        trunk: on a CPU, frozen, in its final number type and memory format.
        image: (1, C, H, W), one that it could be given, of any content.
        batch_size: of the batches that it will be given.

    Returns:
        What computes the same up to rounding. Without such convolutions it is the trunk itself.
    """
    blocks = {name: block for name, block in trunk.named_modules() if isinstance(block, BasicConv2d)}
    if not blocks:
        return trunk
    shapes: dict[nn.Module, torch.Size] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes[layer] = torch.Size((batch_size, *inputs[0].shape[1:]))

    hooks = [block.register_forward_pre_hook(note) for block in blocks.values()]
    trunk(image)
    for hook in hooks:
        hook.remove()
    packed = fx.GraphModule(trunk, _Tracer().trace(trunk))
    pools = _take_pools(packed.graph, blocks)
    for name, block in blocks.items():
        packed.set_submodule(name, PackedConvolution(block.conv, shapes[block], pools.get(name)))
    packed.recompile()
    return packed


def _take_pools(graph: fx.Graph, blocks: dict[str, BasicConv2d]) -> dict[str, dict[str, Any]]:
    """Take the means over neighbors out of a graph where only a 1 x 1 convolution comes after; say which, and how."""
    pools: dict[str, dict[str, Any]] = {}
    called = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        before = node.args[0] if node.args else None
        if (
            node.op == "call_module"
            and node.target in blocks
            and _is_pointwise(blocks[node.target].conv)
            and called[node.target] == 1
            and isinstance(before, fx.Node)
            and before.target is F.avg_pool2d
            and len(before.users) == 1
            and len(before.args) == 1
        ):
            pools[str(node.target)] = dict(before.kwargs)
            node.args = before.args
            graph.erase_node(before)
    return pools


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
