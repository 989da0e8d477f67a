"""Choice of the JPEG decoder of a store, and how the provenance records it.

| decoder  | library                     | recorded as                                    |
|----------|-----------------------------|------------------------------------------------|
| `pillow` | Pillow                      | decoder pillow                                 |
| `turbo`  | libjpeg-turbo by simplejpeg | decoder pillow (equal pixels), and the version |
| `nvjpeg` | nvJPEG by torchvision       | decoder nvjpeg                                 |
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gridcap.common.config import ExtractConfig
from gridcap.common.errors import UserError
from gridcap.common.image import decoder_name
from gridcap.common.image.views import select_view
from gridcap.common.store.shard_format import ORIGINAL
from gridcap.extract.images.nvjpeg import nvjpeg_name
from gridcap.extract.images.turbo import has_turbo, turbo_version

TURBO_LIBRARY = "simplejpeg"


@dataclass(frozen=True)
class JpegDecoder:
    """A JPEG decoder.

    Attributes:
        name: "pillow", "turbo", or "nvjpeg".
        library: name and version of the library that the provenance names as the decoder.
        versions: further libraries.
    """

    name: str
    library: str
    versions: dict[str, str] = field(default_factory=dict)


def choose_decoder(extract: ExtractConfig, images: Path, device: torch.device, stored: str | None) -> JpegDecoder:
    """Return the JPEG decoder that an extraction requests.

    "auto" is the decoder of a store that has been started; else nvJPEG for a folder of images next to a GPU, if it
    supports the views and the resize mode; else libjpeg-turbo if it is installed; else Pillow.

    Args:
        extract: settings.
        images: folder, list, or archive of the images.
        device: device of the encoder.
        stored: name of the decoder of the plan on disk, if there is one.

    Raises:
        UserError: the decoder is not available. A complete store does not need its decoder, so for "auto" it is only
            described as not installed.
    """
    if extract.jpeg_decoder != "auto":
        return load_decoder(extract.jpeg_decoder, device)
    if stored is not None:
        try:
            return load_decoder(stored, device)
        except UserError:
            return JpegDecoder(stored, "nvjpeg none" if stored == "nvjpeg" else decoder_name())
    if device.type == "cuda" and images.is_dir() and _nvjpeg_supports(extract):
        with contextlib.suppress(UserError):  # torchvision was built without it
            return load_decoder("nvjpeg", device)
    return load_decoder("turbo" if has_turbo() else "pillow", device)


def _nvjpeg_supports(extract: ExtractConfig) -> bool:
    views = [view for view in extract.views if view != ORIGINAL and select_view(view).of_square is None]
    return extract.resize_mode != "timm" and not views


def load_decoder(name: str, device: torch.device) -> JpegDecoder:
    """Return a decoder by name.

    Raises:
        UserError: it is not available.
    """
    if name == "nvjpeg":
        return JpegDecoder(name, nvjpeg_name(device))
    return JpegDecoder(name, decoder_name(), {TURBO_LIBRARY: turbo_version()} if name == "turbo" else {})


def decoder_of(provenance: Mapping[str, Any]) -> str:
    """Return the JPEG decoder of a store."""
    if provenance["preprocessing"].get("decoder") == "nvjpeg":
        return "nvjpeg"
    return "turbo" if TURBO_LIBRARY in provenance["versions"] else "pillow"
