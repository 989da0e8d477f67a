"""Word-level vocabulary: captions <-> token ids."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from gridcap.common.errors import CheckpointError
from gridcap.common.files import write_json

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")

_FORMAT, _VERSION = "gridcap-vocabulary", 2  # version 1 called the tokens "words"

# Python's \w does not include combining marks; a letter or digit keeps the marks that follow it.
MARKS = re.escape("".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c))[0] == "M"))
_PART = rf"[^\W_](?:[^\W_]|[{MARKS}])*"
_WORD = re.compile(rf"{_PART}(?:'{_PART})*")


def tokenize(caption: str) -> list[str]:
    """Return the lowercase words of a caption, without punctuation.

    "dog's" is one word, "t-shirt" is two ("t", "shirt").
    """
    return _WORD.findall(unicodedata.normalize("NFC", caption.lower().replace("’", "'")))


def count_words(captions: Iterable[str]) -> Counter[str]:
    """Count the words of captions."""
    return Counter(word for caption in captions for word in tokenize(caption))


class Vocabulary:
    """Mapping between words and token ids: PAD 0, BOS 1, EOS 2, UNK 3, then words by decreasing frequency.

    Args:
        tokens: all V entries; the first four are `SPECIALS`.

    Raises:
        ValueError: the special tokens are missing, or an entry is repeated.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        if tuple(tokens[: len(SPECIALS)]) != SPECIALS or len(set(tokens)) != len(tokens):
            raise ValueError(f"a vocabulary starts with {SPECIALS} and has no repeated entries")
        self.tokens = list(tokens)
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    @classmethod
    def build(cls, captions: Iterable[str], max_size: int | None = 5000, min_count: int = 1) -> Vocabulary:
        """Build a vocabulary from the most frequent words; ties are broken alphabetically.

        Args:
            captions: captions of the training split.
            max_size: maximum size, including the special tokens; None for no limit.
            min_count: minimum number of occurrences of a word.

        Raises:
            ValueError: `max_size` leaves no room for words.
        """
        return cls.from_counts(count_words(captions), max_size, min_count)

    @classmethod
    def from_counts(cls, counts: Counter[str], max_size: int | None, min_count: int) -> Vocabulary:
        """Build a vocabulary from word counts, as `build` does."""
        if max_size is not None and max_size <= len(SPECIALS):
            raise ValueError(f"max_size {max_size} leaves no room for words besides the {len(SPECIALS)} special tokens")
        ranked = sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))
        return cls([*SPECIALS, *ranked[: None if max_size is None else max_size - len(SPECIALS)]])

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self._ids

    def encode(self, caption: str, max_length: int) -> list[int]:
        """Return the token ids of a caption: BOS, at most `max_length` words (UNK for unknown ones), EOS.

        A longer caption is cut and gets no EOS; otherwise, the decoder would learn to stop in the middle of a sentence.
        """
        words = tokenize(caption)
        ids = [BOS, *(self._ids.get(word, UNK) for word in words[:max_length])]
        return ids if len(words) > max_length else [*ids, EOS]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids: the entries before the first EOS, without BOS and PAD, joined by spaces."""
        words = []
        for token in tokens:
            if token == EOS:
                break
            if token not in (PAD, BOS):
                words.append(self.tokens[token])
        return " ".join(words)

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        write_json(path, {"format": _FORMAT, "version": _VERSION, "tokens": self.tokens})

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a vocabulary written by `save`.

        Raises:
            CheckpointError: the file is corrupted, or of another version.
            OSError: the file cannot be read.
        """
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["version"] != _VERSION:
                raise ValueError(f"version {saved['version']}; this version of gridcap reads version {_VERSION}")
            return cls([str(token) for token in saved["tokens"]])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a valid vocabulary file: {error}", "use another checkpoint") from error
