"""The reward of SCST: scores of whole captions against the training captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.vocabulary import BOS, EOS, PAD, UNK, Vocabulary
from gridcap.train.metrics.ciderd import CiderD


class CaptionReward:
    """CIDEr-D, plus weighted BLEU-4, of generated captions (Rennie et al. 2017, arXiv:1612.00563).

    EOS counts as a token of references and candidates. Without it, nothing rewards a well-formed ending, and captions
    learn to end in "with a" or "on a", whose n-grams are common in the references; self-critical.pytorch (Luo 2020,
    arXiv:2003.09971) counts it too. A caption that is truncated at the maximum length has no EOS and therefore lacks
    the n-grams that contain it.

    Args:
        references: units of each caption of each image, without BOS and EOS, such as token ids. Out-of-vocabulary words
            need ids of their own instead of UNK, because two different unknown words must not match.
        bleu_weight: weight of BLEU-4 relative to CIDEr-D.
        to_units: converts the token ids of a caption, without EOS, to such units; None compares token ids.

    Raises:
        ValueError: an image has no references.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Sequence[int]]],
        bleu_weight: float = 0.0,
        to_units: Callable[[list[int]], list[Hashable]] | None = None,
    ) -> None:
        self._to_units = to_units
        with_eos = [[[*caption, EOS] for caption in captions] for captions in references]
        self._ciderd = CiderD(with_eos)
        self._bleu_weight = bleu_weight
        # Kept as text, which is ten times smaller than n-gram counts. The counts are recomputed once per batch.
        self._texts = [[_to_text(caption) for caption in captions] for captions in with_eos] if bleu_weight > 0 else []

    @classmethod
    def build(cls, data: CaptionedImages, vocabulary: Vocabulary, bleu_weight: float) -> CaptionReward:
        """Return the reward for the images of a data set, addressed by their position in it.

        References are never truncated: truncated ones would reward captions that end in the middle of a sentence, and
        evaluation uses whole references. Captions are compared as in evaluation: as text, split by the tokenizer of the
        metrics, so the reward is the metric for subwords too. Out-of-vocabulary words never match a generated token but
        contribute to the length and n-gram counts.
        """
        tokenizer = vocabulary.tokenizer.scoring
        ids: dict[Hashable, int] = {special: special for special in (PAD, BOS, EOS, UNK)}  # keeps words off these ids
        references = [
            [[ids.setdefault(word, len(ids)) for word in tokenizer.split(caption)] for caption in captions]
            for captions in data.captions
        ]

        if tokenizer is vocabulary.tokenizer and tokenizer.reversible:  # the same as below, but faster
            words = [ids.get(unit, -1 - i) for i, unit in enumerate(vocabulary.tokens)]
            return cls(references, bleu_weight, lambda tokens: [words[token] for token in tokens])

        def to_units(tokens: list[int]) -> list[Hashable]:
            return [ids.get(word, f"?{word}") for word in vocabulary.scoring_units(tokens)]

        return cls(references, bleu_weight, to_units)

    def __call__(self, images: Sequence[int] | np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the rewards of a batch.

        Args:
            images: (B,) positions of the images in the data set.
            tokens: (B, K, T) int64, K captions per image: tokens, EOS unless truncated, PAD.

        Returns:
            (B, K) float32: CIDEr-D (0 to 10) + bleu_weight * BLEU-4 (0 to 1); 0 for an empty caption.
        """
        b, k = tokens.shape[:2]
        captions = [self._units(row) for row in tokens.reshape(b * k, -1).tolist()]
        rewards = self._ciderd.scores(np.repeat(images, k), captions)
        if self._bleu_weight > 0:
            cooked = {image: cook_refs(self._texts[image]) for image in {int(i) for i in images}}
            rewards += self._bleu_weight * np.array(
                [_bleu4(_to_text(caption), cooked[int(images[i // k])]) for i, caption in enumerate(captions)]
            )
        return rewards.reshape(b, k).astype(np.float32)

    def _units(self, row: list[int]) -> list[Hashable]:
        """Return the units up to and including EOS; empty if EOS is the only one."""
        length = next((i for i, token in enumerate(row) if token in (PAD, EOS)), len(row))
        units: list[Hashable] = [*row[:length]] if self._to_units is None else self._to_units(row[:length])
        return [*units, EOS] if units and EOS in row[length : length + 1] else units


def _to_text(caption: Sequence[Hashable]) -> str:
    return " ".join(map(str, caption))


def _bleu4(caption: str, references: tuple[list[int], dict[tuple[str, ...], int]]) -> float:
    """Return the BLEU-4 of one caption, with the smoothing constants of pycocoevalcap's per-image scores."""
    if not caption:
        return 0.0
    counts: dict[str, Any] = cook_test(caption, references, eff="closest")
    bleu = 1.0
    for correct, guess in zip(counts["correct"], counts["guess"], strict=True):
        bleu *= (correct + 1e-15) / (guess + 1e-9)
    ratio = counts["testlen"] / (counts["reflen"] + 1e-9)
    return float(bleu**0.25 * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0))
