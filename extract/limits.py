"""The limit on invalid images."""

from __future__ import annotations

from collections import Counter

from gridcap.common.config import max_invalid_count
from gridcap.common.errors import ExtractionError
from gridcap.extract.cluster.share import Share
from gridcap.extract.job import Extraction

MIN_INVALID_PER_SHARE = 10
MAX_REASONS = 3
MIN_ALL_INVALID = 10  # with this many images, all of them invalid, a higher limit would not help


class InvalidImageLimit:
    """Stops an extraction with too many invalid images.

    Args:
        extraction: the extraction.
        share: shards of this process. A small share may have a few invalid images if the whole store may.
    """

    def __init__(self, extraction: Extraction, share: Share) -> None:
        plan = extraction.plan
        self._images = extraction.images
        self._max_invalid = extraction.config.data.max_invalid
        self._total = sum(len(plan.rows_of(shard)) for shard in share.of(plan.shards))
        self._limit = max(
            max_invalid_count(self._max_invalid, self._total),
            min(MIN_INVALID_PER_SHARE, max_invalid_count(self._max_invalid, plan.images)),
        )

    def check(self, invalid: Counter[str], read: int, example: str | None = None) -> None:
        """Check the number of invalid images by reason.

        Args:
            invalid: reason -> number of images.
            read: number of images so far, both valid and invalid.
            example: file name of one of them.

        Raises:
            ExtractionError: there are too many.
        """
        if invalid.total() <= self._limit:
            return
        reasons = ", ".join(f"{count} x {reason}" for reason, count in invalid.most_common(MAX_REASONS))
        shown = f" ({self._images / example})" if example is not None else ""
        all_invalid = invalid.total() == read >= MIN_ALL_INVALID
        raise ExtractionError(
            f"{self._images}: {invalid.total()} of {self._total} images are invalid, more than {self._max_invalid}: "
            f"{reasons}{shown}",
            "check the image folder and the list" + ("" if all_invalid else ", or raise --max-invalid"),
        )
