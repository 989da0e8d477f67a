"""Result of an extraction run."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Summary:
    """Result of a run.

    Attributes:
        images, shards: size of the whole store.
        existing: shards of this process that were complete before the run.
        written: shards that this run wrote.
        complete: whether the index is written; if not, other processes still have shards to write.
        seconds: duration of the run without planning.
        invalid: number of invalid images by reason, in the whole store or, if it is not complete, in this process's
            shards.
        examples: first file names by reason, if the store is complete.
        encoded: images that went through the encoder.
        running: seconds from the first image to the last.
        waiting: seconds of `running` in which the encoder waited for images or for shards to be written.
        retried: invalid images that `--retry-invalid` turned into valid ones.
    """

    images: int
    shards: int
    existing: int = 0
    written: int = 0
    complete: bool = True
    seconds: float = 0.0
    invalid: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    encoded: int = 0
    running: float = 0.0
    waiting: float = 0.0
    retried: int = 0


class Stopwatch:
    """Accumulates the time spent in `with` blocks of one thread.

    Attributes:
        seconds: time so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
