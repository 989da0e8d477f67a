"""Vocabulary: captions <-> token ids. Counted over the training split only."""

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

# Letters and digits with the marks that belong to them (Python's \w leaves combining marks out).
MARKS = re.escape("".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c))[0] == "M"))
_PART = rf"[^\W_](?:[^\W_]|[{MARKS}])*"
_WORD = re.compile(rf"{_PART}(?:'{_PART})*")


def tokenize(caption: str) -> list[str]:
    """Lower-case words without punctuation; "dog's" and "t-shirt" give "dog's", "t", "shirt"."""
    return _WORD.findall(unicodedata.normalize("NFC", caption.lower().replace("’", "'")))


class Vocabulary:
    """Words and their ids; PAD 0, BOS 1, EOS 2, UNK 3, then words from the commonest to the rarest.

    Args:
        words: all entries, the four specials first.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if tuple(words[: len(SPECIALS)]) != SPECIALS or len(set(words)) != len(words):
            raise ValueError(f"a vocabulary starts with {SPECIALS} and holds every word once")
        self.words = list(words)
        self._ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def build(cls, captions: Iterable[str], max_size: int | None = 5000, min_count: int = 1) -> Vocabulary:
        """Count words and keep the commonest; ties in alphabetical order, so the result is one and the same.

        Args:
            captions: of the training split.
            max_size: largest size, specials included; None for no bound.
            min_count: leave out words seen fewer times.
        """
        counts = Counter(word for caption in captions for word in tokenize(caption))
        if max_size is not None and max_size <= len(SPECIALS):
            raise ValueError(f"a vocabulary of {max_size} has no room for words beside the {len(SPECIALS)} specials")
        ranked = sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))
        return cls([*SPECIALS, *ranked[: None if max_size is None else max_size - len(SPECIALS)]])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str, max_length: int) -> list[int]:
        """Token ids: BOS, at most `max_length` words (UNK for unknown ones), EOS."""
        return [BOS, *(self._ids.get(word, UNK) for word in tokenize(caption)[:max_length]), EOS]

    def decode(self, tokens: Iterable[int]) -> str:
        """The words up to the first EOS, joined by blanks; BOS and PAD are left out."""
        words = []
        for token in tokens:
            if token == EOS:
                break
            if token not in (PAD, BOS):
                words.append(self.words[token])
        return " ".join(words)

    def save(self, path: Path) -> None:
        """Write the words as JSON."""
        write_json(path, {"format": "gridcap-vocabulary", "version": 1, "words": self.words})

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing or damaged.
        """
        try:
            return cls([str(word) for word in json.loads(path.read_text(encoding="utf-8"))["words"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a vocabulary: {error}", "choose another checkpoint") from error
