"""Random resized crops."""

from __future__ import annotations

import math
import random

from PIL import Image

from gridcap.common.image.views.registry import register_view

MIN_AREA = 0.5  # captions describe the whole image, so the crops are larger than in training for classification
MAX_RATIO = 4 / 3  # of the crop's aspect ratio to that of the image, or the inverse
MIN_SHARE = math.sqrt(MIN_AREA / MAX_RATIO)


@register_view("random-crop", count=None, min_share=MIN_SHARE)
def random_crop(image: Image.Image, number: int, rng: random.Random) -> Image.Image:
    """Return a random part of the image (Szegedy et al. 2015, "Going deeper with convolutions", section 6).

    The number is the seed: random-crop-1 and random-crop-2 are different crops of each image.
    """
    area = MIN_AREA + (1 - MIN_AREA) * rng.random()
    ratio = MAX_RATIO ** (2 * rng.random() - 1)
    width = max(1, round(image.width * min(1.0, math.sqrt(area * ratio))))
    height = max(1, round(image.height * min(1.0, math.sqrt(area / ratio))))
    left, top = int(rng.random() * (image.width - width + 1)), int(rng.random() * (image.height - height + 1))
    return image.crop((left, top, left + width, top + height))
