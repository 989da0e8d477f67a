"""The two stages joined: a photo in, a sentence out.

from caption import Captioner

Captioner.load("runs/x")("photo.jpg")  # Caption(text, tokens, log_prob, attention)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caption.captioner import Caption as Caption
    from caption.captioner import Captioner as Captioner

__all__ = ["Caption", "Captioner"]


def __getattr__(name: str) -> Any:
    """Load the captioner, and torch with it, only when it is asked for: the commands' help needs neither."""
    if name not in __all__:
        raise AttributeError(f"module 'caption' has no attribute {name!r}")
    from caption import captioner

    return getattr(captioner, name)
