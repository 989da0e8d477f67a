"""Words of languages without spaces, found by a segmenter: jieba (Chinese), fugashi (Japanese), pythainlp (Thai)."""

from __future__ import annotations

import re
import threading
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from gridcap.common.errors import UserError
from gridcap.train.data.tokenizers.base import Tokenizer
from gridcap.train.data.tokenizers.scripts import UNSPACED

SEGMENTERS = {"zh": "jieba", "ja": "fugashi", "th": "pythainlp"}  # language -> segmenter, also the tokenizer's kind
_LANGUAGES = {"jieba": "Chinese", "fugashi": "Japanese", "pythainlp": "Thai"}
_WORD = re.compile(r"[^\W_]")


def is_installed(segmenter: str) -> bool:
    """Return whether a segmenter can be used."""
    needed = ("fugashi", "unidic_lite") if segmenter == "fugashi" else (segmenter,)
    return all(find_spec(module) is not None for module in needed)


class Segmented:
    """Lowercase words, without punctuation, as a segmenter finds them.

    Args:
        segmenter: "jieba", "fugashi", or "pythainlp".

    Raises:
        UserError: the segmenter is not installed.
    """

    unit = "word"
    reversible = False  # a segmenter may find other words in the text

    def __init__(self, segmenter: str) -> None:
        if not is_installed(segmenter):
            raise UserError(
                f"the tokenizer of {_LANGUAGES[segmenter]} captions requires {segmenter}, which is not installed",
                "pip install 'gridcap[languages]'",
            )
        self.segmenter = segmenter
        self.name = f"words segmented by {segmenter}"
        self._segment = _load(segmenter)
        self._lock = threading.Lock()  # batches are encoded in a thread, and MeCab is not thread-safe

    @property
    def scoring(self) -> Tokenizer:
        """This tokenizer."""
        return self

    def split(self, caption: str) -> list[str]:
        """Return the words of a caption."""
        text = " ".join(unicodedata.normalize("NFC", caption.lower()).split())
        with self._lock:
            words = self._segment(text)
        return [word.strip() for word in words if _WORD.search(word)]

    def join(self, units: Sequence[str]) -> str:
        """Return the text of words: spaces only between words of scripts that have them."""
        text = ""
        for unit in units:
            spaced = text and unit and not (UNSPACED.match(text[-1]) or UNSPACED.match(unit))
            text += f" {unit}" if spaced else unit
        return text

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as plain values."""
        return {"kind": self.segmenter}


def from_json(saved: dict[str, Any]) -> Segmented:
    """Return the tokenizer of `Segmented.to_json`."""
    return Segmented(str(saved["kind"]))


def _load(segmenter: str) -> Callable[[str], list[str]]:
    if segmenter == "jieba":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports the deprecated pkg_resources
            import jieba
        jieba.setLogLevel("WARNING")
        return jieba.lcut  # type: ignore[no-any-return]
    if segmenter == "fugashi":
        import fugashi

        tagger = fugashi.Tagger()
        return lambda text: [word.surface for word in tagger(text)]
    from pythainlp.tokenize import word_tokenize

    return lambda text: word_tokenize(text, keep_whitespace=False)
