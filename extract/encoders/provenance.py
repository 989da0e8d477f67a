"""The provenance of feature grids: everything that determines their values."""

from __future__ import annotations

from typing import Any

from gridcap.common.device import choose_device, choose_precision
from gridcap.extract.encoders.grid_encoder import EncoderOptions
from gridcap.extract.encoders.registry import Encoder
from gridcap.extract.encoders.weights import WeightsIdentity

# Increment for every change to the last bits of a grid: how images are resized, how convolutions are computed.
# A store is never completed with a different version.
ARITHMETIC = "arithmetic 2"


def describe_features(
    encoder: Encoder, identity: WeightsIdentity, options: EncoderOptions, resize_mode: str, decoder: str
) -> dict[str, Any]:
    """Return the provenance of grids.

    Args:
        encoder: the encoder, from `find_encoder`.
        identity: the weights, from `identify_weights`.
        options: as for `GridEncoder`.
        resize_mode: how images are made square: from `EncoderSpec.resolve_resize_mode`.
        decoder: image decoding library and its version, such as "pillow 11.0.0".

    Raises:
        UserError: the device does not exist, or it does not support the precision.
    """
    spec = encoder.spec
    library, _, version = decoder.partition(" ")
    precision = choose_precision(options.precision, choose_device(options.device))
    return {
        "encoder": spec.name,
        "layer": spec.layer,
        "weights": identity.as_dict(),
        "preprocessing": {
            "decoder": library,
            "resize_mode": resize_mode,
            "side": spec.side,
            "resize": "bilinear, antialiased",
            "mean": list(spec.mean),
            "std": list(spec.std),
        },
        "grid_shape": list(spec.grid_shape),
        "dtype": options.dtype,
        "precision": str(precision).removeprefix("torch."),
        "compile": options.compiled,
        "versions": {
            library: version,
            **encoder.versions,
            "gridcap": ARITHMETIC,
        },
    }
