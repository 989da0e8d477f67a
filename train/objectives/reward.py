"""The reward of self-critical training: how well whole captions score against the training captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.vocabulary import EOS, PAD, Vocabulary, tokenize
from gridcap.train.metrics.ciderd import CiderD


class CaptionReward:
    """CIDEr-D, and BLEU-4 if wanted, of captions as the decoder writes them (Rennie et al. 2017, arXiv:1612.00563).

    The end token counts as a word, in references and candidates. Without it nothing says where a caption ends
    well, and self-critical captions learn to break off in "with a" or "on a", whose n-grams stand in many
    references; self-critical.pytorch (Luo 2020, arXiv:2003.09971) counts it too. A caption that was cut before its
    end gets no end token, so it lacks the n-grams with it.

    Args:
        references: of each image its captions, of each caption its token ids without BOS and EOS. A word that the
            decoder does not know must have an id of its own, other than UNK: two different ones must not match.
        bleu_weight: of BLEU-4 beside CIDEr-D.

    Raises:
        ValueError: an image without references.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[int]]], bleu_weight: float = 0.0) -> None:
        ended = [[[*caption, EOS] for caption in captions] for captions in references]
        self._ciderd = CiderD(ended)
        self._bleu_weight = bleu_weight
        # As text, which takes a tenth of the space of counted n-grams; an image's are counted once a batch.
        self._texts = [[_text(caption) for caption in captions] for captions in ended] if bleu_weight > 0 else []

    @classmethod
    def build(cls, data: CaptionedImages, vocabulary: Vocabulary, bleu_weight: float) -> CaptionReward:
        """The reward for the images of a data set, by their positions in it.

        References are whole, however long: cut ones would reward captions that end in the middle of a sentence,
        and no caption is scored against cut ones in evaluation. Words outside of the vocabulary get ids from
        its size on, so they match nothing that the decoder can write and weigh what they do in evaluation.
        """
        ids = {word: i for i, word in enumerate(vocabulary.tokens)}
        return cls(
            [
                [[ids.setdefault(word, len(ids)) for word in tokenize(caption)] for caption in captions]
                for captions in data.captions
            ],
            bleu_weight,
        )

    def __call__(self, images: Sequence[int] | np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The rewards of a batch.

        Args:
            images: (B,) positions of the images.
            tokens: (B, K, T) int64, K captions of each image: words, EOS unless cut, PAD.

        Returns:
            (B, K) float32, CIDEr-D (0 to 10) + bleu_weight * BLEU-4 (0 to 1); 0 for a caption without words.
        """
        b, k = tokens.shape[:2]
        captions = [_written(row) for row in tokens.reshape(b * k, -1).tolist()]
        rewards = self._ciderd.scores(np.repeat(images, k), captions)
        if self._bleu_weight > 0:
            cooked = {image: cook_refs(self._texts[image]) for image in {int(i) for i in images}}
            rewards += self._bleu_weight * np.array(
                [_bleu4(_text(caption), cooked[int(images[i // k])]) for i, caption in enumerate(captions)]
            )
        return rewards.reshape(b, k).astype(np.float32)


def _written(row: list[int]) -> list[int]:
    """The words and their EOS, without what comes after; nothing if there is no word."""
    words = []
    for token in row:
        if token == PAD:
            break
        words.append(token)
        if token == EOS:
            break
    return [] if words == [EOS] else words


def _text(caption: Sequence[int]) -> str:
    return " ".join(map(str, caption))


def _bleu4(caption: str, references: tuple[list[int], dict[tuple[str, ...], int]]) -> float:
    """BLEU-4 of one caption as pycocoevalcap's scorer counts it for each image, with its tiny and small numbers."""
    if not caption:
        return 0.0
    counted: dict[str, Any] = cook_test(caption, references, eff="closest")
    bleu = 1.0
    for correct, guess in zip(counted["correct"], counted["guess"], strict=True):
        bleu *= (correct + 1e-15) / (guess + 1e-9)
    ratio = counted["testlen"] / (counted["reflen"] + 1e-9)
    return float(bleu**0.25 * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0))
