"""The tokenizer of a run, as configured by `train.tokenizer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gridcap.common.config import AdaptedTrainConfig
from gridcap.common.errors import UserError
from gridcap.train.data.tokenizers.base import Tokenizer
from gridcap.train.data.tokenizers.characters import Characters
from gridcap.train.data.tokenizers.scripts import guess_language, is_unsegmented
from gridcap.train.data.tokenizers.segmented import SEGMENTERS, Segmented, is_installed
from gridcap.train.data.tokenizers.words import WORDS, Words
from gridcap.train.data.vocabulary import SPECIALS


def make_tokenizer(captions: Sequence[str], settings: AdaptedTrainConfig) -> Tokenizer:
    """Return the tokenizer that `train.tokenizer` selects; "bpe" is trained on the captions.

    Metrics compare the units of `choose_by_script`, whatever the decoder generates.

    Raises:
        UserError: words are chosen for captions without spaces, or a library is missing.
        PathError: the tokenizer.json does not exist.
    """
    choice, scoring = settings.tokenizer, choose_by_script(captions)
    if choice == "auto":
        return scoring
    if choice == "words":
        if not isinstance(scoring, Words):
            raise UserError(
                "the captions have no spaces between words, so whole captions count as one word",
                f"--set train.tokenizer=auto (here: {scoring.name}), characters, or bpe; or segment the captions first",
            )
        return scoring
    if choice == "characters":
        return Characters(scoring if isinstance(scoring, Words) else None)
    from gridcap.train.data.tokenizers.subwords import read_tokenizer, train_bpe

    if isinstance(choice, Path):
        return read_tokenizer(choice, scoring)
    size = settings.vocabulary.max_size
    if size is None:
        raise UserError(
            "train.tokenizer: bpe requires a vocabulary size, but train.vocabulary.max_size is null",
            "set train.vocabulary.max_size, such as 5000",
        )
    return train_bpe(captions, size - len(SPECIALS), settings.vocabulary.min_count, scoring)


def choose_by_script(captions: Sequence[str]) -> Tokenizer:
    """Return `Words` for languages with spaces, else a segmenter if it is installed, else `Characters`."""
    if not is_unsegmented(captions):
        return WORDS
    segmenter = SEGMENTERS.get(guess_language(captions) or "")
    return Segmented(segmenter) if segmenter is not None and is_installed(segmenter) else Characters()
