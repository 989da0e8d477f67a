"""torchvision's CNNs, cut at their last feature grid. Importing this module does not load torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CnnSpec:
    """A torchvision CNN: how to build it, where to cut it, and the input it expects.

    Attributes:
        name: name of the model in torchvision.
        weights: torchvision's ImageNet weights, as `torchvision.models.get_weight` takes them.
        layers: children of the model up to the grid, which run one after the other.
        side: side of the square input images, in pixels.
        grid_shape: (rows, columns, channels) of a grid.
        mean, std: per-channel normalization of values in [0, 1].
        arguments: keyword arguments of the model's constructor.
    """

    name: str
    weights: str
    layers: tuple[str, ...]
    side: int
    grid_shape: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    arguments: Mapping[str, Any] = field(default_factory=dict)


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_RESNET_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
_INCEPTION_LAYERS = (
    "Conv2d_1a_3x3",
    "Conv2d_2a_3x3",
    "Conv2d_2b_3x3",
    "maxpool1",
    "Conv2d_3b_1x1",
    "Conv2d_4a_3x3",
    "maxpool2",
    "Mixed_5b",
    "Mixed_5c",
    "Mixed_5d",
    "Mixed_6a",
    "Mixed_6b",
    "Mixed_6c",
    "Mixed_6d",
    "Mixed_6e",
    "Mixed_7a",
    "Mixed_7b",
    "Mixed_7c",
)


def _resnet(name: str, weights: str) -> CnnSpec:
    return CnnSpec(name, weights, _RESNET_LAYERS, 256, (8, 8, 2048), _IMAGENET_MEAN, _IMAGENET_STD)


_SPECS = (
    CnnSpec(
        "inception_v3",
        "Inception_V3_Weights.IMAGENET1K_V1",
        _INCEPTION_LAYERS,
        299,
        (8, 8, 2048),
        # These weights were trained on values in [-1, 1], which torchvision's `transform_input` computes from
        # ImageNet-normalized input.
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        arguments={"init_weights": False},
    ),
    _resnet("resnet50", "ResNet50_Weights.IMAGENET1K_V1"),
    _resnet("resnet101", "ResNet101_Weights.IMAGENET1K_V1"),
    _resnet("resnet152", "ResNet152_Weights.IMAGENET1K_V1"),
)
CNNS: dict[str, CnnSpec] = {spec.name: spec for spec in _SPECS}
TORCHVISION_NAMES = tuple(CNNS)
