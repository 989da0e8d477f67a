"""Words as Stanford's PTB tokenizer finds them, which the COCO evaluation server uses; in Python, without Java."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

from gridcap.train.data.tokenizers.base import Tokenizer
from gridcap.train.data.tokenizers.scripts import MARKS

# Punctuation that pycocoevalcap removes after tokenization, and brackets, which it keeps.
_DROPPED = frozenset(PUNCTUATIONS) | {'"', "–", "—"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SYMBOLS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "£": "#", "€": "$", "¢": "cents"}
_QUOTES = str.maketrans("’‘‛“”«»", '\'\'\'""""')
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")  # emoji, which the Java program drops

_SPLIT = {  # contractions that become two tokens
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
    "'tis": "'t is",
    "'twas": "'t was",
}
_ABBREVIATIONS = (
    "mr|mrs|ms|messrs|dr|drs|prof|gen|col|capt|lt|sgt|rev|hon|gov|sen|rep|st|ave|blvd|rd|jr|sr|co|corp|inc|ltd|bros|"
    "vs|etc|ft|mt|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|ph[.]d"
)
# A single letter with a period is an initial, unless one of these words starts a sentence after it.
_STARTS = (
    "A|About|After|An|And|As|At|But|He|Her|Here|However|If|In|It|Its|Many|Now|One|Other|Our|She|Since|So|Some|Such|"
    "That|The|Their|Then|There|These|They|This|We|What|When|While|You"
)
_LETTERS = r"[^\W\d_]"
_INNER = rf"[^\W_](?:[^\W_]|[{MARKS}])*"
_TOKEN = re.compile(
    rf"""
      (?:https?://|www\.)\S+[^\s.,;:!?'")]              # URLs and e-mail addresses
    | [\w.+-]+@\w[\w-]*(?:\.\w+)+
    | </?[a-z]\w*>                                      # tags
    | (?:{_LETTERS}\.){{2,}}(?!\w)                      # p.m., u.s.
    | (?:{_ABBREVIATIONS})\.(?!\w) | no\.(?=\s*\d)
    | [a-z]\.(?!\w|\s+(?-i:{_STARTS})(?!\w))            # J. Smith
    | '(?:tis|twas|em|n)(?!\w|') | 'n' | '\d\ds?(?!\w)
    | (?:cannot|gonna|gotta|wanna|gimme|lemme)(?!\w)
    | {_LETTERS}+(?=n't(?!\w)) | n't(?!\w)              # does n't
    | '(?:s|m|d|re|ve|ll)(?!\w)                         # man 's
    | [-+]?\d+(?:[.,:]\d+)+ | [-+]\d+(?![\w-])          # 1,000 10:30 -5
    | (?:qu|[odl])'(?!s(?!\w)){_INNER} | ma'am(?!\w) | y'(?=all) | ol'   # o'clock
    | (?-i:[A-Z]+&[A-Z]+) | \#{_LETTERS}\w*
    | {_INNER}(?:[-/._]{_INNER})*                       # t-shirt, half/whole, hello.world
    | \.{{2,}} | [?!]{{2,}} | -{{2,}}
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Captions of this form are split at spaces, which is much faster, unless the last word is an abbreviation.
_PLAIN = re.compile(r"[A-Za-z]+(?: +[A-Za-z]+)*(?: *\.)? *", re.ASCII)
_LAST_WORDS = frozenset(_ABBREVIATIONS.split("|"))

# For `Words.join`: units that follow the previous one, or precede the next one, without a space.
_CLITICS = frozenset(["'s", "'m", "'d", "'re", "'ve", "'ll", "n't"])
_CLOSING = frozenset(["-rrb-", "-rsb-", "-rcb-", "。", "，", "、", "？", "！", "،", "؟", "؛"])
_OPENING = frozenset(["-lrb-", "-lsb-", "-lcb-", "¿", "¡", "„", "y'"])
_PAIRS = frozenset(tuple(pair.split()) for pair in _SPLIT.values()) - {("can", "not")}
_TEXT = {token: bracket for bracket, token in _BRACKETS.items()}


class Words:
    """Lowercase words as Stanford's PTB tokenizer finds them, without the punctuation that the COCO metrics remove."""

    unit, name = "word", "PTB, in Python"
    reversible = True

    @property
    def scoring(self) -> Tokenizer:
        """This tokenizer."""
        return self

    def split(self, caption: str) -> list[str]:
        """Return the words of a caption."""
        return ptb_tokenize(caption)

    def join(self, units: Sequence[str]) -> str:
        """Return the text of words: "the man 's -lrb- red -rrb- hat" becomes "the man's (red) hat"."""
        text, last = "", ""
        for unit in units:
            attached = not text or last in _OPENING or _follows(last, unit)
            text += _TEXT.get(unit, unit) if attached else f" {_TEXT.get(unit, unit)}"
            last = unit
        return text

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as plain values."""
        return {"kind": "words"}


WORDS = Words()  # the default; it has no state


def from_json(saved: dict[str, Any]) -> Words:
    """Return the tokenizer of `Words.to_json`."""
    return WORDS


def ptb_tokenize(caption: str) -> list[str]:
    """Return the lowercase tokens of a caption as the COCO evaluation server tokenizes it.

    "A man's T-shirt, isn't it?" becomes a, man, 's, t-shirt, is, n't, it. The punctuation that pycocoevalcap lists is
    removed; other symbols are tokens. Known differences (see tests/train/metrics/test_coco.py): the Java tokenizer
    recognizes emoticons and rare abbreviations, keeps "ok?yes" whole, and splits "1½".
    """
    if _PLAIN.fullmatch(caption):
        words = caption.lower().replace(".", " ").split()
        if "." not in caption or (len(words[-1]) > 1 and words[-1] not in _LAST_WORDS):
            return words if _SPLIT.keys().isdisjoint(words) else " ".join(_SPLIT.get(w, w) for w in words).split()
    text = unicodedata.normalize("NFC", caption).translate(_QUOTES).replace("…", "...")
    tokens: list[str] = []
    for token in _TOKEN.findall(_ASTRAL.sub(" ", text)):
        token = token.lower()
        token = _BRACKETS.get(token, _SYMBOLS.get(token, token))
        if token not in _DROPPED and not set(token) <= {"."}:
            tokens += _SPLIT.get(token, token).split()
    return tokens


def _follows(last: str, unit: str) -> bool:
    """Return whether a unit follows the previous one without a space."""
    if unit in _CLITICS or unit in _CLOSING or set(unit) <= {"?", "!"} or (last, unit) in _PAIRS:
        return True
    if last in ("$", "#"):
        return unit[0].isdigit()
    return unit in ("%", "°") and last[-1:].isdigit()
