"""One image of the HTML report: its caption, scores, thumbnail, and attention maps."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_SIDE = 320  # longer side of a thumbnail, in pixels
JPEG_QUALITY = 70


@dataclass(frozen=True)
class ReportImage:
    """An image of the report.

    Attributes:
        name: file name.
        picture: uint8 (H, W, 3), RGB, covering exactly the feature grid; or the reason why it is missing.
        caption: generated caption (the hypothesis).
        tokens: T tokens of the caption.
        attention: float (T, rows, columns), each map summing to 1; None for a decoder without attention.
        references: reference captions.
        scores: metric -> score of this caption; the report displays and sorts by the first one.
    """

    name: str
    picture: np.ndarray | str
    caption: str
    tokens: Sequence[str]
    attention: np.ndarray | None = None
    references: Sequence[str] = ()
    scores: Mapping[str, float] | None = None


def to_json(image: ReportImage) -> str:
    """Return an image as one line of JSON for the script of the report.

    "<", ">", "&", and Unicode line separators are escaped, so no text can end the script element.
    """
    reason = image.picture if isinstance(image.picture, str) else ""
    entry = {
        "name": image.name,
        "caption": image.caption,
        "tokens": [*image.tokens],
        "references": [*image.references],
        "scores": {name: round(float(value), 4) for name, value in (image.scores or {}).items()},
        "size": [MAX_SIDE, MAX_SIDE] if isinstance(image.picture, str) else [*image.picture.shape[1::-1]],
        "missing": reason,
        "jpeg": "" if isinstance(image.picture, str) else _encode_jpeg(image.picture),
        **_encode_attention(image.attention),
    }
    text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _encode_jpeg(picture: np.ndarray) -> str:
    thumbnail = Image.fromarray(picture)
    thumbnail.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "jpeg", quality=JPEG_QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _encode_attention(attention: np.ndarray | None) -> dict[str, object]:
    """Quantize attention maps to 8 bits per cell, relative to the peak weight of each token."""
    if attention is None or not attention.size:
        return {"grid": None}
    peaks = attention.reshape(len(attention), -1).max(1)
    levels = (attention / np.maximum(peaks, 1e-12)[:, None, None] * 255).round().astype(np.uint8)
    return {
        "grid": [*attention.shape[1:]],
        "peaks": [round(float(value), 4) for value in peaks],
        "attention": base64.b64encode(levels.tobytes()).decode(),
    }
