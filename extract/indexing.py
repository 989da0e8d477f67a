"""The index of a store: the plan that it was written for, writing it when all shards exist, and its summary."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from gridcap.common.errors import MismatchError, StoreAccessError, StoreError
from gridcap.common.files import temporary_file
from gridcap.common.store.index_reader import read_index_plan
from gridcap.common.store.reader import FeatureStore
from gridcap.extract.job import Extraction
from gridcap.extract.plan import read_plan, write_planned_index
from gridcap.extract.summary import Summary

MAX_EXAMPLES = 3
INDEX_ATTEMPTS = 5
LISTING_ATTEMPTS = 2
LISTING_INTERVAL = 1.0  # seconds


def indexed_digest(extraction: Extraction) -> str | None:
    """Return the digest of the plan that the index was written for, or None if there is no index.

    The digest is that of this plan, or of this plan before or after images were appended. Another process may remove or
    replace the index at any time.

    Raises:
        MismatchError: the index belongs to another store.
        StoreError: the index is corrupted.
    """
    output, plan = extraction.output, extraction.plan
    for attempt in range(INDEX_ATTEMPTS):
        if not output.exists():
            return None
        try:
            digest = read_index_plan(output)
            break
        except (StoreError, OSError):
            if attempt == INDEX_ATTEMPTS - 1 and output.exists():
                raise
            _pause(attempt)
    else:
        return None
    # Another process may have appended images since this one read the plan, and written the index.
    known = plan.digests if digest in plan.digests else read_plan(extraction.folder).digests
    if not {digest, plan.digest()} <= set(known):
        raise MismatchError(
            f"{output}: does not belong to the store planned in {extraction.folder}",
            f"choose another --output, or delete {output}",
        )
    return digest


def refresh_listings(folders: Iterable[Path]) -> None:
    """Make this client of a network file system discard its cached listings of existing folders."""
    for folder in folders:
        if folder.is_dir():
            with temporary_file(folder / "listing") as temporary:
                temporary.touch()


def all_shards_exist(extraction: Extraction, is_shared: bool) -> bool:
    """Return whether all shards exist.

    On a network file system, a client may list a folder from its cache without the last shards of other machines. If
    the processes that finish last all saw such a list, none of them would write the index. Creating a file changes the
    folder, which makes the client discard its cached listing.

    Args:
        extraction: the extraction.
        is_shared: whether other processes write shards of this store.
    """
    plan, folder = extraction.plan, extraction.folder
    for attempt in range(LISTING_ATTEMPTS if is_shared else 1):
        if len(plan.existing_shards(folder)) == plan.shards:
            return True
        if is_shared:
            refresh_listings(folder / subfolder for subfolder in plan.folders)
            if attempt > 0:
                time.sleep(LISTING_INTERVAL)
    return len(plan.existing_shards(folder)) == plan.shards


def write_index(extraction: Extraction, summary: Summary, is_shared_retry: bool) -> None:
    """Write the index and check that it matches its shards.

    While other processes retry invalid images, they replace shards: each process whose index does not match writes it
    again, and the last one matches. A process that finishes at the same time may replace the index by an identical
    one while it is being read; then it is read again.

    Args:
        extraction: the extraction, all of whose shards exist.
        summary: receives the invalid images of the store; incomplete if other processes keep replacing shards.
        is_shared_retry: whether other processes retry invalid images at the same time.
    """
    written = False
    for attempt in range(INDEX_ATTEMPTS):
        try:
            if is_shared_retry or not written:
                write_planned_index(extraction.output, extraction.plan)
                written = True
            summarize_store(extraction, summary)
            return
        except StoreError as error:
            is_last = attempt == INDEX_ATTEMPTS - 1
            if is_last and (not is_shared_retry or isinstance(error, StoreAccessError)):
                raise
            _pause(attempt)
    summary.complete = False


def summarize_store(extraction: Extraction, summary: Summary) -> None:
    """Count the invalid images of a complete store by reason, with examples."""
    with FeatureStore(extraction.output) as store:
        summary.invalid = Counter(store.invalid_reasons.values())
        for row, reason in store.invalid_reasons.items():
            if len(examples := summary.examples.setdefault(reason, [])) < MAX_EXAMPLES:
                examples.append(store.file_name[row])


def _pause(attempt: int) -> None:
    time.sleep(random.uniform(0, 0.2 * attempt))
