"""Attention pictures: where the decoder looked as it wrote each word."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from gridcap.caption.captioner import Caption
from gridcap.common.files import replacing

_COLUMNS = 8
_PANEL = 1.7  # inches


def plot_attention(
    images: Sequence[np.ndarray], captions: Sequence[Caption], titles: Sequence[str], path: Path
) -> None:
    """Draw a block of panels for each image: the image, then one panel a word with the attention over it.

    Brightness is the attention's share relative to the word's strongest cell, smoothly enlarged from the grid.

    Args:
        images: uint8 (H, W, 3), showing just what the grid covers.
        captions: of these images, with attention.
        titles: a line above each block.
        path: of the picture, .png, .pdf or .svg.

    Raises:
        ValueError: a caption has no attention.
    """
    figure = _figure(images, captions, titles)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".").lower() or "png", facecolor="white")


def attention_png(image: np.ndarray, caption: Caption) -> bytes:
    """The block of one image, without a title, as a PNG file's bytes."""
    buffer = io.BytesIO()
    _figure([image], [caption], [""]).savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def png(image: np.ndarray) -> bytes:
    """An image (H, W, 3) uint8 as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def _figure(images: Sequence[np.ndarray], captions: Sequence[Caption], titles: Sequence[str]) -> Figure:
    blocks = [math.ceil((1 + len(c.tokens)) / _COLUMNS) for c in captions]
    width = min(_COLUMNS, 1 + max(len(c.tokens) for c in captions))
    heights = [n * (_PANEL + 0.28) + 0.42 for n in blocks]
    figure = Figure(figsize=(max(6.0, width * _PANEL), sum(heights)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    parts = np.atleast_1d(np.array(figure.subfigures(len(images), 1, height_ratios=heights), dtype=object))
    for part, image, caption, title, rows in zip(parts, images, captions, titles, blocks, strict=True):
        if caption.attention is None:
            raise ValueError("a caption without attention cannot be drawn")
        part.suptitle(title, fontsize=10, x=0.01, ha="left", weight="bold", parse_math=False)
        axes = part.subplots(rows, width, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        axes[0].imshow(image)
        gray = np.asarray(Image.fromarray(image).convert("L"))
        for axis, word, weights in zip(axes[1:], caption.tokens, caption.attention, strict=False):
            axis.imshow(gray, cmap="gray", vmin=0, vmax=255)
            axis.imshow(enlarge(weights, *image.shape[:2]), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
            axis.set_title(word, fontsize=10, pad=2, parse_math=False)
    return figure


def enlarge(weights: np.ndarray, height: int, width: int) -> np.ndarray:
    """Attention (rows, columns) -> (height, width), smooth, scaled so that the strongest cell is about 1."""
    scaled = Image.fromarray((weights / max(float(weights.max()), 1e-12)).astype(np.float32))
    return np.asarray(scaled.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
