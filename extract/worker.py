"""The extraction loop: read, encode, and write, three stages with bounded queues between them.

A pool of threads decodes images a few batches ahead (`reading.py`); this thread encodes (`encoding.py`); other threads
write, verify, and rename the shards (`writer.py`). Memory holds a few batches per stage.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from tqdm import tqdm

from gridcap.common.device import choose_device
from gridcap.common.errors import ExtractionError, OutOfMemoryError, explain_out_of_memory
from gridcap.common.progress import progress_bar
from gridcap.common.resources import fit_in_memory
from gridcap.common.store.shard_writer import InvalidGridError
from gridcap.common.text import format_duration
from gridcap.extract.cluster.share import Share
from gridcap.extract.encoding import ViewEncoder
from gridcap.extract.job import Extraction
from gridcap.extract.limits import InvalidImageLimit
from gridcap.extract.reading import BATCHES_AHEAD, ImageReader, worker_count
from gridcap.extract.summary import Stopwatch, Summary
from gridcap.extract.writer import Batch, ShardWriterThread, batches_of, writer_count

# Seconds that a thread may hold the GIL while others wait. A decoding thread requests it after each of the five system
# calls per image; with Python's default of 5 ms it would wait longer than a GPU needs for fifty images.
GPU_SWITCH_INTERVAL = 1e-4


class Worker:
    """Writes shards.

    Args:
        extraction: the extraction, whose plan is on disk.
        encoder: its encoder.
        share: shards of this process.
        summary: updated during the run.
        show_progress: show a progress bar over the images.
    """

    def __init__(
        self, extraction: Extraction, encoder: ViewEncoder, share: Share, summary: Summary, show_progress: bool
    ) -> None:
        self._extraction, self._encoder, self._share, self._summary = extraction, encoder, share, summary
        self._show_progress = show_progress
        self._limit = InvalidImageLimit(extraction, share)
        self._write_wait = Stopwatch()
        self._read = 0

    def write_shards(self, shards: Sequence[int]) -> None:
        """Read, encode, and write these shards.

        Raises:
            ExtractionError: too many invalid images, a read error, or a value that the dtype cannot store.
            OutOfMemoryError: no memory is left.
        """
        extraction, rows_of = self._extraction, self._extraction.plan.rows_of
        own = self._share.of(extraction.plan.shards)
        self._read = sum(len(rows_of(shard)) for shard in own) - sum(len(rows_of(shard)) for shard in shards)
        self._limit.check(self._summary.invalid, self._read)
        on_gpu = choose_device(extraction.config.extract.device).type == "cuda"
        start = time.perf_counter()
        with (
            explain_errors(extraction),
            ImageReader(extraction, self._encoder.side, worker_count(extraction, on_gpu)) as reader,
            _writer_threads(extraction, self._count_writers(on_gpu, len(shards))) as writers,
            _switch_interval(on_gpu),
            _Progress(extraction, self._share, shards, self._show_progress) as progress,
        ):
            start = time.perf_counter()
            self._run(shards, reader, writers, progress)
        summary = self._summary
        summary.waiting_for_images += reader.waiting.seconds
        summary.waiting_for_writes += self._write_wait.seconds
        summary.gpu_seconds = self._encoder.gpu_seconds
        summary.running += time.perf_counter() - start

    def _count_writers(self, on_gpu: bool, shards: int) -> int:
        """Return the number of shards to write at a time, whose pending grids fit in memory."""
        plan = self._extraction.plan
        grid_bytes = math.prod(plan.provenance["grid_shape"]) * 4 * len(plan.provenance["views"])
        return fit_in_memory(writer_count(on_gpu, shards), BATCHES_AHEAD * plan.batch_size * grid_bytes)

    def _run(
        self,
        shards: Sequence[int],
        reader: ImageReader,
        writers: list[ShardWriterThread],
        progress: _Progress,
    ) -> None:
        summary = self._summary
        writes: deque[Future[None]] = deque()
        try:
            for batch, loaded in reader.batches(batches_of(self._extraction.plan, shards, len(writers))):
                invalid = {batch.start + position: reason for position, reason in loaded.invalid.items()}
                summary.invalid.update(invalid.values())
                example = next((reader.file_name(row, batch.shard) for row in invalid), None)
                self._read += batch.stop - batch.start
                self._limit.check(summary.invalid, self._read, example)
                writes.append(writers[batch.writer].write(batch, self._encoder.submit(loaded.images), invalid))
                with self._write_wait:
                    while len(writes) > BATCHES_AHEAD * len(writers):
                        writes.popleft().result()
                progress.update(batch)
            with self._write_wait:
                while writes:
                    writes.popleft().result()
                for writer in writers:
                    writer.drain()
        finally:
            summary.written = sum(writer.finished for writer in writers)


class _Progress:
    """A progress bar over this process's images, and one line with the estimated time after the first shard."""

    def __init__(self, extraction: Extraction, share: Share, shards: Sequence[int], show: bool) -> None:
        plan = extraction.plan
        self._remaining = sum(len(plan.rows_of(shard)) for shard in shards)
        self._first_stop = plan.rows_of(shards[0]).stop if len(shards) > 1 else -1
        total = sum(len(plan.rows_of(shard)) for shard in share.of(plan.shards))
        self._bar = progress_bar(
            total=total, initial=total - self._remaining, unit="image", desc=plan.split, disable=not show
        )
        self._start = time.perf_counter()
        self._done = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, batch: Batch) -> None:
        """Count an encoded batch."""
        images = batch.stop - batch.start
        self._bar.update(images)
        self._done += images
        self._remaining -= images
        if batch.stop == self._first_stop:
            elapsed = time.perf_counter() - self._start
            rest = format_duration(elapsed / self._done * self._remaining)
            tqdm.write(f"first shard after {format_duration(elapsed)}; about {rest} for the rest", file=sys.stderr)


@contextlib.contextmanager
def _writer_threads(extraction: Extraction, count: int) -> Iterator[list[ShardWriterThread]]:
    writers = [ShardWriterThread(extraction.folder, extraction.plan) for _ in range(count)]
    try:
        yield writers
    finally:
        for writer in writers:
            writer.close()


@contextlib.contextmanager
def _switch_interval(on_gpu: bool) -> Iterator[None]:
    previous = sys.getswitchinterval()
    if on_gpu:
        sys.setswitchinterval(GPU_SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(previous)


@contextlib.contextmanager
def explain_errors(extraction: Extraction) -> Iterator[None]:
    """Turn a value that cannot be stored, and a lack of memory, into errors for the user.

    Raises:
        ExtractionError: a grid has a value that the dtype cannot store.
        OutOfMemoryError: no memory is left.
    """
    try:
        yield
    except InvalidGridError as error:
        raise ExtractionError(str(error), _range_hint(extraction)) from error
    except Exception as error:
        if (explained := explain_out_of_memory(error)) is None:
            raise
        # The general hint, to lower --batch-size, does not always help: a store with shards keeps its batch size.
        has_shards = bool(extraction.plan.existing_shards(extraction.folder))
        smaller = "start a new --output with a smaller --batch-size" if has_shards else "use a smaller --batch-size"
        raise OutOfMemoryError(
            f"{explained.message} (batch size {extraction.plan.batch_size})",
            "free memory or raise its limit (ulimit -v, container, Slurm --mem), and rerun the command; or use fewer "
            f"--num-workers; or {smaller}",
        ) from error


def _range_hint(extraction: Extraction) -> str:
    provenance = extraction.plan.provenance
    if provenance["dtype"] != "float32":
        return "store float32 instead: --dtype float32, with another --output"
    if provenance["precision"] != "float32":
        return "the encoder computed NaN or infinity: pass --precision float32, with another --output"
    return "the encoder computed NaN or infinity: check the file passed with --weights"
