"""Construction of the training vocabulary, with checks for captions that cannot be learned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import click

from gridcap.common.config.train import TrainConfig
from gridcap.common.errors import UserError
from gridcap.common.text import plural
from gridcap.train.data.vocabulary import SPECIALS, Vocabulary, count_words

# Thai, Lao, Burmese, Khmer, Japanese kana, and Chinese characters: scripts without spaces between words.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
_MAX_SEGMENTED_LENGTH = 8  # mean characters per word; unsegmented captions are far above, segmented ones far below
_SEGMENT = "segment the captions first: put a space between words, for example with jieba, MeCab, or PyThaiNLP"


def build_vocabulary(captions: Iterable[str], settings: TrainConfig) -> Vocabulary:
    """Build the vocabulary of the training captions and check that a decoder can learn from it.

    Prints a warning if the captions are in a script without spaces and are not segmented into words.

    Args:
        captions: captions of the training split.
        settings: `vocabulary`, and the limits `min_vocabulary` and `max_unk`.

    Raises:
        UserError: the vocabulary has too few words, or too many words of the captions are UNK.
    """
    counts = count_words(captions)
    vocabulary = Vocabulary.from_counts(counts, settings.vocabulary.max_size, settings.vocabulary.min_count)
    unsegmented = is_unsegmented(counts)
    if unsegmented:
        click.secho(f"WARNING: whole captions count as one word; {_SEGMENT}", fg="yellow", err=True)
    words, total = len(vocabulary) - len(SPECIALS), counts.total()
    unknown = sum(n for word, n in counts.items() if word not in vocabulary)
    if words < settings.min_vocabulary:
        raise UserError(
            f"the vocabulary has {plural(words, 'word')}, fewer than {settings.min_vocabulary} (train.min_vocabulary)",
            _SEGMENT if unsegmented else _hint(settings, "use more captions"),
        )
    if unknown > settings.max_unk * total:
        raise UserError(
            f"{unknown / total:.0%} of the words of the training captions are not in the vocabulary of "
            f"{plural(words, 'word')}, more than {settings.max_unk:.0%} (train.max_unk)",
            _SEGMENT if unsegmented else _hint(settings, "use captions with fewer rare words"),
        )
    return vocabulary


def is_unsegmented(counts: Counter[str]) -> bool:
    """Return whether most words are long runs of a script without spaces, such as Chinese, Japanese, or Thai."""
    unspaced = {word: n for word, n in counts.items() if _UNSPACED.search(word)}
    total = sum(unspaced.values())
    if 2 * total <= counts.total():
        return False
    return sum(len(word) * n for word, n in unspaced.items()) > _MAX_SEGMENTED_LENGTH * total


def _hint(settings: TrainConfig, otherwise: str) -> str:
    """Return which setting to change."""
    changes, vocabulary = [], settings.vocabulary
    if vocabulary.min_count > 1:
        changes.append(f"lower train.vocabulary.min_count (now {vocabulary.min_count})")
    if vocabulary.max_size is not None and vocabulary.max_size < 1000:
        changes.append(f"raise train.vocabulary.max_size (now {vocabulary.max_size})")
    return ", or ".join(changes) or otherwise
