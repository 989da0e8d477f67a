"""Captions weighted by how far the other captions of their image agree with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from train.ciderd import ORDERS, CiderD
from train.stream import CaptionedImages
from train.vocabulary import tokenize


class Consensus:
    """Weights for cross-entropy (Phan et al. 2017, "Consensus-based Sequence Training for Video Captioning",
    arXiv:1712.09532, section 3.2): a caption that says what others say of the same image counts for more than one
    that nobody else would have written.

    The agreement of a caption is its CIDEr-D against the others of its image. Unlike in the paper the weights of an
    image's captions have mean 1, so that all images count alike, and the learning rate means what it meant.

    Args:
        data: images with captions.
        share: of a weight that goes by agreement, 0 to 1; the rest is 1 for every caption.
    """

    def __init__(self, data: CaptionedImages, share: float) -> None:
        self._captions, self._share = data.captions, share
        self._ciderd = CiderD([[tokenize(caption) for caption in captions] for captions in data.captions])

    def __call__(self, images: Sequence[int] | np.ndarray, chosen: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The weights of some captions of some images.

        Args:
            images: positions in the data.
            chosen: of each image, which of its captions.

        Returns:
            Of each image (k,) float32, k captions being chosen: at least 0, mean 1; all 1 where no caption agrees
            with another.
        """
        if not len(images):
            return []
        owners = [image for image, some in zip(images, chosen, strict=True) for _ in some]
        words = [tokenize(self._captions[i][k]) for i, some in zip(images, chosen, strict=True) for k in some]
        total = np.array([len(self._captions[image]) for image in owners])
        # A caption agrees with itself wholly, for every n that it has n-grams of: that is taken away again.
        itself = 10 * np.minimum(ORDERS, [len(caption) for caption in words]) / ORDERS
        agreement = (self._ciderd.scores(owners, words) * total - itself).clip(min=0) / np.maximum(total - 1, 1)
        ends = np.cumsum([len(some) for some in chosen])[:-1]
        return [self._weights(part) for part in np.split(agreement, ends)]

    def _weights(self, agreement: np.ndarray) -> np.ndarray:
        mean = agreement.mean() if len(agreement) else 0.0
        relative = agreement / mean if mean > 1e-6 else np.ones_like(agreement)
        return (1 - self._share + self._share * relative).astype(np.float32)
