"""Encoders from torchvision: InceptionV3 and ResNets, cut at their last or an earlier feature map."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torchvision
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from gridcap.common.errors import UserError
from gridcap.extract.encoders.registry import Encoder, EncoderSettings, EncoderSpec, register_encoder
from gridcap.extract.encoders.specs import CNNS, TORCHVISION_NAMES
from gridcap.extract.encoders.trunk import build_trunk
from gridcap.extract.encoders.weights import WeightsIdentity, identify_cnn_weights, imagenet_name


class ChannelsLast(nn.Module):
    """(B, channels, rows, columns) -> (B, rows, columns, channels)."""

    def forward(self, maps: Tensor) -> Tensor:
        """Permute the axes."""
        return maps.permute(0, 2, 3, 1)


@dataclass(frozen=True)
class _Cut:
    """Where the network ends: after a child of the trunk, or at a node of the graph."""

    layer: str
    is_child: bool


@register_encoder(*TORCHVISION_NAMES)
class TorchvisionEncoder(Encoder):
    """A CNN of torchvision.

    `settings.layer` is the name of a layer ("Mixed_6e", "layer3") or of any node of
    `torchvision.models.feature_extraction.get_graph_node_names` that returns a feature map.

    Raises:
        UserError: the layer does not exist or returns no feature map, or the images are too small.
    """

    def __init__(self, name: str, settings: EncoderSettings) -> None:
        cnn = CNNS[name]
        layer = settings.layer or cnn.layers[-1]
        self._cut = _Cut(layer, layer in cnn.layers)
        self.versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        self.spec = EncoderSpec(
            name,
            layer,
            settings.image_size or cnn.side,
            cnn.grid_shape,
            settings.mean or cnn.mean,
            settings.std or cnn.std,
        )
        if (layer, self.spec.side) != (cnn.layers[-1], cnn.side):
            self.spec = replace(self.spec, grid_shape=self._measure_grid())

    def identify_weights(self, weights: str, download: bool = True) -> WeightsIdentity:
        """Locate ImageNet weights (in torch's cache), random weights, or a file."""
        return identify_cnn_weights(self.spec.name, weights, download)

    def weights_argument(self, name: str) -> str | None:
        """Return the value of --weights for the recorded name of weights."""
        return "imagenet" if name == imagenet_name(self.spec.name) else None

    def build(self, identity: WeightsIdentity) -> nn.Module:
        """Build the CNN up to its grid."""
        return nn.Sequential(self._cut_network(build_trunk(self.spec.name, identity)), ChannelsLast()).eval()

    def _cut_network(self, trunk: nn.Module) -> nn.Module:
        if not self._cut.is_child:
            return _SingleOutput(create_feature_extractor(trunk, [self._cut.layer]), self._cut.layer)
        children = dict(trunk.named_children())
        layers = list(children)[: list(children).index(self._cut.layer) + 1]
        if len(layers) == len(children):
            return trunk
        return nn.Sequential(*(children[name] for name in layers))

    def _measure_grid(self) -> tuple[int, int, int]:
        """Return the shape of a grid, from a forward pass without data."""
        name, layer, side = self.spec.name, self.spec.layer, self.spec.side
        cnn = CNNS[name]
        with torch.device("meta"), torch.inference_mode():
            model = models.get_model(name, weights=None, **cnn.arguments)
            trunk = nn.Sequential()
            for child in cnn.layers:
                trunk.add_module(child, getattr(model, child))
            try:
                network = self._cut_network(trunk.eval())
                maps = network(torch.empty(1, 3, side, side))
            except (RuntimeError, ValueError) as error:
                if self._cut.is_child:
                    raise UserError(f"--image-size {side}: too small for {name}", "use larger images") from error
                raise _unknown_layer(name, layer) from error
        if maps.ndim != 4:
            raise _unknown_layer(name, layer)
        return (maps.shape[2], maps.shape[3], maps.shape[1])


class _SingleOutput(nn.Module):
    """The only output of a feature extractor."""

    def __init__(self, extractor: nn.Module, layer: str) -> None:
        super().__init__()
        self.extractor, self.layer = extractor, layer

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature map (B, channels, rows, columns)."""
        maps: Tensor = self.extractor(images)[self.layer]
        return maps


def _unknown_layer(name: str, layer: str) -> UserError:
    return UserError(
        f"--layer {layer}: not a layer of {name} that returns a feature map",
        f"use one of {', '.join(CNNS[name].layers)}, or a node of this part of the network",
    )
