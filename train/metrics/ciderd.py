"""CIDEr-D (Vedantam, Zitnick, and Parikh 2015, arXiv:1411.5726, section 7), fast enough to be a reward.

A caption is compared with each reference of its image: for n = 1 ... 4, the cosine of their TF-IDF vectors of n-grams,
with the candidate's weights clipped at the reference's, times exp(-(difference in length)^2 / (2 * 6^2)). The score is
10 times the mean over n and over the references. As in the authors' code and on the COCO server, the weight of an
n-gram is count * (log N - log max(1, df)), where df of the N images have it in a reference, and the length is the
number of bigrams.

A whole batch is processed in NumPy: n-grams are numbered by sorting, so a call costs a few sorts, whatever the number
of captions. The scorer stores the references as word indices (4 bytes per word) and the document frequencies of
n-grams that occur in at least two images (16 bytes each); n-grams of one image have the same weight as unseen ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

ORDERS = 4
SIGMA = 6.0
_BITS = 31  # the key of an n-gram is (index of its first n - 1 words) << 31 | index of its last word
_LAST_WORD = (1 << _BITS) - 1


class CiderD:
    """CIDEr-D against the references of N images.

    Args:
        references: for each image its captions, for each caption its tokens. Images are addressed by their index, and
            document frequencies are counted over all of them. With a single image, every weight is log 1 = 0, and so
            is every score.

    Raises:
        ValueError: an image has no references.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[Hashable]]]) -> None:
        captions = [len(image) for image in references]
        if 0 in captions:
            raise ValueError(f"image {captions.index(0)} has no references")
        words: dict[Hashable, int] = {}
        flat = itertools.chain.from_iterable(itertools.chain.from_iterable(references))
        self._tokens = np.fromiter((words.setdefault(word, len(words)) for word in flat), np.int32)
        self._words = words
        lengths = np.array([len(caption) for image in references for caption in image], np.int64)
        self._caption_starts = _starts(lengths)
        self._image_starts = _starts(np.array(captions, np.int64))
        self._log_images = float(np.log(max(1, len(captions))))
        # For each n: (u,) int64 sorted keys of the n-grams in at least two images, and (u,) float64 log N - log df.
        self._keys: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._count_document_frequencies(np.repeat(np.arange(len(captions)), captions), lengths)

    def _count_document_frequencies(self, image: np.ndarray, lengths: np.ndarray) -> None:
        """Fill `_keys` and `_weights`; (c,) `image` and `lengths` are those of each reference caption."""
        kept_index = np.zeros(1, np.int64)  # index of an (n - 1)-gram -> its index among those kept
        for owner, gram, keys in _grams(self._tokens, lengths):
            pairs = np.unique(image[owner] * max(1, len(keys)) + gram)
            frequency = np.bincount(pairs % max(1, len(keys)), minlength=len(keys))
            kept = frequency > 1  # implies that the (n - 1)-gram at the start is kept too
            self._keys.append(kept_index[keys[kept] >> _BITS] << _BITS | keys[kept] & _LAST_WORD)
            self._weights.append(self._log_images - np.log(frequency[kept]))
            kept_index = np.cumsum(kept) - 1

    def __len__(self) -> int:
        """Return N, the number of images."""
        return len(self._image_starts) - 1

    def score(self, image: int, candidate: Sequence[Hashable]) -> float:
        """Return the CIDEr-D of one caption, in [0, 10]; `scores` is much faster for many."""
        return float(self.scores([image], [candidate])[0])

    def scores(self, images: Sequence[int] | np.ndarray, candidates: Sequence[Sequence[Hashable]]) -> np.ndarray:
        """Return the CIDEr-D of many captions.

        Args:
            images: (n,) image index of each candidate; an image may have many candidates.
            candidates: n captions as tokens; an empty caption scores 0.

        Returns:
            (n,) float64 in [0, 10].

        Raises:
            ValueError: the numbers of images and candidates differ.
            IndexError: an image index is out of range.
        """
        count, image = len(candidates), np.asarray(images, np.int64)
        if len(image) != count:
            raise ValueError(f"{len(image)} images for {count} candidates")
        if count == 0:
            return np.zeros(0)
        if image.min() < 0 or image.max() >= len(self):
            raise IndexError(f"image index out of range: {image.min()} to {image.max()} for {len(self)} images")
        tokens, lengths, place = self._batch(image, candidates)
        bigrams = np.maximum(lengths - 1, 0)
        total: np.ndarray = np.zeros(count)
        known_index = np.zeros(1, np.int64)  # index of an (n - 1)-gram in the batch -> among those kept, or -1
        for order, (owner, gram, keys) in enumerate(_grams(tokens, lengths)):
            known_index, weight = self._look_up(order, known_index, keys)
            pairs, repeats = np.unique(owner * max(1, len(keys)) + gram, return_counts=True)
            owner, gram = np.divmod(pairs, max(1, len(keys)))
            entry = repeats * weight[gram]
            norm = np.sqrt(np.bincount(owner, entry**2, minlength=len(lengths)))
            ours, theirs = _matches(place[owner] * max(1, len(keys)) + gram, int(np.searchsorted(owner, count)))
            candidate, reference = owner[ours], owner[theirs]
            product = np.minimum(entry[ours], entry[theirs]) * entry[theirs]
            norms = norm[candidate] * norm[reference]
            cosine = np.divide(product, norms, out=np.zeros_like(product), where=norms > 0)
            penalty = np.exp(-((bigrams[candidate] - bigrams[reference]) ** 2) / (2 * SIGMA**2))
            total += np.bincount(candidate, cosine * penalty, minlength=count)
        total *= 10 / (ORDERS * np.diff(self._image_starts)[image])
        return total

    def _batch(
        self, images: np.ndarray, candidates: Sequence[Sequence[Hashable]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the candidates, followed by the references of their images (once per image).

        Returns:
            (t,) words of all captions, (c,) lengths, and (c,) index of each caption's image among those of the batch.
        """
        distinct, place = np.unique(images, return_inverse=True)
        captions, reference_place = _ranges(self._image_starts, distinct)
        tokens, _ = _ranges(self._caption_starts, captions)
        lengths = np.concatenate([[len(c) for c in candidates], np.diff(self._caption_starts)[captions]])
        words = np.concatenate([self._word_indices(candidates), self._tokens[tokens]])
        return words, lengths, np.concatenate([place.reshape(-1), reference_place])

    def _word_indices(self, candidates: Sequence[Sequence[Hashable]]) -> np.ndarray:
        """Return the (t,) int32 indices of all words; words in no reference get new indices after the known ones."""
        flat = list(itertools.chain.from_iterable(candidates))
        known, unknown = self._words, dict[Hashable, int]()
        indices = np.array([known.get(word, -1) for word in flat], np.int32)
        for i in np.flatnonzero(indices < 0):
            indices[i] = unknown.setdefault(flat[i], len(known) + len(unknown))
        return indices

    def _look_up(self, order: int, known_index: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of a batch's n-grams among those kept, or -1, and their weights.

        Args:
            order: n - 1.
            known_index: index of each (n - 1)-gram of the batch among those kept, or -1.
            keys: (u,) int64 keys of the n-grams.
        """
        table = self._keys[order]
        prefix = known_index[keys >> _BITS]
        query = np.where(prefix < 0, -1, prefix << _BITS | keys & _LAST_WORD)
        index = np.searchsorted(table, query)
        index[index == len(table)] = 0
        known = table[index] == query if len(table) else np.zeros(len(keys), bool)
        weight = np.full(len(keys), self._log_images)
        weight[known] = self._weights[order][index[known]]
        return np.where(known, index, -1), weight


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Return the (n + 1,) int64 start offsets of n consecutive parts, and the end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _ranges(starts: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated offsets of some parts and, for each offset, the index into `parts`."""
    lengths = starts[parts + 1] - starts[parts]
    part = np.repeat(np.arange(len(parts)), lengths)
    return np.arange(len(part)) - _starts(lengths)[part] + starts[parts][part], part


def _grams(tokens: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Number the n-grams of captions, for n = 1 ... 4.

    Args:
        tokens: (t,) word indices of all captions, concatenated.
        lengths: (c,) number of words of each caption.

    Yields:
        owner: (g,) int64 caption of every n-gram, sorted.
        gram: (g,) int64 index of every n-gram.
        keys: (u,) int64 sorted keys of the distinct n-grams, built from the index of their first n - 1 words.
    """
    starts = np.arange(len(tokens))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - starts  # words from here to the end of the caption
    gram = np.zeros(len(tokens), np.int64)
    for order in range(ORDERS):
        fits = left > order
        starts, owner, left, gram = starts[fits], owner[fits], left[fits], gram[fits]
        keys, gram = np.unique(gram << _BITS | tokens[starts + order], return_inverse=True)
        gram = gram.reshape(-1)  # NumPy 2.0 returns the shape of the input
        yield owner, gram, keys


def _matches(keys: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of all pairs of equal keys, one among the first `count` and one among the rest."""
    order = count + np.argsort(keys[count:], kind="stable")
    theirs = keys[order]
    first, end = np.searchsorted(theirs, keys[:count], "left"), np.searchsorted(theirs, keys[:count], "right")
    ours = np.repeat(np.arange(count), end - first)
    return ours, order[np.arange(len(ours)) - _starts(end - first)[ours] + first[ours]]
