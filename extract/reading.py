"""Read stage of the extraction: decode the images of batches ahead of the encoder, in a pool of threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from gridcap.common.device import choose_device
from gridcap.common.errors import ExtractionError, ReadError
from gridcap.common.image import (
    InvalidImageError,
    load_image,
    load_views,
    make_square,
    make_views,
    min_decoded_side,
)
from gridcap.common.resources import PHOTO_BYTES, fit_in_memory
from gridcap.common.retry import retry_transient_errors
from gridcap.common.sources.registry import ImageFile, open_source
from gridcap.extract.cluster.share import own_cores
from gridcap.extract.encoding import decoded_views
from gridcap.extract.images.decoders import decoder_of
from gridcap.extract.images.nvjpeg import load_images_gpu
from gridcap.extract.images.turbo import decode_turbo
from gridcap.extract.job import Extraction
from gridcap.extract.summary import Stopwatch
from gridcap.extract.writer import Batch

BATCHES_AHEAD = 3
MAX_IMAGES_PER_TASK = 8  # handing a task to a thread takes about as long as a hundredth of its work
DEFAULT_CPU_WORKERS = 4  # more would slow an encoder on the same CPU down

T = TypeVar("T")


@dataclass(frozen=True)
class LoadedImages:
    """Decoded images.

    Attributes:
        images: uint8 (V, B, side, side, 3), the originals and their decoded views; zeros for invalid images.
        invalid: position in the batch -> reason.
    """

    images: np.ndarray | Tensor
    invalid: dict[int, str]


def worker_count(extraction: Extraction, on_gpu: bool) -> int:
    """Return the number of decoding threads: one per core next to a GPU, a few next to an encoder on the CPU.

    Unless the user sets it, the memory limits it too: each thread holds a decoded photo.
    """
    if extraction.config.extract.num_workers is not None:
        return extraction.config.extract.num_workers
    if on_gpu and decoder_of(extraction.plan.provenance) != "nvjpeg":
        return fit_in_memory(max(DEFAULT_CPU_WORKERS, own_cores(os.environ)), PHOTO_BYTES)
    return fit_in_memory(DEFAULT_CPU_WORKERS, PHOTO_BYTES)


class ImageReader:
    """Decodes images of a planned store by their rows.

    Use as a context manager, which stops the threads.

    Args:
        extraction: the extraction.
        side: side of the decoded images in pixels.
        num_workers: number of threads.

    Attributes:
        waiting: time that `batches` waited for images.
    """

    def __init__(self, extraction: Extraction, side: int, num_workers: int) -> None:
        self._extraction, self._side = extraction, side
        self._config, self._plan = extraction.config, extraction.plan
        preprocessing = extraction.plan.provenance["preprocessing"]
        self._resize_mode: str = preprocessing["resize_mode"]
        self._scaled_decoding = preprocessing.get("jpeg_scaled_decoding", False)
        self._views = decoded_views(extraction.plan.provenance["views"])
        self._decoder = decoder_of(extraction.plan.provenance)
        self._num_workers = num_workers
        self._source = open_source(extraction.images, self._config.data.follow_links)
        self._pool = ThreadPoolExecutor(num_workers, "read")
        self.waiting = Stopwatch()

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batches(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, LoadedImages]]:
        """Yield batches with their images, in order; decoding runs ahead by a few batches."""
        pending: deque[tuple[Batch, Callable[[], LoadedImages]]] = deque()
        ahead = fit_in_memory(BATCHES_AHEAD, self._plan.batch_size * 3 * self._side**2 * (1 + len(self._views)))

        def collect() -> tuple[Batch, LoadedImages]:
            batch, load = pending.popleft()
            with self.waiting:
                return batch, load()

        for batch in batches:
            pending.append((batch, self.submit(range(batch.start, batch.stop), batch.shard)))
            if len(pending) > ahead:
                yield collect()
        while pending:
            yield collect()

    def submit(self, rows: Sequence[int], shard: int) -> Callable[[], LoadedImages]:
        """Start to decode rows of a shard; the returned function waits for the images.

        On the CPU, each task decodes a few images into their place in the batch; nvJPEG decodes a whole batch and
        leaves it on the GPU.
        """
        images_of_shard, first = self._plan.images_of(shard, self._extraction.folder), self._plan.rows_of(shard).start
        names = [images_of_shard[row - first][1] for row in rows]
        if self._decoder == "nvjpeg":
            return self._pool.submit(self._load_on_gpu, names).result
        images = np.empty((1 + len(self._views), len(rows), self._side, self._side, 3), np.uint8)
        size = max(1, min(MAX_IMAGES_PER_TASK, len(rows) // (2 * self._num_workers)))

        def load(start: int) -> dict[int, str]:
            invalid: dict[int, str] = {}
            for position, name in enumerate(names[start : start + size], start):
                image = self._load(name)
                images[:, position] = 0 if isinstance(image, str) else image
                if isinstance(image, str):
                    invalid[position] = image
            return invalid

        futures = [self._pool.submit(load, start) for start in range(0, len(rows), size)]

        def collect() -> LoadedImages:
            invalid: dict[int, str] = {}
            for future in futures:
                invalid |= future.result()
            return LoadedImages(images, invalid)

        return collect

    def file_name(self, row: int, shard: int) -> str:
        """Return the file name of a row of the store."""
        return self._plan.images_of(shard, self._extraction.folder)[row - self._plan.rows_of(shard).start][1]

    def _load(self, name: str) -> np.ndarray | str:
        """Return an image and its decoded views, (V, side, side, 3), or the reason why it is invalid."""
        path = self._path(name)
        if isinstance(path, str):
            return path
        resize_mode, scaled = self._resize_mode, self._scaled_decoding
        try:
            if self._decoder == "turbo" and (image := self._decode_turbo(path, name)) is not None:
                return image
            if self._views:
                return _retry(lambda: load_views(path, self._side, resize_mode, scaled, self._views, name), path)
            return _retry(lambda: load_image(path, self._side, resize_mode, scaled), path)[None]
        except InvalidImageError as error:
            return str(error)

    def _decode_turbo(self, path: ImageFile, name: str) -> np.ndarray | None:
        """Return an image and its decoded views, (V, side, side, 3), or None if Pillow must decode the file."""
        min_side = min_decoded_side(self._side, self._views) if self._scaled_decoding else None
        if (pixels := decode_turbo(path, min_side)) is None:
            return None
        if not self._views:
            return make_square(pixels, self._side, self._resize_mode)[None]
        image = Image.fromarray(pixels)
        return make_views(image, self._side, self._resize_mode, self._views, name)

    def _path(self, name: str) -> ImageFile | str:
        """Return the file of an image, or the reason why it is invalid."""
        try:
            return self._source.locate(name)
        except InvalidImageError as error:
            return str(error)

    def _load_on_gpu(self, names: Sequence[str]) -> LoadedImages:
        results = [self._path(name) for name in names]
        paths = [path if isinstance(path, Path) else None for path in results]
        device, resize_mode = choose_device(self._config.extract.device), self._resize_mode
        images, invalid = _retry(
            lambda: load_images_gpu(paths, self._side, resize_mode, device), self._extraction.images
        )
        unread = {position: reason for position, reason in enumerate(results) if isinstance(reason, str)}
        return LoadedImages(images[None], invalid | unread)


def _retry(read: Callable[[], T], path: ImageFile) -> T:
    """Call `read`, repeatedly if the file system reports an error that may pass.

    Raises:
        ExtractionError: the error persists; names the file and the system's error.
    """
    try:
        return retry_transient_errors(read, str(path))
    except ReadError as error:
        raise ExtractionError(error.message, f"{error.hint}; finished shards are kept") from error
