"""Epoch order: a permutation that is computed on demand and never stored.

The order is a pure function of the number of images, the seed, and the epoch. It needs no memory, any process can
start at any position, and resuming needs only a step number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gridcap.common.config.train import Shuffle

_ROUNDS = 6  # of the Feistel network
BLOCK_ROWS = 256  # consecutive rows of the store: 64 MiB of InceptionV3's float16 grids
WINDOW_BLOCKS = 16  # blocks whose rows are mixed: a window fits into any page cache


@dataclass(frozen=True)
class EpochOrder:
    """A permutation of 0 ... count - 1, indexed by slices.

    Attributes:
        count: number of elements.
        seed: seed of the run.
        epoch: epoch number.
        shuffle: "rows" permutes all rows. "blocks" permutes blocks of 256 consecutive rows and mixes the rows of 16
            blocks at a time, for sequential reads from disk; the block boundaries change every epoch.
    """

    count: int
    seed: int
    epoch: int
    shuffle: Shuffle = "rows"

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return the elements at positions `part.start` ... `part.stop - 1`, int64."""
        positions = np.arange(part.start, min(part.stop, self.count), dtype=np.uint64)
        if self.shuffle == "rows":
            out: np.ndarray = _permute(positions, self.count, self._keys(0)).astype(np.int64)
            return out
        return self._shuffle_blocks(positions)

    def _keys(self, *purpose: int) -> np.ndarray:
        return np.random.SeedSequence([self.seed, self.epoch, 0x0E0C, *purpose]).generate_state(_ROUNDS, np.uint64)

    def _shuffle_blocks(self, positions: np.ndarray) -> np.ndarray:
        # Rotating the rows by a random offset moves the block boundaries.
        offset = int(_permute(np.zeros(1, np.uint64), self.count, self._keys(1))[0])
        full_blocks = self.count // BLOCK_ROWS  # a shorter last block keeps its place, but `offset` changes its rows
        out = np.empty(len(positions), np.int64)
        window_rows = WINDOW_BLOCKS * BLOCK_ROWS
        windows = positions // np.uint64(window_rows)
        for window in np.unique(windows).tolist():
            selected = windows == window
            begin = window * window_rows
            length = min(window_rows, self.count - begin)
            mixed = _permute(positions[selected] - np.uint64(begin), length, self._keys(2, window))
            places = mixed // np.uint64(BLOCK_ROWS) + np.uint64(window * WINDOW_BLOCKS)
            blocks = places.copy()
            full = places < full_blocks
            blocks[full] = _permute(places[full], full_blocks, self._keys(3))
            rows = blocks * np.uint64(BLOCK_ROWS) + mixed % np.uint64(BLOCK_ROWS)
            out[selected] = (rows.astype(np.int64) + offset) % self.count
        return out


def _permute(values: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Apply a keyed permutation of 0 ... count - 1 to some values, uint64 -> uint64.

    A Feistel network permutes the integers of an even number of bits. Values that leave the range pass through it
    again until they are back ("cycle walking": Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"),
    fewer than four passes on average.
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
            left, right = right, left ^ (_mix_bits(right ^ key) & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= count]
    return out


def _mix_bits(values: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 values (the finalizer of SplitMix64: Steele, Lea, and Flood 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
