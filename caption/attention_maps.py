"""Attention maps: figures that show the attention weights of each token over the image."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from gridcap.common.files import replacing

MAX_COLUMNS = 8  # panels per row, the image included
PANEL_INCHES = 1.7
TITLE_INCHES = 0.42
TITLE_LINE_INCHES = 0.17
TITLE_CHARACTER_INCHES = 0.1  # mean width of a character at 10 points, bold
TOKEN_INCHES = 0.28
DPI = 110
# Fonts for scripts that matplotlib's own font lacks, on Linux, Windows, and macOS; the installed ones are used.
FALLBACK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "Yu Gothic", "PingFang SC"),
    *("Hiragino Sans", "Noto Sans Thai", "Leelawadee UI", "Thonburi", "Noto Sans Devanagari", "Nirmala UI"),
    "Arial Unicode MS",
)
MAX_HEIGHT = 60_000  # pixels; matplotlib and JPEG allow less than 65,536


@dataclass(frozen=True)
class AttentionPanels:
    """One image with the attention maps of its caption.

    Attributes:
        image: uint8 (H, W, 3), the part of the photo that the grid covers.
        tokens: T tokens.
        attention: float32 (T, rows, columns), non-negative.
        title: text above the panels; long titles are wrapped.
    """

    image: np.ndarray
    tokens: Sequence[str]
    attention: np.ndarray
    title: str = ""


def plot_attention(items: Sequence[AttentionPanels], path: Path) -> None:
    """Write a figure with one block of panels per image: the image, then one panel per token.

    In each panel, brightness is the attention weight relative to the token's maximum, upsampled bicubically.

    Args:
        items: images with their attention maps, at least one.
        path: figure to write; its suffix selects the format (any that matplotlib supports).
    """
    figure = _figure(items)
    with replacing(path) as temporary, _one_warning_for_missing_glyphs():
        figure.savefig(temporary, format=path.suffix.removeprefix(".").lower(), facecolor="white")


def render_attention(item: AttentionPanels) -> bytes:
    """Return the panels of one image as a PNG file."""
    buffer = io.BytesIO()
    with _one_warning_for_missing_glyphs():
        _figure([item]).savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def encode_png(image: np.ndarray) -> bytes:
    """Return a uint8 (H, W, 3) image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def upsample(weights: np.ndarray, height: int, width: int) -> np.ndarray:
    """Upsample attention weights (rows, columns) to (height, width), scaled so that the maximum is about 1."""
    relative = Image.fromarray((weights / max(float(weights.max()), 1e-12)).astype(np.float32))
    return np.asarray(relative.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


@functools.cache
def _fonts() -> list[str]:
    """Return the fonts of captions, in order of preference."""
    return ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in font_manager.get_font_names())]


@contextlib.contextmanager
def _one_warning_for_missing_glyphs() -> Iterator[None]:
    """Replace matplotlib's warnings about each character without a glyph by one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    others = [warning for warning in caught if not re.search("missing from (current )?font", str(warning.message))]
    if len(others) < len(caught):
        warnings.warn(
            "no installed font has some of the characters of the captions: install one, such as Noto Sans CJK, or use "
            "the HTML report",
            stacklevel=4,
        )
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _figure(items: Sequence[AttentionPanels]) -> Figure:
    rows = [math.ceil((1 + len(item.tokens)) / MAX_COLUMNS) for item in items]
    columns = min(MAX_COLUMNS, 1 + max(len(item.tokens) for item in items))
    width = max(6.0, columns * PANEL_INCHES)  # room for the titles of short captions
    titles = [textwrap.fill(item.title, int(width / TITLE_CHARACTER_INCHES)) for item in items]
    heights = [
        count * (PANEL_INCHES + TOKEN_INCHES) + TITLE_INCHES + title.count("\n") * TITLE_LINE_INCHES
        for count, title in zip(rows, titles, strict=True)
    ]
    figure = Figure(figsize=(width, sum(heights)), dpi=min(DPI, MAX_HEIGHT / sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    blocks = np.atleast_1d(np.array(figure.subfigures(len(items), 1, height_ratios=heights), dtype=object))
    for block, item, title, count in zip(blocks, items, titles, rows, strict=True):
        # File names and captions may contain "$" and must not be parsed as formulas.
        block.suptitle(title, fontsize=10, x=0.01, ha="left", weight="bold", family=_fonts(), parse_math=False)
        _draw_panels(block.subplots(count, columns, squeeze=False).ravel(), item)
    return figure


def _draw_panels(axes: Any, item: AttentionPanels) -> None:
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(item.image)
    gray = np.asarray(Image.fromarray(item.image).convert("L"))
    height, width = gray.shape
    for axis, token, weights in zip(axes[1:], item.tokens, item.attention, strict=False):
        axis.imshow(gray, cmap="gray", vmin=0, vmax=255)
        axis.imshow(upsample(weights, height, width), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
        axis.set_title(token, fontsize=10, pad=2, family=_fonts(), parse_math=False)
