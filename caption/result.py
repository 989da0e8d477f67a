"""The caption of one image, as returned by `Captioner`."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Caption:
    """A generated caption. Captions are compared by text, tokens, and log-probability.

    Attributes:
        text: the caption as a string.
        tokens: its T tokens as strings, without BOS and EOS.
        log_prob: log-probability (natural logarithm) of the caption, EOS included.
        attention: float32 (T, rows, columns), the attention weights over the grid at each time step; every map sums
            to 1. None for a decoder without attention.
        image: uint8 (H, W, 3), the part of the photo that the grid covers, for display. None if it was not kept.
    """

    text: str
    tokens: list[str]
    log_prob: float
    attention: np.ndarray | None = field(repr=False, compare=False)
    image: np.ndarray | None = field(default=None, repr=False, compare=False)

    def _repr_html_(self) -> str:
        """Return an HTML figure for notebooks: the image, its attention maps, and the caption."""
        text = f"{html.escape(self.text)} <small>(log-probability {self.log_prob:.2f})</small>"
        if self.image is None:
            return f"<p>{text}</p>"
        # matplotlib is slow to import and only needed here.
        from gridcap.caption.attention_maps import AttentionPanels, encode_png, render_attention

        if self.attention is None:
            picture = encode_png(self.image)
        else:
            picture = render_attention(AttentionPanels(self.image, self.tokens, self.attention))
        data = base64.b64encode(picture).decode()
        alt = html.escape(self.text, quote=True)
        return (
            f'<figure><img alt="{alt}" src="data:image/png;base64,{data}" style="max-width: 100%">'
            f"<figcaption>{text}</figcaption></figure>"
        )
