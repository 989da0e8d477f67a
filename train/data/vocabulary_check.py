"""Construction of the training vocabulary, with checks for captions that cannot be learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gridcap.common.config import AdaptedTrainConfig
from gridcap.common.errors import UserError
from gridcap.common.text import plural
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.tokenizers.base import Tokenizer
from gridcap.train.data.tokenizers.choose import make_tokenizer
from gridcap.train.data.tokenizers.subwords import Subwords
from gridcap.train.data.vocabulary import SPECIALS, Vocabulary


@dataclass(frozen=True)
class CheckedVocabulary:
    """A vocabulary that a decoder can learn from.

    Attributes:
        vocabulary: the vocabulary with its tokenizer.
        train_unk: share of the units of the training captions that are UNK.
        val_unk: the same of the validation captions, if there are any.
    """

    vocabulary: Vocabulary
    train_unk: float
    val_unk: float | None = None

    def lines(self, max_unk: float) -> list[str]:
        """Return one line for the log, and a warning if too many units of the validation captions are UNK."""
        tokenizer = self.vocabulary.tokenizer
        name = tokenizer.name
        if tokenizer.scoring is not tokenizer:
            name += f"; metrics compare {tokenizer.scoring.unit}s: {tokenizer.scoring.name}"
        text = f"vocabulary: {plural(_size(self.vocabulary), tokenizer.unit)} ({name}), "
        text += f"UNK: {self.train_unk:.1%} of the training captions"
        if self.val_unk is None:
            return [text]
        lines = [f"{text}, {self.val_unk:.1%} of the validation captions"]
        if self.val_unk > max_unk:
            lines.append(
                f"WARNING: {self.val_unk:.0%} of the {tokenizer.unit}s of the validation captions are not in the "
                "vocabulary: check that they are in the language of the training captions"
            )
        return lines


def check_vocabulary(
    train: CaptionedImages, val: CaptionedImages | None, settings: AdaptedTrainConfig, given: Vocabulary | None = None
) -> CheckedVocabulary:
    """Build the vocabulary of a run, or check that a given one fits its captions.

    Args:
        train: training images.
        val: validation images, if any.
        settings: `tokenizer`, `vocabulary`, and the limits `min_vocabulary` and `max_unk`.
        given: vocabulary of `init_from`.

    Raises:
        UserError: the tokenizer does not fit the captions, the vocabulary has too few units, or too many units of the
            training captions are UNK.
    """
    captions = [caption for image in train.captions for caption in image]
    if given is None:
        vocabulary, train_unk = build_vocabulary(captions, settings)
    else:
        vocabulary, train_unk = given, unk_share(count_units(captions, given.tokenizer), given)
        if train_unk > settings.max_unk:
            raise UserError(
                _too_many_unknown(train_unk, vocabulary, settings),
                "use captions like those that the decoder of init_from was trained on, or train a new decoder",
            )
    if val is None:
        return CheckedVocabulary(vocabulary, train_unk)
    counts = count_units([caption for image in val.captions for caption in image], vocabulary.tokenizer)
    return CheckedVocabulary(vocabulary, train_unk, unk_share(counts, vocabulary))


def build_vocabulary(captions: Sequence[str], settings: AdaptedTrainConfig) -> tuple[Vocabulary, float]:
    """Return the vocabulary of the training captions and their share of UNK, as `check_vocabulary` does."""
    tokenizer = make_tokenizer(captions, settings)
    counts = count_units(captions, tokenizer)
    min_count = settings.vocabulary.min_count
    if settings.tokenizer == "bpe" and isinstance(tokenizer, Subwords):
        # Trained with the size and the minimum count. Units that no training caption needs are kept for new words.
        counts.update(dict.fromkeys(tokenizer.units(), 0))
        min_count = 0
    vocabulary = Vocabulary.from_counts(counts, settings.vocabulary.max_size, min_count, tokenizer)
    if _size(vocabulary) < settings.min_vocabulary:
        raise UserError(
            f"the vocabulary has {plural(_size(vocabulary), tokenizer.unit)}, fewer than {settings.min_vocabulary} "
            "(train.min_vocabulary)",
            _hint(settings, "use more captions"),
        )
    share = unk_share(counts, vocabulary)
    if share > settings.max_unk:
        raise UserError(
            _too_many_unknown(share, vocabulary, settings),
            _hint(settings, "set train.tokenizer: bpe, or use captions with fewer rare words"),
        )
    return vocabulary, share


def count_units(captions: Sequence[str], tokenizer: Tokenizer) -> Counter[str]:
    """Count the units of captions."""
    return Counter(unit for caption in captions for unit in tokenizer.split(caption))


def unk_share(counts: Counter[str], vocabulary: Vocabulary) -> float:
    """Return the share of the counted units that are not in the vocabulary."""
    return sum(n for unit, n in counts.items() if unit not in vocabulary) / max(1, counts.total())


def _size(vocabulary: Vocabulary) -> int:
    return len(vocabulary) - len(SPECIALS)


def _too_many_unknown(share: float, vocabulary: Vocabulary, settings: AdaptedTrainConfig) -> str:
    unit = vocabulary.tokenizer.unit
    return (
        f"{share:.0%} of the {unit}s of the training captions are not in the vocabulary of "
        f"{plural(_size(vocabulary), unit)}, more than {settings.max_unk:.0%} (train.max_unk)"
    )


def _hint(settings: AdaptedTrainConfig, otherwise: str) -> str:
    """Return which setting to change."""
    changes, vocabulary = [], settings.vocabulary
    if vocabulary.min_count > 1:
        changes.append(f"lower train.vocabulary.min_count (now {vocabulary.min_count})")
    if vocabulary.max_size is not None and vocabulary.max_size < 1000:
        changes.append(f"raise train.vocabulary.max_size (now {vocabulary.max_size})")
    return ", or ".join(changes) or otherwise
