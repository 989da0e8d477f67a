"""Characters, for languages without spaces between words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from gridcap.train.data.tokenizers.base import Tokenizer, tokenizer_from_json
from gridcap.train.data.tokenizers.scripts import MARKS, UNSPACED

SPACE = "▁"
# A letter or digit with its combining marks, or a hyphen or an apostrophe inside a word.
_UNIT = re.compile(rf"[^\W_][{MARKS}]*|(?<=[^\W_])[-'](?=[^\W_])")


class Characters:
    """Lowercase characters without punctuation; combining marks belong to their letter.

    Spaces are units where a script needs them: "一个 iPhone 5" becomes 一 个 i p h o n e ▁ 5.

    Args:
        scoring: tokenizer of metrics; None compares characters.
    """

    unit, name = "character", "characters"
    reversible = True

    def __init__(self, scoring: Tokenizer | None = None) -> None:
        self.scoring: Tokenizer = self if scoring is None else scoring

    def split(self, caption: str) -> list[str]:
        """Return the characters of a caption."""
        text = unicodedata.normalize("NFC", caption.lower().replace("’", "'"))
        units: list[str] = []
        end = 0
        for match in _UNIT.finditer(text):
            if units and match.start() > end and not (UNSPACED.match(units[-1]) or UNSPACED.match(match[0])):
                units.append(SPACE)
            units.append(match[0])
            end = match.end()
        return units

    def join(self, units: Sequence[str]) -> str:
        """Return the text of characters."""
        return "".join(units).replace(SPACE, " ").strip()

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as plain values."""
        return {"kind": "characters", "scoring": None if self.scoring is self else self.scoring.to_json()}


def from_json(saved: dict[str, Any]) -> Characters:
    """Return the tokenizer of `Characters.to_json`."""
    return Characters(None if saved["scoring"] is None else tokenizer_from_json(saved["scoring"]))
