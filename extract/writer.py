"""The write stage of the extraction: which batches come when, and the threads that make shards of their grids.

One thread is enough beside a CPU that encodes; a GPU makes grids faster than one thread can write, check and hash them,
so there several shards grow at a time, each in a writer of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gridcap.common.device import cores
from gridcap.common.store.shard import ShardWriter
from gridcap.extract.plan import Plan, shard_writer
from gridcap.extract.staging import PendingGrids

MAX_WRITERS = 8


@dataclass(frozen=True)
class Batch:
    """Rows `start` to `stop` of the store, all in one shard, and the writer of the thread that writes that shard."""

    shard: int
    start: int
    stop: int
    writer: int = 0


def batches_of(plan: Plan, shards: Iterable[int], writers: int = 1) -> Iterator[Batch]:
    """The batches of so many shards at a time, one of each in turn; a shard that ends makes room for the next."""
    todo = deque(shards)
    begun: dict[int, deque[Batch]] = {}
    while todo or begun:
        for writer in range(writers):
            if writer not in begun:
                if not todo:
                    continue
                rows = plan.rows_of(shard := todo.popleft())
                starts = range(rows.start, rows.stop, plan.batch_size)
                begun[writer] = deque(Batch(shard, s, min(rows.stop, s + plan.batch_size), writer) for s in starts)
            yield begun[writer].popleft()
            if not begun[writer]:
                del begun[writer]


def writer_count(on_gpu: bool, shards: int) -> int:
    """How many shards are written at a time."""
    return max(1, min(MAX_WRITERS, cores() // 2, shards)) if on_gpu else 1


class ShardWriterThread:
    """A thread that turns batches, in their order, into finished shards, one after the other.

    Args:
        folder: of the shards.
        plan: theirs.

    Attributes:
        finished: shards.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan = folder, plan
        self._thread = ThreadPoolExecutor(1, "write")
        self._open: ShardWriter | None = None
        self._failed = False
        self.finished = 0

    def write(self, batch: Batch, grids: dict[str, PendingGrids], rejects: dict[int, str]) -> Future[None]:
        """Have one batch written when its grids are there; the last of a shard finishes it. After a failure no more.

        Args:
            batch: the next of its shard.
            grids: view -> (B, *grid).
            rejects: row of the store -> reason.
        """
        return self._thread.submit(self._write_unless_failed, batch, grids, rejects)

    def end(self) -> None:
        """Stop; what is not finished is removed."""
        self._thread.shutdown(cancel_futures=True)
        self._abandon()

    def _write_unless_failed(self, batch: Batch, grids: dict[str, PendingGrids], rejects: dict[int, str]) -> None:
        if self._failed:
            return
        try:
            self._write(batch, grids, rejects)
        except BaseException:
            self._failed = True
            self._abandon()
            raise

    def _write(self, batch: Batch, grids: dict[str, PendingGrids], rejects: dict[int, str]) -> None:
        rows = self._plan.rows_of(batch.shard)
        if self._open is None:
            self._open = shard_writer(self._folder, self._plan, batch.shard)
        local = {row - rows.start: why for row, why in rejects.items()}
        for view, pending in grids.items():
            self._open.write(batch.start - rows.start, pending.result(), local, view)
        if batch.stop == rows.stop:
            self._open.finish()
            self._open = None
            self.finished += 1

    def _abandon(self) -> None:
        """Remove an unfinished shard's temporary file. What closing it raises says no more than what came before."""
        writer, self._open = self._open, None
        if writer is not None:
            writer.__exit__(OSError, None, None)
