"""The stream of training batches: epoch order, prefetch, CaptionBatch.

The unit is an image with its K captions: its grid is read and moved once and serves them all.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from gridcap.common.annotations import ImageRecord
from gridcap.common.config.train import Shuffle
from gridcap.common.errors import MismatchError
from gridcap.common.store.reader import FeatureStore
from gridcap.train.data.order import EpochOrder
from gridcap.train.data.vocabulary import PAD, Vocabulary
from gridcap.train.engine.distributed import ALONE, Ranks

_BATCHES_AHEAD = 3
_STEPS_AT_ONCE = 64  # of the order: it costs half a millisecond, of however few images


@dataclass(frozen=True)
class CaptionedImages:
    """The images of a store that can be used, with their captions.

    Attributes:
        store: where their grids are.
        rows: (n,) int64, their rows in the store.
        captions: n lists of captions, none empty.
        left_out: reason -> how many images of the captions file could not be used.
    """

    store: FeatureStore
    rows: np.ndarray
    captions: list[tuple[str, ...]]
    left_out: dict[str, int]

    @classmethod
    def join(cls, store: FeatureStore, records: Sequence[ImageRecord], source: Path) -> CaptionedImages:
        """Match captions with grids by image id, in the order of the store's rows.

        Args:
            store: the grids.
            records: images with captions.
            source: the captions file, for messages.

        Raises:
            MismatchError: no image has both, or an id means two different files.
        """
        left_out: dict[str, int] = {}
        pairs: list[tuple[int, tuple[str, ...]]] = []
        for record in records:
            try:
                row = store.row_of_image(record.image_id)
            except KeyError:
                left_out["not in the feature store"] = left_out.get("not in the feature store", 0) + 1
                continue
            if PurePosixPath(record.file_name).name != PurePosixPath(store.file_names[row]).name:
                raise MismatchError(
                    f"image {record.image_id} is {store.file_names[row]} in {store.path}, "
                    f"and {record.file_name} in {source}",
                    "give the captions file that these features were extracted for",
                )
            reason = "rejected in extraction" if not store.valid[row] else "" if record.captions else "without captions"
            if reason:
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                pairs.append((row, record.captions))
        if not pairs:
            raise MismatchError(
                f"{store.path} and {source} have no usable image in common ({left_out})",
                "give the captions file that these features were extracted for",
            )
        pairs.sort(key=lambda pair: pair[0])
        return cls(store, np.array([row for row, _ in pairs]), [captions for _, captions in pairs], left_out)

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """A SHA-256 of which rows there are and what their captions say, in hexadecimal."""
        found = hashlib.sha256(self.rows.tobytes())
        for captions in self.captions:
            found.update(json.dumps(captions).encode())
        return found.hexdigest()

    def images(self) -> set[tuple[int, str]]:
        """Image ids and file names; files that number their images from 1 share ids, not names."""
        return {(int(self.store.image_ids[row]), PurePosixPath(self.store.file_names[row]).name) for row in self.rows}


@dataclass(frozen=True)
class CaptionBatch:
    """B images with K captions each.

    Attributes:
        images: (B,) positions in the `CaptionedImages`.
        grids: (B, P, C) in the stored type; P cells, row by row.
        tokens: (B, K, T) int64, BOS ... EOS, then PAD; an image with fewer captions has rows of PAD only.
        words: (N,) int64, the places of the words to be predicted among the B * K * (T - 1) that follow a token.
    """

    images: np.ndarray
    grids: Tensor
    tokens: Tensor
    words: Tensor

    def to(self, device: torch.device) -> CaptionBatch:
        """The batch on another device."""
        moved = (part.to(device, non_blocking=True) for part in (self.grids, self.tokens, self.words))
        return CaptionBatch(self.images, *moved)

    def pinned(self) -> CaptionBatch:
        """The batch in page-locked memory, from which a GPU reads while it computes."""
        return CaptionBatch(self.images, self.grids.pin_memory(), self.tokens.pin_memory(), self.words.pin_memory())


def choose_captions(available: int, wanted: int, seed: int, epoch: int, row: int) -> list[int]:
    """Which of an image's captions an epoch uses: all if there are no more than wanted, else drawn without repeats."""
    if available <= wanted:
        return list(range(available))
    return np.random.default_rng([seed, epoch, row, 0xCA]).choice(available, wanted, replace=False).tolist()  # type: ignore[no-any-return]


def choose_views(views: int, seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """Which of its stored views (original, mirrored) an epoch shows of each image: one, drawn anew each epoch.

    Args:
        views: how many there are.
        rows: (b,) of the store.

    Returns:
        (b,) int64 numbers below `views`; a function of the arguments, whatever batch a row is in.
    """
    return np.array([np.random.default_rng([seed, epoch, int(row), 0x71E3]).integers(views) for row in rows], np.int64)


def pad_captions(captions: Sequence[Sequence[Sequence[int]]], per_image: int) -> Tensor:
    """Token lists -> (B, K, T) int64 filled up with PAD; T is the longest."""
    longest = max((len(tokens) for image in captions for tokens in image), default=2)
    out = np.full((len(captions), per_image, longest), PAD, np.int64)
    for b, image in enumerate(captions):
        for k, tokens in enumerate(image):
            out[b, k, : len(tokens)] = tokens
    return torch.from_numpy(out)


@dataclass(frozen=True)
class CaptionStream:
    """Batches of one data set, from any position of any epoch, read ahead by a thread.

    The images of a step of the optimizer are `batch_size` in a row of the epoch's order, whatever number of
    processes and parts they are split over; so neither changes what is learned.

    Attributes:
        data: images with captions.
        vocabulary: turns words into ids.
        batch_size: B, images of a step.
        per_image: K.
        max_length: longest caption, in words.
        seed: of the epochs' orders, and of which captions and views are drawn.
        shuffle: "rows" or "blocks", as for `EpochOrder`.
        ranks: which process this is of how many.
        parts: into how many batches a process takes its images of a step.
        pin: put batches into page-locked memory, from which a GPU reads while it computes.
    """

    data: CaptionedImages
    vocabulary: Vocabulary
    batch_size: int
    per_image: int
    max_length: int
    seed: int = 0
    shuffle: Shuffle = "rows"
    ranks: Ranks = ALONE
    parts: int = 1
    pin: bool = False

    def __len__(self) -> int:
        """Steps in an epoch."""
        return -(-len(self.data) // self.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[CaptionBatch]:
        """The batches of an epoch from a step on, in its order: `parts` of them each step, some of them perhaps
        without images; an image with more than K captions shows K drawn ones."""
        order = EpochOrder(len(self.data), self.seed, epoch, self.shuffle)

        def shares() -> Iterator[np.ndarray]:
            for begin in range(first_step, len(self), _STEPS_AT_ONCE):
                some = order[begin * self.batch_size : (begin + _STEPS_AT_ONCE) * self.batch_size]
                for start in range(0, len(some), self.batch_size):
                    split = np.array_split(some[start : start + self.batch_size], self.ranks.world * self.parts)
                    yield from split[self.ranks.rank * self.parts :][: self.parts]

        return self._batches(shares(), epoch)

    def in_order(self) -> Iterator[CaptionBatch]:
        """All images in the order of the store, with their first K captions; of several processes each has its
        share of the batches."""
        starts = range(self.ranks.rank * self.batch_size, len(self.data), self.ranks.world * self.batch_size)
        return self._batches((np.arange(s, min(s + self.batch_size, len(self.data))) for s in starts), None)

    def _batches(self, parts: Iterator[np.ndarray], epoch: int | None) -> Iterator[CaptionBatch]:
        pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        ahead: deque[Future[CaptionBatch]] = deque()
        try:
            for part in parts:
                ahead.append(pool.submit(self._load, part, epoch))
                if len(ahead) > _BATCHES_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, images: np.ndarray, epoch: int | None) -> CaptionBatch:
        rows = self.data.rows[images]
        store = self.data.store
        drawn = epoch is not None and len(store.views) > 1
        views = choose_views(len(store.views), self.seed, epoch or 0, rows) if drawn else None
        # Checked: under a hundredth of a step's time, in a thread beside it, and a flipped bit trains nothing.
        grids = torch.from_numpy(store.rows(rows, views=views, check=True)).flatten(1, 2)
        encoded = []
        for image, row in zip(images, rows, strict=True):
            captions = self.data.captions[image]
            if epoch is None:
                chosen = list(range(min(len(captions), self.per_image)))
            else:
                chosen = choose_captions(len(captions), self.per_image, self.seed, epoch, int(row))
            encoded.append([self.vocabulary.encode(captions[i], self.max_length) for i in chosen])
        tokens = pad_captions(encoded, self.per_image)
        batch = CaptionBatch(images, grids, tokens, (tokens[..., 1:] != PAD).flatten().nonzero()[:, 0])
        return batch.pinned() if self.pin else batch
