"""Write stage of the extraction: the order of the batches, and the threads that write shards.

One thread keeps up with an encoder on the CPU. A GPU produces grids faster than one thread can write, verify, and
checksum them, so several shards are written at a time, each by a thread of its own.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gridcap.common.store.codecs import find_codec
from gridcap.common.store.shard_writer import ShardWriter
from gridcap.extract.cluster.share import own_cores
from gridcap.extract.plan import Plan, check_plan_on_disk, shard_writer
from gridcap.extract.staging import PendingGrids

MAX_WRITERS = 8


@dataclass(frozen=True)
class Batch:
    """Rows `start` to `stop` of the store, all in one shard.

    Attributes:
        shard: number of the shard.
        start, stop: rows, counted over the store.
        writer: number of the thread that writes the shard.
    """

    shard: int
    start: int
    stop: int
    writer: int = 0


def batches_of(plan: Plan, shards: Iterable[int], writers: int = 1) -> Iterator[Batch]:
    """Yield the batches of up to `writers` shards at a time, round robin; a finished shard makes room for the next."""
    remaining = deque(shards)
    open_shards: dict[int, deque[Batch]] = {}
    while remaining or open_shards:
        for writer in range(writers):
            if writer not in open_shards:
                if not remaining:
                    continue
                rows = plan.rows_of(shard := remaining.popleft())
                starts = range(rows.start, rows.stop, plan.batch_size)
                open_shards[writer] = deque(
                    Batch(shard, start, min(rows.stop, start + plan.batch_size), writer) for start in starts
                )
            yield open_shards[writer].popleft()
            if not open_shards[writer]:
                del open_shards[writer]


def writer_count(on_gpu: bool, shards: int) -> int:
    """Return the number of shards to write at a time."""
    return max(1, min(MAX_WRITERS, own_cores(os.environ) // 2, shards)) if on_gpu else 1


class ShardWriterThread:
    """Threads that write batches, in order, into shards, one shard after the other.

    While one thread writes a shard, another one finishes the previous shard: it flushes the shard, reads it back, and
    computes its SHA-256.

    Args:
        folder: folder of the shards.
        plan: plan of the store.

    Attributes:
        finished: number of finished shards.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan = folder, plan
        self._compressed = find_codec(plan.provenance["dtype"]).compressed
        self._thread = ThreadPoolExecutor(1, "write")
        self._finisher = ThreadPoolExecutor(1, "write-finish")
        self._finishing: Future[None] | None = None
        self._open: ShardWriter | None = None
        self._batch_size = plan.batch_size
        self._failed = False
        self.finished = 0

    def write(self, batch: Batch, grids: dict[str, PendingGrids], invalid: dict[int, str]) -> Future[None]:
        """Queue a batch; the last batch of a shard finishes it. After a failure, queued batches are dropped.

        Args:
            batch: next batch of its shard.
            grids: view -> grids (B, *grid).
            invalid: row of the store -> reason.
        """
        return self._thread.submit(self._write_unless_failed, batch, grids, invalid)

    def drain(self) -> None:
        """Wait until all queued batches are written and all complete shards are finished.

        Raises:
            Exception: the error of the last shard.
        """
        self._thread.submit(self._wait_for_previous).result()

    def close(self) -> None:
        """Stop the threads and remove an unfinished shard."""
        self._thread.shutdown(cancel_futures=True)
        self._finisher.shutdown()  # a complete shard is not abandoned
        self._abandon()

    def _write_unless_failed(self, batch: Batch, grids: dict[str, PendingGrids], invalid: dict[int, str]) -> None:
        if self._failed:
            return
        try:
            self._write(batch, grids, invalid)
        except BaseException:
            self._failed = True
            self._abandon()
            raise

    def _write(self, batch: Batch, grids: dict[str, PendingGrids], invalid: dict[int, str]) -> None:
        rows = self._plan.rows_of(batch.shard)
        if self._finishing is not None and self._finishing.done():
            self._wait_for_previous()  # raises its error, if any
        if self._open is None:
            if self._compressed:  # free disk space was checked for one uncompressed shard
                self._wait_for_previous()
            self._open = shard_writer(self._folder, self._plan, batch.shard)
            self._batch_size = self._plan.batch_size
        local = {row - rows.start: reason for row, reason in invalid.items()}
        for view, pending in grids.items():
            self._open.write(batch.start - rows.start, pending.result(), local, view)
            self._batch_size = min(self._batch_size, pending.batch_size or self._batch_size)
        if batch.stop == rows.stop:
            self._wait_for_previous()
            writer, self._open = self._open, None
            self._finishing = self._finisher.submit(self._finish, writer, batch.shard, self._batch_size)

    def _wait_for_previous(self) -> None:
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            finishing.result()

    def _finish(self, writer: ShardWriter, shard: int, batch_size: int) -> None:
        try:
            check_plan_on_disk(self._plan, shard, self._folder)
            writer.finish(batch_size)
        except BaseException:
            writer.__exit__(OSError, None, None)  # removes the temporary file, without hiding this error
            raise
        self.finished += 1

    def _abandon(self) -> None:
        """Remove the temporary file of an unfinished shard, without hiding the error that came before."""
        writer, self._open = self._open, None
        if writer is not None:
            writer.__exit__(OSError, None, None)
