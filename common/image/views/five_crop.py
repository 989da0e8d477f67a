"""Five crops: the four corners and the center."""

from __future__ import annotations

import random

from PIL import Image

from gridcap.common.image.views.registry import register_view

SHARE = 0.875  # of width and height, as in ImageNet evaluation: 224 of 256 pixels
CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5))  # positions of the free space left and above


@register_view("five-crop", count=5, min_share=SHARE)
def five_crop(image: Image.Image, number: int, rng: random.Random) -> Image.Image:
    """Return a crop: 1 top left, 2 top right, 3 bottom left, 4 bottom right, 5 center."""
    width, height = max(1, round(SHARE * image.width)), max(1, round(SHARE * image.height))
    x, y = CORNERS[number - 1]
    left, top = round(x * (image.width - width)), round(y * (image.height - height))
    return image.crop((left, top, left + width, top + height))
