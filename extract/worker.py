"""The extraction pipeline: read ‖ encode ‖ write, three stages with bounded queues between them.

A pool of threads decodes images some batches ahead; this thread encodes; other threads write, check and name the
shards (`writers.py`). Memory holds a few batches for each.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gridcap.common.config import PipelineConfig, max_invalid_count
from gridcap.common.device import choose_device, cores
from gridcap.common.errors import ExtractionError, MismatchError
from gridcap.common.image import InvalidImageError, image_path, load_image
from gridcap.common.progress import progress_bar
from gridcap.common.store.shard import ORIGINAL, InvalidGridError, ShardReader, read_dtype
from gridcap.extract.cluster.share import Share
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.weights import WeightsIdentity
from gridcap.extract.images.nvjpeg import load_images_gpu
from gridcap.extract.manifest import Image
from gridcap.extract.plan import Plan, shard_writer
from gridcap.extract.staging import PendingGrids
from gridcap.extract.writer import Batch, ShardWriterThread, batches_of, writer_count

_BATCHES_AHEAD = 3
_FEW_READERS = 4
# Seconds that a thread may keep Python from the others. A reader asks for it after each of an image's five calls of the
# operating system, and at Python's 5 ms it would wait for longer than a GPU needs for fifty images.
_SHORT_TURNS = 1e-4
_A_FEW = 10


_Loaded = tuple[np.ndarray | Tensor, dict[int, str]]  # (B, side, side, 3), and place -> reason of what is no image


@dataclass
class Summary:
    """What a run did.

    Attributes:
        images, shards: of the whole store.
        done_before: shards of this worker that were there already.
        made: shards that this run made.
        complete: whether the index is written; if not, other workers still have shards to make.
        seconds: this run took, without planning.
        rejects: reason -> count, over the whole store; over this worker's shards if it is not complete.
        examples: reason -> the first file names, of a complete store.
        encoded: images that went through the encoder.
        running: seconds from the first image to the last.
        waiting: of these, those in which the encoder waited for images to be read or shards to be written.
        retried: rejected images that this run made good, if it was asked to.
    """

    images: int
    shards: int
    done_before: int = 0
    made: int = 0
    complete: bool = True
    seconds: float = 0.0
    rejects: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    encoded: int = 0
    running: float = 0.0
    waiting: float = 0.0
    retried: int = 0


@dataclass(frozen=True)
class Job:
    """One extraction: where the images are and which, where the store goes, and its plan."""

    images: Path
    records: Iterable[Image]
    output: Path
    folder: Path
    plan: Plan
    identity: WeightsIdentity


def _explained(method: Callable[[Worker, list[int]], None]) -> Callable[[Worker, list[int]], None]:
    """Turn a value that cannot be stored into an error for the user."""

    @functools.wraps(method)
    def explained(self: Worker, shards: list[int]) -> None:
        try:
            method(self, shards)
        except InvalidGridError as error:
            hint = "store float32 instead: --dtype float32, into another --output"
            raise ExtractionError(str(error), hint) from error

    return explained


class Worker:
    """Makes shards: the three stages and what they share."""

    def __init__(
        self, config: PipelineConfig, job: Job, plan: Plan, share: Share, summary: Summary, progress: bool
    ) -> None:
        self._config, self._job, self._plan, self._summary, self._progress = config, job, plan, summary, progress
        self._rows = sum(len(plan.rows_of(shard)) for shard in share.of(plan.shards))
        # A small share is not stopped by a few bad images that the whole store would allow.
        max_invalid = config.data.max_invalid
        self._limit = max(
            max_invalid_count(max_invalid, self._rows), min(_A_FEW, max_invalid_count(max_invalid, plan.images))
        )
        self._views: list[str] = plan.provenance["views"]
        self._built: GridEncoder | None = None

    @_explained
    def make(self, shards: list[int]) -> None:
        """Make these shards."""
        self._check_limit(None)
        encoder = self._encoder()
        plan, summary, todo = self._plan, self._summary, sum(len(self._plan.rows_of(s)) for s in shards)
        on_gpu = choose_device(self._config.extract.device).type == "cuda"
        writers = [ShardWriterThread(self._job.folder, plan) for _ in range(writer_count(on_gpu, len(shards)))]
        readers = ThreadPoolExecutor(self._readers(on_gpu), "read")
        bar = progress_bar(
            total=self._rows, initial=self._rows - todo, unit="image", desc=plan.split, disable=not self._progress
        )
        begin = time.perf_counter()
        done = 0
        turns = sys.getswitchinterval()
        if on_gpu:
            sys.setswitchinterval(_SHORT_TURNS)
        try:
            writes: deque[Future[None]] = deque()
            for batch, images, rejects in self._read_ahead(shards, len(writers), encoder.side, readers):
                summary.rejects.update(rejects.values())
                self._check_limit(next(iter(rejects), None), batch)
                writes.append(writers[batch.writer].write(batch, self._encode(images), rejects))
                with self._waiting():
                    while len(writes) > _BATCHES_AHEAD * len(writers):
                        writes.popleft().result()
                bar.update(len(images))
                done += len(images)
                summary.made = sum(writer.finished for writer in writers)
                if batch.stop == plan.rows_of(shards[0]).stop and len(shards) > 1:
                    took = time.perf_counter() - begin
                    said = f"first shard after {_duration(took)}; about {_duration(took / done * (todo - done))}"
                    tqdm.write(f"{said} for the rest", file=sys.stderr)
            while writes:
                writes.popleft().result()
            summary.made = sum(writer.finished for writer in writers)
        finally:
            sys.setswitchinterval(turns)
            bar.close()
            readers.shutdown(cancel_futures=True)
            for writer in writers:
                writer.end()
        summary.running += time.perf_counter() - begin

    def _readers(self, on_gpu: bool) -> int:
        """Threads that decode images: a GPU wants more of them than the few that a CPU which encodes can spare."""
        readers = self._config.extract.num_workers
        if readers is not None:
            return readers
        return max(_FEW_READERS, cores()) if on_gpu and self._config.extract.jpeg_decoder == "pillow" else _FEW_READERS

    @_explained
    def retry(self, shards: list[int]) -> None:
        """Try the rejected images of these shards again; a shard is written anew if one of them is good now."""
        rejected = self._summary.rejects.total()
        with (
            ThreadPoolExecutor(self._readers(on_gpu=False), "read") as pool,
            progress_bar(total=rejected, unit="image", desc="retry", disable=not self._progress) as bar,
        ):
            for shard in shards:
                with ShardReader(self._job.folder / self._plan.shard_name(shard)) as reader:
                    changed = False
                    for batch in batches_of(self._plan, [shard]) if reader.rejects else ():
                        changed |= any(
                            not isinstance(new, str) or new != reader.rejects[row]
                            for row, new in self._load_again(batch, reader, pool).items()
                        )
                    if changed:
                        self._rewrite(shard, reader, pool)
                    bar.update(len(reader.rejects))

    def _load_again(self, batch: Batch, reader: ShardReader, pool: ThreadPoolExecutor) -> dict[int, np.ndarray | str]:
        """Row of the shard -> image or reason, for the rejected rows of a batch."""
        first, side = self._plan.rows_of(batch.shard).start, self._encoder().side
        rows = [row for row in range(batch.start - first, batch.stop - first) if row in reader.rejects]
        images, rejects = self._begin_to_load([first + row for row in rows], batch.shard, side, pool)()
        there = images.cpu().numpy() if isinstance(images, Tensor) else images
        return {row: rejects.get(place, there[place]) for place, row in enumerate(rows)}

    def _rewrite(self, shard: int, reader: ShardReader, pool: ThreadPoolExecutor) -> None:
        """Write a shard anew with the images that are good now; its other rows are copied byte by byte."""
        first = self._plan.rows_of(shard).start
        with shard_writer(self._job.folder, self._plan, shard) as writer:
            for batch in batches_of(self._plan, [shard]):
                loaded = self._load_again(batch, reader, pool)
                rows = range(batch.start - first, batch.stop - first)
                good = {row - rows.start: image for row, image in loaded.items() if isinstance(image, np.ndarray)}
                if good:  # in a batch of the same size, each at its own place: so they get the bytes of a first run
                    images = np.zeros((len(rows), *next(iter(good.values())).shape), np.uint8)
                    for place, image in good.items():
                        images[place] = image
                    for view, pending in self._encode(images).items():
                        grids = pending.result()
                        for place in good:
                            writer.write(rows[place], grids[place : place + 1], {}, view)
                for place, row in enumerate(rows):
                    if place not in good:
                        reason = loaded.get(row)
                        writer.copy(row, reader, reason if isinstance(reason, str) else None)
                self._summary.retried += len(good)
            # Before and after: its hash of this shard will be wrong, and another worker may be writing it right now.
            self._job.output.unlink(missing_ok=True)
            writer.finish()
            self._job.output.unlink(missing_ok=True)

    def _encoder(self) -> GridEncoder:
        """The encoder, built when the first image needs it.

        Raises:
            MismatchError: this machine would not compute as the store was begun.
        """
        if self._built is not None:
            return self._built
        check_arithmetic(self._job, self._plan)
        extract, provenance = self._config.extract, self._plan.provenance
        if provenance["threads"]:
            torch.set_num_threads(provenance["threads"])
        returned = read_dtype(np.dtype(extract.dtype)).name  # the shard's writer makes the 8 bits of uint8
        compiled, batch_size = bool(provenance["compile"]), self._plan.batch_size
        options = EncoderOptions(extract.precision, extract.device, returned, compiled, batch_size)
        self._built = GridEncoder(extract.encoder, self._job.identity, options)
        return self._built

    def _encode(self, images: np.ndarray | Tensor) -> dict[str, PendingGrids]:
        """(B, side, side, 3) -> for each view (B, *grid), which a GPU may still be computing."""
        encoder = self._encoder()
        self._summary.encoded += len(images)
        return {view: encoder.submit(images if view == ORIGINAL else _mirrored(images)) for view in self._views}

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count the time in this block as the encoder's waiting."""
        begin = time.perf_counter()
        yield
        self._summary.waiting += time.perf_counter() - begin

    def _check_limit(self, row: int | None, batch: Batch | None = None) -> None:
        bad, max_invalid = self._summary.rejects, self._config.data.max_invalid
        if bad.total() <= self._limit:
            return
        worst = ", ".join(f"{count} x {why}" for why, count in bad.most_common(3))
        shown = f" ({self._job.images / self._name(row, batch.shard)})" if row is not None and batch else ""
        raise ExtractionError(
            f"{self._job.images}: {bad.total()} of {self._rows} images are invalid, more than {max_invalid}: "
            f"{worst}{shown}",
            "check the image folder and the list, or allow more with --max-invalid",
        )

    def _name(self, row: int, shard: int) -> str:
        return self._plan.images_of(shard, self._job.folder)[row - self._plan.rows_of(shard).start][1]

    def _load(self, row: int, shard: int, side: int) -> np.ndarray | str:
        """An image, or the reason why it is none."""
        path = self._path(row, shard)
        try:
            return path if isinstance(path, str) else load_image(path, side, self._config.extract.resize_mode)
        except InvalidImageError as error:
            return str(error)

    def _path(self, row: int, shard: int) -> Path | str:
        """Where an image is, or the reason why it is not read."""
        try:
            return image_path(self._job.images, self._name(row, shard), self._config.data.follow_links)
        except InvalidImageError as error:
            return str(error)

    def _read_ahead(
        self, shards: list[int], writers: int, side: int, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Batch, np.ndarray | Tensor, dict[int, str]]]:
        """Decoded batches in order, with the reasons of refused rows (whose image is all zero), read some ahead."""
        ahead: deque[tuple[Batch, Callable[[], _Loaded]]] = deque()

        def collect() -> tuple[Batch, np.ndarray | Tensor, dict[int, str]]:
            batch, begun = ahead.popleft()
            with self._waiting():
                images, rejects = begun()
            return batch, images, {batch.start + place: why for place, why in rejects.items()}

        for batch in batches_of(self._plan, shards, writers):
            ahead.append((batch, self._begin_to_load(range(batch.start, batch.stop), batch.shard, side, pool)))
            if len(ahead) > _BATCHES_AHEAD:
                yield collect()
        while ahead:
            yield collect()

    def _begin_to_load(
        self, rows: Sequence[int], shard: int, side: int, pool: ThreadPoolExecutor
    ) -> Callable[[], _Loaded]:
        """Begin to load rows of the store; what is returned waits for them.

        With Pillow each image by a thread; nvJPEG decodes many files at once, and leaves them on the GPU.
        """
        if self._config.extract.jpeg_decoder == "nvjpeg":
            return pool.submit(self._load_many, rows, shard, side).result
        futures = [pool.submit(self._load, row, shard, side) for row in rows]

        def collect() -> _Loaded:
            images = np.zeros((len(futures), side, side, 3), np.uint8)
            rejects: dict[int, str] = {}
            for place, future in enumerate(futures):
                image = future.result()
                if isinstance(image, str):
                    rejects[place] = image
                else:
                    images[place] = image
            return images, rejects

        return collect

    def _load_many(self, rows: Sequence[int], shard: int, side: int) -> _Loaded:
        found = [self._path(row, shard) for row in rows]
        device, resize_mode = choose_device(self._config.extract.device), self._config.extract.resize_mode
        paths = [path if isinstance(path, Path) else None for path in found]
        images, rejects = load_images_gpu(paths, side, resize_mode, device)
        return images, rejects | {place: why for place, why in enumerate(found) if isinstance(why, str)}


def _mirrored(images: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """(B, H, W, 3) from right to left."""
    return images.flip(2) if isinstance(images, Tensor) else np.ascontiguousarray(images[:, :, ::-1])


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def check_arithmetic(job: Job, plan: Plan) -> None:
    """Make sure that this machine computes as the store was begun.

    Raises:
        MismatchError: in another precision, or with other library versions.
    """
    begun, here = plan.provenance["precision"], job.plan.provenance["precision"]
    if begun != here:
        raise MismatchError(
            f"{job.folder}: begun in {begun}, and auto means {here} on this machine",
            f"finish it with --precision {begun}, or delete the folder to begin again",
        )
    if differing := _version_changes(plan, job.plan):
        raise MismatchError(
            f"{job.folder}: begun with other library versions: {differing}",
            "install those versions to finish it, or delete the folder to begin again",
        )


def _version_changes(kept: Plan, wanted: Plan) -> str:
    """Library versions that differ: two halves of one store must come from the same libraries."""
    old, new = kept.provenance["versions"], wanted.provenance["versions"]
    return ", ".join(
        f"{k} {old.get(k, 'none')} there, {new.get(k, 'none')} here"
        for k in sorted({*old, *new})
        if old.get(k) != new.get(k)
    )
