"""The order of an epoch: a permutation that is computed where it is needed, and never stored.

However many rows there are, the order costs no memory, and a seed, an epoch and a position say all of it: any
process can begin anywhere, and a resume needs no list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gridcap.common.config.train import Shuffle

_ROUNDS = 6
_BLOCK = 256  # rows that lie side by side in the store: 64 MiB of InceptionV3's float16 grids
_WINDOW = 16  # blocks whose rows are mixed: what is read at a time fits in any page cache


@dataclass(frozen=True)
class EpochOrder:
    """A permutation of 0 ... count - 1; a function of its fields and of nothing else.

    Attributes:
        count: how many there are.
        seed, epoch: choose one of the permutations.
        shuffle: "rows" permutes all of them; "blocks" permutes blocks of 256 neighbors and mixes the rows of 16
            blocks at a time, so that a disk reads whole stretches. Where the blocks begin changes each epoch.
    """

    count: int
    seed: int
    epoch: int
    shuffle: Shuffle = "rows"

    def __getitem__(self, part: slice) -> np.ndarray:
        """The members at positions `part.start` ... `part.stop - 1`, int64."""
        positions = np.arange(part.start, min(part.stop, self.count), dtype=np.uint64)
        if self.shuffle == "rows":
            out: np.ndarray = _permute(positions, self.count, self._keys(0)).astype(np.int64)
            return out
        return self._in_blocks(positions)

    def _keys(self, *purpose: int) -> np.ndarray:
        return np.random.SeedSequence([self.seed, self.epoch, 0x0E0C, *purpose]).generate_state(_ROUNDS, np.uint64)

    def _in_blocks(self, positions: np.ndarray) -> np.ndarray:
        first = int(_permute(np.zeros(1, np.uint64), self.count, self._keys(1))[0])  # where block 0 begins
        full = self.count // _BLOCK  # the short block at the end keeps its place, which `first` moves about
        out = np.empty(len(positions), np.int64)
        rows_a_window = _WINDOW * _BLOCK
        windows = positions // np.uint64(rows_a_window)
        for window in np.unique(windows).tolist():
            here = windows == window
            begin = window * rows_a_window
            length = min(rows_a_window, self.count - begin)
            mixed = _permute(positions[here] - np.uint64(begin), length, self._keys(2, window))
            places = mixed // np.uint64(_BLOCK) + np.uint64(window * _WINDOW)
            blocks = places.copy()
            whole = places < full
            blocks[whole] = _permute(places[whole], full, self._keys(3))
            rows = blocks * np.uint64(_BLOCK) + mixed % np.uint64(_BLOCK)
            out[here] = (rows.astype(np.int64) + first) % self.count
        return out


def _permute(values: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """A keyed permutation of 0 ... count - 1 at some values, uint64 -> uint64.

    A Feistel network permutes the numbers of an even count of bits; a number that leaves the range is sent
    through it again until it is back ("cycle walking": Black and Rogaway 2002, "Ciphers with Arbitrary Finite
    Domains"), which is less than four times on average.
    """
    if count <= 1 or len(values) == 0:
        return values.copy()
    half = np.uint64((int(count - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = values.copy()
    todo = np.arange(len(values))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for key in keys:
            left, right = right, left ^ (_scatter(right ^ key) & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= count]
    return out


def _scatter(values: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 (the finaliser of SplitMix64: Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
