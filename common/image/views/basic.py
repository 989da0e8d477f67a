"""The image itself, and its mirror image."""

from __future__ import annotations

from typing import Any

import numpy as np

from gridcap.common.image.views.registry import register_square_view


@register_square_view("original")
def original(images: Any) -> Any:
    """Return the images unchanged."""
    return images


@register_square_view("hflip")
def hflip(images: Any) -> Any:
    """Flip images (B, H, W, 3) horizontally."""
    return np.ascontiguousarray(images[:, :, ::-1]) if isinstance(images, np.ndarray) else images.flip(2)
