"""Statistics of captions: diversity, novelty, and length."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from gridcap.train.data.tokenizers.base import Tokenizer
from gridcap.train.data.tokenizers.words import WORDS

NOVEL_CAPTIONS = "novel_captions"


def caption_statistics(
    captions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    vocabulary_words: int | None,
    training_captions: Collection[str] | None,
    tokenizer: Tokenizer = WORDS,
) -> dict[str, float]:
    """Compute statistics of captions.

    Args:
        captions: image id -> caption.
        references: image id -> captions.
        vocabulary_words: number of words in the decoder's vocabulary, without special tokens; None for subwords.
        training_captions: captions that the decoder was trained on, or None if they are not available.
        tokenizer: tokenizer whose units count as words.

    Returns:
        distinct_words: number of distinct words in the captions.
        vocabulary_words: as given, unless None.
        distinct_captions: number of distinct captions / number of captions.
        novel_captions: share of the captions that are not among the training captions, compared word by word; only if
            `training_captions` is given.
        mean_length: words per caption.
        mean_reference_length: words per reference.
    """
    tokenized = [tuple(tokenizer.split(text)) for text in captions.values()]
    lengths = [len(tokenizer.split(text)) for texts in references.values() for text in texts]
    statistics: dict[str, float] = {
        "distinct_words": len({word for words in tokenized for word in words}),
        "distinct_captions": len(set(tokenized)) / len(tokenized),
    }
    if vocabulary_words is not None:
        statistics["vocabulary_words"] = vocabulary_words
    if training_captions is not None:
        generated = set(tokenized)
        known = {words for text in training_captions if (words := tuple(tokenizer.split(text))) in generated}
        statistics[NOVEL_CAPTIONS] = sum(words not in known for words in tokenized) / len(tokenized)
    return statistics | {
        "mean_length": sum(map(len, tokenized)) / len(tokenized),
        "mean_reference_length": sum(lengths) / len(lengths),
    }
