"""Packed convolutions for CPUs: weights laid out for oneDNN once instead of per batch, and fused ReLU.

torch.compile with frozen weights uses the same operators, but takes half a minute to compile. In addition, average
pooling moves after a following 1x1 convolution: both are linear and act on different axes, so the order does not
matter, and the output of the convolution has a fourth to a tenth of the channels.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, fx, nn
from torchvision.models.inception import BasicConv2d

from gridcap.common.device import has_onednn


class PackedConvolution(nn.Module):
    """A convolution with bias and ReLU: (B, C, H, W) -> (B, C', H', W'), both in channels_last memory format.

    Args:
        layer: the convolution, in its final dtype.
        shape: shape of the expected input; other batch sizes are correct but slightly slower.
        pool: keyword arguments of the `torch.nn.functional.avg_pool2d` that precedes the convolution, if any.
    """

    def __init__(self, layer: nn.Conv2d, shape: torch.Size, pool: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._settings = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        self._bias, self._pool = layer.bias, pool
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        self._weight: Tensor = reorder(layer.weight.detach().to_mkldnn(), *self._settings, list(shape))

    def forward(self, images: Tensor) -> Tensor:
        """Apply pooling, convolution, bias, and ReLU."""
        if self._pool is None:
            return self._convolve(images, self._bias, "relu")
        pooled = F.avg_pool2d(self._convolve(images, None, "none"), **self._pool)
        if self._bias is not None:  # added after pooling, which would average it with zeros from the padding
            pooled += self._bias[:, None, None]
        return pooled.relu_()

    def _convolve(self, images: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
            images, self._weight, bias, *self._settings, activation, [], ""
        )


def can_pack(precision: torch.dtype) -> bool:
    """Return whether this torch build and CPU provide the operators."""
    return has_onednn(precision, "_convolution_pointwise") and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")


class _Tracer(fx.Tracer):
    """Tracer that keeps BasicConv2d blocks as single nodes."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, BasicConv2d) or super().is_leaf_module(module, name)


@torch.inference_mode()
def pack_convolutions(trunk: nn.Module, image: Tensor, batch_size: int) -> nn.Module:
    """Pack the `BasicConv2d` blocks (convolution and ReLU, as in InceptionV3) of a CNN with folded BatchNorm.

    Args:
        trunk: frozen, on the CPU, in its final dtype and memory format.
        image: (1, C, H, W), an input of any content.
        batch_size: expected batch size.

    Returns:
        A module that computes the same function up to rounding; `trunk` itself if there is nothing to pack.
    """
    blocks = {name: block for name, block in trunk.named_modules() if isinstance(block, BasicConv2d)}
    if not blocks:
        return trunk
    shapes: dict[nn.Module, torch.Size] = {}

    def record_shape(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes[layer] = torch.Size((batch_size, *inputs[0].shape[1:]))

    hooks = [block.register_forward_pre_hook(record_shape) for block in blocks.values()]
    trunk(image)
    for hook in hooks:
        hook.remove()
    packed = fx.GraphModule(trunk, _Tracer().trace(trunk))
    pools = _remove_pools(packed.graph, blocks)
    for name, block in blocks.items():
        packed.set_submodule(name, PackedConvolution(block.conv, shapes[block], pools.get(name)))
    packed.recompile()
    return packed


def _remove_pools(graph: fx.Graph, blocks: dict[str, BasicConv2d]) -> dict[str, dict[str, Any]]:
    """Remove average pooling whose only user is a 1x1 convolution; return block name -> arguments of the pooling."""
    pools: dict[str, dict[str, Any]] = {}
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if (
            node.op == "call_module"
            and node.target in blocks
            and _is_pointwise(blocks[node.target].conv)
            and calls[node.target] == 1
            and isinstance(source, fx.Node)
            and source.target is F.avg_pool2d
            and len(source.users) == 1
            and len(source.args) == 1
        ):
            pools[str(node.target)] = dict(source.kwargs)
            node.args = source.args
            graph.erase_node(source)
    return pools


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
