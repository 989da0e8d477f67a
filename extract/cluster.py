"""Which shards are mine: the work splits by itself from the environment, with no server and no lock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """One worker's part of the shards: every `workers`-th, from its own number on.

    It depends on nothing but the two numbers, so that workers that start at different times agree.
    """

    worker: int = 0
    workers: int = 1

    def of(self, shards: int) -> range:
        """The numbers of this worker's shards out of `shards`."""
        return range(self.worker, shards, self.workers)


WHOLE = Share()
