"""The stream of training batches, with prefetching.

The unit is an image with its K captions: its grid is read and transferred once and serves all K captions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from gridcap.common.config.train import Shuffle
from gridcap.common.resources import fit_in_memory
from gridcap.common.store.shard_format import ORIGINAL
from gridcap.train.data.batch import CaptionBatch, pad_captions
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.order import EpochOrder
from gridcap.train.data.vocabulary import PAD, Vocabulary
from gridcap.train.engine.distributed import SINGLE_PROCESS, Ranks

PREFETCH_BATCHES = 3
_STEPS_PER_ORDER_CALL = 64  # computing the order has a fixed cost of about 0.5 ms per call


@dataclass(frozen=True)
class StreamOptions:
    """Options of `CaptionStream`.

    Attributes:
        batch_size: images per step, over all ranks and accumulation steps together.
        captions_per_image: K.
        max_length: maximum caption length in tokens.
        seed: seed of the epoch order and of the sampling of captions and views.
        shuffle: "rows" or "blocks"; see `EpochOrder`.
        ranks: rank and world size of this process.
        grad_accum_steps: batches into which a rank splits its images of a step.
        pin_memory: return batches in pinned memory.
    """

    batch_size: int
    captions_per_image: int
    max_length: int
    seed: int = 0
    shuffle: Shuffle = "rows"
    ranks: Ranks = SINGLE_PROCESS
    grad_accum_steps: int = 1
    pin_memory: bool = False


@dataclass(frozen=True)
class CaptionStream:
    """Batches of a data set, from any step of any epoch, prefetched by a thread.

    A step consists of `batch_size` consecutive images of the epoch order, however they are split over ranks and
    accumulation steps. The split therefore does not change what is learned.

    Attributes:
        data: images with captions.
        vocabulary: vocabulary that encodes the captions.
        options: batch size, captions per image, and order.
    """

    data: CaptionedImages
    vocabulary: Vocabulary
    options: StreamOptions
    _encoded: dict[int, list[np.ndarray]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        """Return the number of steps per epoch."""
        return -(-len(self.data) // self.options.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[CaptionBatch]:
        """Iterate over the batches of an epoch.

        Each step yields `grad_accum_steps` batches, which may be empty. Images with more than K captions contribute
        K sampled ones.

        Args:
            epoch: epoch number.
            first_step: step to start from.
        """
        return self._prefetch(self._epoch_indices(epoch, first_step), epoch)

    def in_order(self) -> Iterator[CaptionBatch]:
        """Iterate over this rank's share of all images, in store order, with the first K captions of each."""
        size, ranks = self.options.batch_size, self.options.ranks
        starts = range(ranks.rank * size, len(self.data), ranks.world_size * size)
        return self._prefetch((np.arange(s, min(s + size, len(self.data))) for s in starts), None)

    def _epoch_indices(self, epoch: int, first_step: int) -> Iterator[np.ndarray]:
        size, ranks, parts = self.options.batch_size, self.options.ranks, self.options.grad_accum_steps
        order = EpochOrder(len(self.data), self.options.seed, epoch, self.options.shuffle)
        for begin in range(first_step, len(self), _STEPS_PER_ORDER_CALL):
            indices = order[begin * size : (begin + _STEPS_PER_ORDER_CALL) * size]
            for start in range(0, len(indices), size):
                split = np.array_split(indices[start : start + size], ranks.world_size * parts)
                yield from split[ranks.rank * parts :][:parts]

    def _prefetch(self, indices: Iterator[np.ndarray], epoch: int | None) -> Iterator[CaptionBatch]:
        pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        pending: deque[Future[CaptionBatch]] = deque()
        ahead = fit_in_memory(PREFETCH_BATCHES, self._batch_bytes())
        try:
            for images in indices:
                pending.append(pool.submit(self._load, images, epoch))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _batch_bytes(self) -> int:
        """Return the size of the grids of the largest batch of this rank."""
        store, options = self.data.store, self.options
        images = -(-options.batch_size // (options.ranks.world_size * options.grad_accum_steps))
        return int(images * np.prod(store.grid_shape) * store.dtype.itemsize)

    def _load(self, images: np.ndarray, epoch: int | None) -> CaptionBatch:
        """Read a batch; an epoch of None selects the first captions and the original views."""
        rows = self.data.rows[images]
        store, k = self.data.store, self.options.captions_per_image
        views: str | np.ndarray = ORIGINAL
        if epoch is not None and len(store.views) > 1:
            views = sample_views(len(store.views), self.options.seed, epoch, rows)
        # Verifying checksums takes under 1% of the step time, in this thread.
        grids = torch.from_numpy(store.rows(rows, views=views, verify=True)).flatten(1, 2)
        encoded = []
        for image, row in zip(images, rows, strict=True):
            captions = self.data.captions[image]
            if epoch is None:
                chosen = list(range(min(len(captions), k)))
            else:
                chosen = sample_captions(len(captions), k, self.options.seed, epoch, int(row))
            tokens_of = self._encode(int(image))
            encoded.append([tokens_of[i] for i in chosen])
        tokens = pad_captions(encoded, k)
        batch = CaptionBatch(images, grids, tokens, (tokens[..., 1:] != PAD).flatten().nonzero()[:, 0])
        return batch.pin_memory() if self.options.pin_memory else batch

    def _encode(self, image: int) -> list[np.ndarray]:
        """Return the token ids of an image's captions; computed once, because a segmenter takes 0.1 ms per caption."""
        tokens = self._encoded.get(image)
        if tokens is None:
            captions = self.data.captions[image]
            tokens = [np.array(self.vocabulary.encode(text, self.options.max_length), np.int32) for text in captions]
            self._encoded[image] = tokens
        return tokens


def sample_captions(available: int, count: int, seed: int, epoch: int, row: int) -> list[int]:
    """Return the indices of an image's captions that an epoch uses, sampled without replacement.

    All captions are used if there are at most `count`.
    """
    if available <= count:
        return list(range(available))
    return np.random.default_rng([seed, epoch, row, 0xCA]).choice(available, count, replace=False).tolist()  # type: ignore[no-any-return]


def sample_views(views: int, seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """Sample one stored view (original or mirrored) per image and epoch.

    Args:
        views: number of views.
        seed: seed of the run.
        epoch: epoch number.
        rows: (B,) rows of the store.

    Returns:
        (B,) int64 view indices; those of a row do not depend on the other rows.
    """
    return np.array([np.random.default_rng([seed, epoch, int(row), 0x71E3]).integers(views) for row in rows], np.int64)
