"""Cache of open shards with a bounded number of open files."""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gridcap.common.open_files import raise_open_file_limit
from gridcap.common.store.pinned_file import open_lock
from gridcap.common.store.shard_reader import ShardReader
from gridcap.common.store.shard_table import ShardTable

MAX_OPEN_SHARDS = 256


class OpenShards:
    """Readers of the shards of a store, of which at most `max_open` keep their file open between reads.

    It can be pickled and survives a fork.

    Args:
        table: the shards.

    Attributes:
        max_open: number of shards that one read may use at the same time.
    """

    def __init__(self, table: ShardTable) -> None:
        # A quarter of the limit of open files: several threads may read at once, and other code opens files too.
        self.max_open = max(1, min(MAX_OPEN_SHARDS, raise_open_file_limit() // 4))
        self._table = table
        self._readers: dict[int, ShardReader] = {}
        self._open: OrderedDict[int, None] = OrderedDict()  # shards with an open file, least recently used first
        self._in_use: dict[int, int] = {}  # shard -> number of reads that use it
        self._lock, self._process = threading.Lock(), os.getpid()

    @contextmanager
    def borrow(self, shards: Sequence[int]) -> Iterator[dict[int, ShardReader]]:
        """Keep the readers of some shards open during a block.

        Args:
            shards: at most `max_open` different ones.

        Returns:
            A context manager that yields shard -> reader.
        """
        borrowed: dict[int, ShardReader] = {}
        try:
            with self._locked():
                for shard in dict.fromkeys(shards):
                    if shard not in self._readers:
                        self._readers[shard] = self._table.open(shard)
                    borrowed[shard] = self._readers[shard]
                    self._open[shard] = None
                    self._open.move_to_end(shard)
                    self._in_use[shard] = self._in_use.get(shard, 0) + 1
                self._close_idle(len(self._open) - self.max_open)
            yield borrowed
        finally:
            with self._locked():
                for shard in borrowed:
                    self._in_use[shard] -= 1
                    if not self._in_use[shard]:
                        del self._in_use[shard]

    def _locked(self) -> threading.Lock:
        """Return the lock of this process.

        After a fork it is recreated, and no shard is in use: threads of the parent process do not exist in the child.
        """
        if self._process != os.getpid():
            with open_lock():
                if self._process != os.getpid():
                    self._lock, self._in_use = threading.Lock(), {}
                    self._process = os.getpid()
        return self._lock

    def _close_idle(self, count: int) -> None:
        """Close up to `count` shards that are not in use, least recently used first."""
        idle = itertools.filterfalse(self._in_use.get, self._open)
        for shard in list(itertools.islice(idle, max(0, count))):
            self._readers[shard].close()
            del self._open[shard]

    def close(self) -> None:
        """Close the files of all shards that are not in use. The next read opens them again."""
        with self._locked():
            self._close_idle(len(self._open))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_in_use": {}, "_lock": None, "_process": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _process=os.getpid())
