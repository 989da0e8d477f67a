"""Folding of BatchNorm into convolutions: same function, a quarter less memory traffic."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gridcap.common.scenes import calibration_batch

TOLERANCE = 1e-3  # relative to the largest value of a grid; folding in float32 changes grids by about 1e-6


@torch.no_grad()
def fold_if_equal(network: nn.Module, images: Tensor) -> nn.Module:
    """Fold BatchNorm if the outputs stay the same.

    Folding assumes that a BatchNorm layer after a convolution in the list of children also follows it in the forward
    pass. Networks of any origin may do otherwise; they are returned unchanged.

    Args:
        network: in eval mode, float32.
        images: (B, 3, H, W), normalized.
    """
    folded = copy.deepcopy(network).eval()
    fold_batch_norm(folded)
    expected = network(images)
    difference = (folded(images) - expected).abs().max()
    return folded if difference <= TOLERANCE * expected.abs().max() else network


def fold_batch_norm(module: nn.Module) -> None:
    """Fold each BatchNorm into the preceding convolution, in place.

    A subclass that also applies an activation, such as timm's `BatchNormAct2d`, is replaced by this activation. Other
    subclasses are left alone.
    """
    children = list(module.named_children())
    for (name, layer), (norm_name, norm) in zip(children, children[1:], strict=False):
        if type(layer) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d):
            rest = _without_normalization(norm)
            if rest is not None:
                setattr(module, name, fuse_conv_bn_eval(layer, norm))
                setattr(module, norm_name, rest)
    for _, child in children:
        fold_batch_norm(child)


def _without_normalization(norm: nn.BatchNorm2d) -> nn.Module | None:
    """Return what a BatchNorm layer does besides normalizing; None if that is unknown."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    activation = getattr(norm, "act", None)
    if type(norm).__name__ == "BatchNormAct2d" and isinstance(activation, nn.Module):
        return activation
    return None


def probe(side: int) -> Tensor:
    """Return one rendered image, uint8 (1, side, side, 3)."""
    return torch.from_numpy(calibration_batch(1, side))
