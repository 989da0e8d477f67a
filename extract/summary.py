"""Result of an extraction run."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

BUSY = 0.9  # from this share of the time on, the encoder is the bottleneck


class Bottleneck(Enum):
    """A stage of the extraction."""

    FORWARD = "bound by the forward pass"
    DECODING = "bound by decoding"
    DISK = "bound by the disk"
    HOST = "bound by the thread that launches the forward pass"


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
        waiting_for_images: seconds of `running` in which the encoder waited for decoded images.
        waiting_for_writes: seconds of `running` in which the encoder waited for batches to be written.
        gpu_seconds: seconds of `running` in which the GPU computed, measured with CUDA events; None on a CPU.
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
    waiting_for_images: float = 0.0
    waiting_for_writes: float = 0.0
    gpu_seconds: float | None = None
    retried: int = 0

    @property
    def encoder_busy(self) -> float:
        """Share of `running` in which the encoder computed."""
        waiting = self.waiting_for_images + self.waiting_for_writes
        busy = self.running - waiting if self.gpu_seconds is None else self.gpu_seconds
        return min(1.0, max(0.0, busy / self.running))

    @property
    def bottleneck(self) -> Bottleneck:
        """The stage that the others wait for."""
        if self.encoder_busy >= BUSY:
            return Bottleneck.FORWARD
        if self.waiting_for_images + self.waiting_for_writes < (1 - BUSY) * self.running:
            return Bottleneck.HOST
        return Bottleneck.DECODING if self.waiting_for_images > self.waiting_for_writes else Bottleneck.DISK


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
