"""Repair of a feature store: deletion of corrupted files."""

from __future__ import annotations

from pathlib import Path

from gridcap.extract.plan import store_folder
from gridcap.extract.verify import CAPTIONS_CHECK, INDEX_CHECK, Report


def repair_store(path: Path, report: Report) -> list[Path]:
    """Delete corrupted shards, and the index with them, so that a rerun of the extraction recreates only those.

    Args:
        path: the index file.
        report: from `verify_store`.

    Returns:
        The deleted files.
    """
    folder = store_folder(path)
    corrupted = [folder / name for name in report.broken_shards]
    not_repairable = (INDEX_CHECK, CAPTIONS_CHECK)  # deleting the index would not help
    index_is_wrong = any(not problem.shard and problem.check not in not_repairable for problem in report.problems)
    if corrupted or index_is_wrong:
        corrupted.append(path)
    existing = [file for file in corrupted if file.exists()]
    for file in reversed(existing):  # the index first: its presence means that the store is complete
        file.unlink()
    return existing
