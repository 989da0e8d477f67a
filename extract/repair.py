"""Repair of a feature store: deletion of corrupted files."""

from __future__ import annotations

from pathlib import Path

from gridcap.extract.plan import store_folder
from gridcap.extract.verify import CAPTIONS_CHECK, INDEX_CHECK, NONZERO_CHECK, Report

# Deleting a file does not help: images are missing, the captions are of other images, or the grid would be zero again.
_NOT_REPAIRABLE = (INDEX_CHECK, CAPTIONS_CHECK, NONZERO_CHECK)


def find_corrupted(path: Path, report: Report) -> list[Path]:
    """Return the existing files that must be recreated: the index, if it or a shard is corrupted, and shards.

    Args:
        path: the index file.
        report: from `verify_store`.
    """
    problems = [problem for problem in report.problems if problem.check not in _NOT_REPAIRABLE]
    shards = sorted({problem.shard for problem in problems if problem.shard})
    files = [path, *(store_folder(path) / shard for shard in shards)] if problems else []
    return [file for file in files if file.exists()]


def repair_store(path: Path, report: Report) -> list[Path]:
    """Delete corrupted shards, and the index with them, so that a rerun of the extraction recreates only those.

    Args:
        path: the index file.
        report: from `verify_store`.

    Returns:
        The deleted files.
    """
    corrupted = find_corrupted(path, report)
    for file in corrupted:  # the index first: its presence means that the store is complete
        file.unlink()
    return corrupted
