"""Vocabulary: captions <-> token ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from gridcap.common.errors import CheckpointError
from gridcap.common.files import write_json
from gridcap.train.data.tokenizers.base import UNKNOWN, Tokenizer, tokenizer_from_json
from gridcap.train.data.tokenizers.words import WORDS

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<bos>", "<eos>", UNKNOWN)

_FORMAT, _VERSION = "gridcap-vocabulary", 3  # version 2 had no tokenizer, and split words such as "t-shirt"


class Vocabulary:
    """Mapping between units of a tokenizer and token ids: PAD 0, BOS 1, EOS 2, UNK 3, then units by frequency.

    Args:
        tokens: all V entries; the first four are `SPECIALS`.
        tokenizer: tokenizer of the captions.

    Raises:
        ValueError: the special tokens are missing, or an entry is repeated.
    """

    def __init__(self, tokens: Sequence[str], tokenizer: Tokenizer = WORDS) -> None:
        if tuple(tokens[: len(SPECIALS)]) != SPECIALS or len(set(tokens)) != len(tokens):
            raise ValueError(f"a vocabulary starts with {SPECIALS} and has no repeated entries")
        self.tokens = list(tokens)
        self.tokenizer = tokenizer
        # Without the special tokens: a caption that contains "<eos>" does not end there.
        self._ids = {token: i for i, token in enumerate(self.tokens) if i >= len(SPECIALS)}

    @classmethod
    def build(
        cls,
        captions: Iterable[str],
        max_size: int | None = 5000,
        min_count: int = 1,
        tokenizer: Tokenizer = WORDS,
    ) -> Vocabulary:
        """Build a vocabulary from the most frequent units; ties are broken alphabetically.

        Args:
            captions: captions of the training split.
            max_size: maximum size, including the special tokens; None for no limit.
            min_count: minimum number of occurrences of a unit.
            tokenizer: tokenizer of the captions.

        Raises:
            ValueError: `max_size` leaves no room for units.
        """
        counts = Counter(unit for caption in captions for unit in tokenizer.split(caption))
        return cls.from_counts(counts, max_size, min_count, tokenizer)

    @classmethod
    def from_counts(
        cls, counts: Counter[str], max_size: int | None, min_count: int, tokenizer: Tokenizer = WORDS
    ) -> Vocabulary:
        """Build a vocabulary from counts of units, as `build` does."""
        if max_size is not None and max_size <= len(SPECIALS):
            raise ValueError(f"max_size {max_size} leaves no room for words besides the {len(SPECIALS)} special tokens")
        ranked = sorted(
            (unit for unit, n in counts.items() if n >= min_count and unit not in SPECIALS),
            key=lambda unit: (-counts[unit], unit),
        )
        return cls([*SPECIALS, *ranked[: None if max_size is None else max_size - len(SPECIALS)]], tokenizer)

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, unit: str) -> bool:
        return unit in self._ids

    def encode(self, caption: str, max_length: int) -> list[int]:
        """Return the token ids of a caption: BOS, at most `max_length` units (UNK for unknown ones), EOS.

        A longer caption is cut and gets no EOS; otherwise, the decoder would learn to stop in the middle of a sentence.
        """
        units = self.tokenizer.split(caption)
        ids = [BOS, *(self._ids.get(unit, UNK) for unit in units[:max_length])]
        return ids if len(units) > max_length else [*ids, EOS]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of the token ids before the first EOS, without BOS and PAD."""
        units = []
        for token in tokens:
            if token == EOS:
                break
            if token not in (PAD, BOS):
                units.append(self.tokens[token])
        return self.tokenizer.join(units)

    def scoring_units(self, tokens: Iterable[int]) -> list[str]:
        """Return the units that metrics and rewards compare: those of the text of the token ids."""
        return self.tokenizer.scoring.split(self.decode(tokens))

    def texts(self, tokens: Iterable[int]) -> list[str]:
        """Return the text of each token id on its own, such as the labels of attention maps."""
        units = (self.tokens[token] for token in tokens)
        return [self.tokenizer.join([unit]) or unit for unit in units]

    def save(self, path: Path) -> None:
        """Write the vocabulary and its tokenizer as JSON."""
        tokenizer = self.tokenizer.to_json()
        write_json(path, {"format": _FORMAT, "version": _VERSION, "tokenizer": tokenizer, "tokens": self.tokens})

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a vocabulary written by `save`.

        Raises:
            CheckpointError: the file is corrupted, or of another version.
            UserError: the tokenizer needs a library that is not installed.
            OSError: the file cannot be read.
        """
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            version = saved["version"]
            if version == _VERSION:
                return cls([str(token) for token in saved["tokens"]], tokenizer_from_json(saved["tokenizer"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a valid vocabulary file: {error}", "use another checkpoint") from error
        age = "an older" if isinstance(version, int) and version < _VERSION else "a newer"
        raise CheckpointError(
            f"{path}: written by {age} version of gridcap, with other words (format version {version}, expected "
            f"{_VERSION})",
            "train again, or use the version of gridcap that wrote it",
        )
