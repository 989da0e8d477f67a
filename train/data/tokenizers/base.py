"""The tokenizer protocol, and tokenizers saved as plain values."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

UNKNOWN = "<unk>"  # unit of text that a subword tokenizer cannot represent

# kind -> module with a function `from_json`; imported lazily, because some modules need optional libraries.
_MODULES = {
    "words": "words",
    "characters": "characters",
    "jieba": "segmented",
    "fugashi": "segmented",
    "pythainlp": "segmented",
    "subwords": "subwords",
}


class Tokenizer(Protocol):
    """Splits captions into units, the entries of the vocabulary, and joins units to text."""

    @property
    def unit(self) -> str:
        """Noun for one unit: "word", "character", or "subword"."""
        ...

    @property
    def name(self) -> str:
        """Description of the tokenizer for logs and results, such as "words segmented by jieba"."""
        ...

    @property
    def reversible(self) -> bool:
        """Whether `split(join(units))` returns the units of any caption that a decoder generates."""
        ...

    @property
    def scoring(self) -> Tokenizer:
        """The tokenizer whose units metrics and rewards compare; a tokenizer that others are scored by is its own."""
        ...

    def split(self, caption: str) -> list[str]:
        """Return the units of a caption."""
        ...

    def join(self, units: Sequence[str]) -> str:
        """Return the text of units, with spaces and punctuation in place."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as plain values, for `tokenizer_from_json`; the entry "kind" selects the class."""
        ...


def tokenizer_from_json(saved: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that `Tokenizer.to_json` described.

    Raises:
        ValueError: the description is invalid.
        UserError: the tokenizer needs a library that is not installed.
    """
    kind = saved["kind"]
    if kind not in _MODULES:
        raise ValueError(f"unknown tokenizer {kind!r}")
    module = importlib.import_module(f"gridcap.train.data.tokenizers.{_MODULES[kind]}")
    tokenizer: Tokenizer = module.from_json(saved)
    return tokenizer
