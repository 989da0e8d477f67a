"""Retry invalid images: rewrite the shards whose invalid images can be read now."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from gridcap.common.progress import progress_bar
from gridcap.common.store.shard_reader import ShardReader
from gridcap.common.store.shard_writer import ShardWriter
from gridcap.extract.encoding import ViewEncoder
from gridcap.extract.job import Extraction
from gridcap.extract.plan import shard_writer
from gridcap.extract.reading import ImageReader, worker_count
from gridcap.extract.summary import Summary
from gridcap.extract.worker import explain_errors
from gridcap.extract.writer import Batch, batches_of


def retry_invalid(
    extraction: Extraction, encoder: ViewEncoder, shards: Iterable[int], summary: Summary, show_progress: bool
) -> None:
    """Read the invalid images of these shards again, and rewrite a shard if an image or a reason has changed.

    Raises:
        ExtractionError: a read error, or a value that the dtype cannot store.
        OutOfMemoryError: no memory is left.
    """
    total = summary.invalid.total()
    with (
        explain_errors(extraction),
        progress_bar(total=total, unit="image", desc="retry", disable=not show_progress) as bar,
    ):
        if not total:
            return
        with ImageReader(extraction, encoder.side, worker_count(extraction, on_gpu=False)) as reader:
            for shard in shards:
                with ShardReader(extraction.folder / extraction.plan.shard_name(shard)) as stored:
                    rewriter = _ShardRetry(extraction, shard, stored, reader)
                    if stored.invalid_reasons and rewriter.has_changed():
                        summary.retried += rewriter.rewrite(encoder)
                    bar.update(len(stored.invalid_reasons))


class _ShardRetry:
    """One shard and its invalid images.

    Args:
        extraction: the extraction.
        shard: number of the shard.
        stored: reader of the shard.
        reader: reader of the images.
    """

    def __init__(self, extraction: Extraction, shard: int, stored: ShardReader, reader: ImageReader) -> None:
        self._extraction, self._plan = extraction, extraction.plan
        self._shard, self._stored, self._reader = shard, stored, reader
        self._first = self._plan.rows_of(shard).start
        self._batch_size = stored.batch_size or self._plan.batch_size

    def has_changed(self) -> bool:
        """Return whether an image can be read now or is invalid for another reason."""
        return any(
            not isinstance(image, str) or image != self._stored.invalid_reasons[row]
            for batch in batches_of(self._plan, [self._shard])
            for row, image in self._load(batch).items()
        )

    def rewrite(self, encoder: ViewEncoder) -> int:
        """Write the shard again with the images that are valid now and copies of its other rows.

        Returns:
            Number of images that are valid now.
        """
        valid = 0
        with shard_writer(self._extraction.folder, self._plan, self._shard) as writer:
            for batch in batches_of(self._plan, [self._shard]):
                valid += self._rewrite_batch(batch, writer, encoder)
            # The index contains the old checksum of this shard. It is removed before and after the replacement,
            # since another process may be writing it at the same time.
            self._extraction.output.unlink(missing_ok=True)
            writer.finish(self._batch_size)
            self._extraction.output.unlink(missing_ok=True)
        return valid

    def _rewrite_batch(self, batch: Batch, writer: ShardWriter, encoder: ViewEncoder) -> int:
        loaded = self._load(batch)
        rows = range(batch.start - self._first, batch.stop - self._first)
        valid = {row - rows.start: image for row, image in loaded.items() if isinstance(image, np.ndarray)}
        if valid:
            # The batch has its original size and order, and is computed in as many parts, so that the grids are
            # byte-identical to those of a first run.
            views, *square = next(iter(valid.values())).shape
            images = np.zeros((views, len(rows), *square), np.uint8)
            for position, image in valid.items():
                images[:, position] = image
            for view, pending in encoder.submit(images, self._batch_size).items():
                grids = pending.result()
                self._batch_size = min(self._batch_size, pending.batch_size or self._batch_size)
                for position in valid:
                    writer.write(rows[position], grids[position : position + 1], {}, view)
        for position, row in enumerate(rows):
            if position not in valid:
                reason = loaded.get(row)
                writer.copy(row, self._stored, reason if isinstance(reason, str) else None)
        return len(valid)

    def _load(self, batch: Batch) -> dict[int, np.ndarray | str]:
        """Read the invalid rows of a batch again: row of the shard -> image (V, side, side, 3) or reason."""
        rows = [
            row
            for row in range(batch.start - self._first, batch.stop - self._first)
            if row in self._stored.invalid_reasons
        ]
        if not rows:
            return {}
        loaded = self._reader.submit([self._first + row for row in rows], self._shard)()
        images = loaded.images.cpu().numpy() if isinstance(loaded.images, Tensor) else loaded.images
        return {row: loaded.invalid.get(position, images[:, position]) for position, row in enumerate(rows)}
