"""CIDEr-D (Vedantam, Zitnick and Parikh 2015, arXiv:1411.5726, section 7), quick enough to be a reward.

A caption is compared with each reference of its image: for n = 1 ... 4 the cosine of their tf-idf vectors of
n-grams, where a candidate's weight is clipped at the reference's, times exp(-(difference in length)^2 / (2 * 6^2)).
The score is 10 times the mean over n and over the references. As in the authors' and the COCO server's code an
n-gram weighs count * (log N - log max(1, df)), df of the N images having it in a reference, and a length is the
number of bigrams.

All is done in numpy for a whole batch: its n-grams get numbers by sorting, so one call costs a few sorts whatever
the number of captions. Kept are the references as word numbers (4 bytes a word) and the document frequencies of
the n-grams that two images or more share (16 bytes each); those of one image weigh as much as unseen ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

ORDERS = 4
SIGMA = 6.0
_BITS = 31  # an n-gram's key is (number of the n-gram without its last word) << 31 | number of its last word
_LAST_WORD = (1 << _BITS) - 1


class CiderD:
    """CIDEr-D against the references of N images.

    Args:
        references: of each image its captions, of each caption its tokens. Images are known by their position
            here, and document frequencies are counted over all of them. With one image alone every weight is
            log 1 = 0, and so is every score.

    Raises:
        ValueError: an image without references.
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
        self._keys: list[np.ndarray] = []  # for each n: (u,) int64 keys of its n-grams of two images or more, rising
        self._weights: list[np.ndarray] = []  # (u,) float64 log N - log df of each
        image = np.repeat(np.arange(len(captions)), captions)
        kept_as = np.zeros(1, np.int64)  # number of an (n - 1)-gram -> its number among those kept
        for owner, gram, keys in _grams(self._tokens, lengths):
            pairs = np.unique(image[owner] * max(1, len(keys)) + gram)
            frequency = np.bincount(pairs % max(1, len(keys)), minlength=len(keys))
            kept = frequency > 1  # and then what it begins with is kept too
            self._keys.append(kept_as[keys[kept] >> _BITS] << _BITS | keys[kept] & _LAST_WORD)
            self._weights.append(self._log_images - np.log(frequency[kept]))
            kept_as = np.cumsum(kept) - 1

    def __len__(self) -> int:
        """N, the images."""
        return len(self._image_starts) - 1

    def score(self, image: int, candidate: Sequence[Hashable]) -> float:
        """CIDEr-D of one caption, from 0 to 10; `scores` is far quicker for many."""
        return float(self.scores([image], [candidate])[0])

    def scores(self, images: Sequence[int] | np.ndarray, candidates: Sequence[Sequence[Hashable]]) -> np.ndarray:
        """CIDEr-D of many captions.

        Args:
            images: (n,) the image of each candidate; one image may have many.
            candidates: n captions; an empty one scores 0.

        Returns:
            (n,) float64, from 0 to 10.

        Raises:
            ValueError: not as many images as candidates.
            IndexError: no such image.
        """
        count, of = len(candidates), np.asarray(images, np.int64)
        if len(of) != count:
            raise ValueError(f"{len(of)} images for {count} candidates")
        if count == 0:
            return np.zeros(0)
        if of.min() < 0 or of.max() >= len(self):
            raise IndexError(f"images from {of.min()} to {of.max()}, and there are {len(self)}")
        shown, place = np.unique(of, return_inverse=True)
        captions, place_of_caption = _ranges(self._image_starts, shown)
        tokens, _ = _ranges(self._caption_starts, captions)
        # The batch: the candidates, and after them the references of their images, once each.
        lengths = np.concatenate([[len(c) for c in candidates], np.diff(self._caption_starts)[captions]])
        place = np.concatenate([place.reshape(-1), place_of_caption])
        bigrams = np.maximum(lengths - 1, 0)
        total: np.ndarray = np.zeros(count)
        known_as = np.zeros(1, np.int64)  # number of an (n - 1)-gram in the batch -> among those kept, -1: none
        grams = _grams(np.concatenate([self._numbers(candidates), self._tokens[tokens]]), lengths)
        for order, (owner, gram, keys) in enumerate(grams):
            known_as, weight = self._look_up(order, known_as, keys)
            pairs, times = np.unique(owner * max(1, len(keys)) + gram, return_counts=True)
            owner, gram = np.divmod(pairs, max(1, len(keys)))
            entry = times * weight[gram]
            norm = np.sqrt(np.bincount(owner, entry**2, minlength=len(lengths)))
            ours, theirs = _meet(place[owner] * max(1, len(keys)) + gram, int(np.searchsorted(owner, count)))
            candidate, reference = owner[ours], owner[theirs]
            product = np.minimum(entry[ours], entry[theirs]) * entry[theirs]
            norms = norm[candidate] * norm[reference]
            cosine = np.divide(product, norms, out=np.zeros_like(product), where=norms > 0)
            penalty = np.exp(-((bigrams[candidate] - bigrams[reference]) ** 2) / (2 * SIGMA**2))
            total += np.bincount(candidate, cosine * penalty, minlength=count)
        total *= 10 / (ORDERS * np.diff(self._image_starts)[of])
        return total

    def _numbers(self, candidates: Sequence[Sequence[Hashable]]) -> np.ndarray:
        """(t,) int32 numbers of all words; those that no reference has come after the rest."""
        flat = list(itertools.chain.from_iterable(candidates))
        known, unknown = self._words, dict[Hashable, int]()
        numbers = np.array([known.get(word, -1) for word in flat], np.int32)
        for i in np.flatnonzero(numbers < 0):
            numbers[i] = unknown.setdefault(flat[i], len(known) + len(unknown))
        return numbers

    def _look_up(self, order: int, known_as: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of a batch's n-grams, (u,) int64 keys: their numbers among those kept, or -1, and their weights, (u,)."""
        table = self._keys[order]
        begins = known_as[keys >> _BITS]
        wanted = np.where(begins < 0, -1, begins << _BITS | keys & _LAST_WORD)
        number = np.searchsorted(table, wanted)
        number[number == len(table)] = 0
        found = table[number] == wanted if len(table) else np.zeros(len(keys), bool)
        weight = np.full(len(keys), self._log_images)
        weight[found] = self._weights[order][number[found]]
        return np.where(found, number, -1), weight


def _starts(lengths: np.ndarray) -> np.ndarray:
    """(n,) lengths of parts -> (n + 1,) int64 where each starts, and the end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _ranges(starts: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All places of some parts, one part after the other, and for each place which of `parts` (by position)."""
    lengths = starts[parts + 1] - starts[parts]
    which = np.repeat(np.arange(len(parts)), lengths)
    return np.arange(len(which)) - _starts(lengths)[which] + starts[parts][which], which


def _grams(tokens: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Number the n-grams of captions, for n = 1 ... 4.

    Args:
        tokens: (t,) numbers of all words, caption after caption.
        lengths: (c,) words of each caption.

    Yields:
        owner: (g,) int64 the caption of every n-gram, rising.
        gram: (g,) int64 its number.
        keys: (u,) int64 the key of each number, rising, made of the number of its first n - 1 words.
    """
    starts = np.arange(len(tokens))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - starts  # words from here to the end of the caption
    gram = np.zeros(len(tokens), np.int64)
    for order in range(ORDERS):
        fits = left > order
        starts, owner, left, gram = starts[fits], owner[fits], left[fits], gram[fits]
        keys, gram = np.unique(gram << _BITS | tokens[starts + order], return_inverse=True)
        gram = gram.reshape(-1)  # numpy 2.0 alone gives it the shape of the input
        yield owner, gram, keys


def _meet(keys: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of all pairs of equal keys, one among the first `count` and one among the rest."""
    order = count + np.argsort(keys[count:], kind="stable")
    theirs = keys[order]
    first, end = np.searchsorted(theirs, keys[:count], "left"), np.searchsorted(theirs, keys[:count], "right")
    ours = np.repeat(np.arange(count), end - first)
    return ours, order[np.arange(len(ours)) - _starts(end - first)[ours] + first[ours]]
