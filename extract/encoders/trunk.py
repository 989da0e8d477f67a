"""Construction of the trunk, a torchvision CNN up to its feature grid, and normalization of its input."""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import models

from gridcap.common.errors import WeightsError
from gridcap.common.scenes import calibration_batch
from gridcap.extract.encoders import weights
from gridcap.extract.encoders.keras_weights import exclude_padding, is_keras_file, read_keras_weights
from gridcap.extract.encoders.registry import EncoderSpec
from gridcap.extract.encoders.specs import CNNS, CnnSpec
from gridcap.extract.encoders.weights import WeightsIdentity, read_state_dict


def build_trunk(encoder: str, identity: WeightsIdentity) -> nn.Module:
    """Build a CNN up to its grid, in eval mode, float32, on the CPU.

    Raises:
        WeightsError: the weights do not match the encoder.
    """
    spec = CNNS[encoder]
    model = models.get_model(encoder, weights=None, **spec.arguments)
    trunk = nn.Sequential(OrderedDict((name, getattr(model, name)) for name in spec.layers))
    if identity.file is None:
        _initialize(trunk, int(identity.name.partition(":")[2]), spec)
    else:
        _load(trunk, encoder, identity)
        if is_keras_file(identity.file):
            return exclude_padding(trunk.eval())
    return trunk.eval()


def _load(trunk: nn.Sequential, encoder: str, identity: WeightsIdentity) -> None:
    """Load the weights of the layers up to the grid."""
    assert identity.file is not None
    mismatch = f"{identity.file}: not weights of {encoder}"
    file = identity.file
    state = read_keras_weights(file, encoder) if is_keras_file(file) else read_state_dict(file)
    layers = CNNS[encoder].layers
    try:
        missing, unexpected = trunk.load_state_dict(
            {name: value for name, value in state.items() if name.partition(".")[0] in layers}, strict=False
        )
    except RuntimeError as error:
        raise WeightsError(
            f"{mismatch}: {str(error).splitlines()[1].strip()}", "check --encoder and --weights"
        ) from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        first = f"{missing[0]} is missing" if missing else f"unexpected key {unexpected[0]}"
        more = len(missing) + len(unexpected) - 1
        raise WeightsError(
            f"{mismatch}: {first}" + (f" (and {more} more)" if more else ""), "check --encoder and --weights"
        )


@torch.no_grad()
def _initialize(trunk: nn.Sequential, seed: int, spec: CnnSpec) -> None:
    """Initialize with random weights that preserve the layout of an image.

    Convolutions are Kaiming uniform (He et al. 2015, arXiv:1502.01852). BatchNorm statistics come from a fixed batch
    of rendered scenes, so that activations neither vanish nor explode. NumPy generates the numbers because its
    streams are identical on all platforms.
    """
    convolutions = [module for module in trunk.modules() if isinstance(module, nn.Conv2d)]
    for i, layer in enumerate(convolutions):
        bound = math.sqrt(6 / (layer.in_channels // layer.groups * math.prod(layer.kernel_size)))
        values = np.random.default_rng([seed, i]).uniform(-bound, bound, tuple(layer.weight.shape))
        layer.weight.copy_(torch.from_numpy(values.astype(np.float32)))
    for norm in trunk.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_parameters()
            norm.momentum = None  # cumulative average: the statistics of the one batch below
    trunk.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the rounding of sums depends on the number of threads, which differs between processes
    images = torch.from_numpy(calibration_batch(weights.CALIBRATION_IMAGES, spec.side))
    trunk(normalize(images, spec, torch.float32))
    torch.set_num_threads(threads)


def normalize(images: Tensor, spec: CnnSpec | EncoderSpec, dtype: torch.dtype) -> Tensor:
    """Normalize images as the encoder was trained.

    Args:
        images: uint8 (B, height, width, 3), RGB.
        spec: mean and standard deviation.
        dtype: dtype of the result.

    Returns:
        (B, 3, height, width) in channels_last memory format.
    """
    if dtype == torch.bfloat16 and {*spec.mean, *spec.std} == {0.5}:
        # Only the quotient is inexact in bfloat16 here, so the result equals the rounded float32 result.
        return images.to(dtype).sub_(255 / 2).div_(255 / 2).permute(0, 3, 1, 2)
    mean = torch.tensor(spec.mean, device=images.device) * 255
    scale = 1 / (torch.tensor(spec.std, device=images.device) * 255)
    return ((images.float() - mean) * scale).to(dtype).permute(0, 3, 1, 2)
