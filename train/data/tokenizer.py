"""Approximation of Stanford's PTB tokenizer, which the COCO evaluation server uses, without Java."""

from __future__ import annotations

import re

from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

from gridcap.train.data.vocabulary import MARKS

# Punctuation that pycocoevalcap removes after tokenization, and brackets, which it keeps.
_DROPPED = frozenset(PUNCTUATIONS)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SYMBOLS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "£": "#", "€": "$", "¢": "cents"}
_QUOTES = str.maketrans("’‘‛“”„«»", "''''\"\"\"\"")

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
    "vs|etc|ft|mt|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
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
    | '(?:tis|twas|em|n)(?!\w|') | 'n' | '\d\ds?(?!\w)
    | (?:cannot|gonna|gotta|wanna|gimme|lemme)(?!\w)
    | {_LETTERS}+(?=n't(?!\w)) | n't(?!\w)              # does n't
    | '(?:s|m|d|re|ve|ll)(?!\w)                         # man 's
    | [-+]?\d+(?:[.,:]\d+)+ | [-+]\d+(?![\w-])          # 1,000 10:30 -5
    | [odl]'(?!s(?!\w)){_INNER} | ma'am(?!\w) | y'(?=all) | ol'   # o'clock
    | (?-i:[A-Z]+&[A-Z]+) | \#{_LETTERS}\w*
    | {_INNER}(?:[-/._]{_INNER})*                       # t-shirt, half/whole, hello.world
    | \.{{2,}} | [?!]{{2,}} | -{{2,}}
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def ptb_tokenize(caption: str) -> list[str]:
    """Return the lowercase tokens of a caption, nearly as the COCO evaluation server tokenizes it.

    "A man's T-shirt, isn't it?" becomes a, man, 's, t-shirt, is, n't, it. The punctuation that pycocoevalcap lists is
    removed; other symbols are tokens. Known differences (see tests/train/metrics/test_coco.py): the Java tokenizer
    recognizes emoticons and rare abbreviations, keeps "ok?yes" whole, splits "1½", and drops emoji.
    """
    tokens: list[str] = []
    for token in _TOKEN.findall(caption.translate(_QUOTES).replace("…", "...")):
        token = token.lower()
        token = _BRACKETS.get(token, _SYMBOLS.get(token, token))
        if token not in _DROPPED and token != '"' and token not in "–—" and not set(token) <= {"."}:
            tokens += _SPLIT.get(token, token).split()
    return tokens
