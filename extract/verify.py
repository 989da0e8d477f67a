"""Verification of a feature store: all checksums, consistency with the plan, and a sanity check of every row."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gridcap.common.errors import StoreAccessError, StoreError
from gridcap.common.files import sha256_of
from gridcap.common.store.header import HEADER_BYTES, format_of
from gridcap.common.store.index_reader import read_index
from gridcap.common.store.shard_format import read_header
from gridcap.common.store.shard_reader import ShardReader
from gridcap.common.store.system_error import store_error_from
from gridcap.common.text import plural
from gridcap.extract.plan import FILE, Plan, read_plan, store_folder

INDEX_CHECK = "index complete"
READABLE_CHECK = "shard readable"
PLAN_CHECK = "belongs to the plan"
ROWS_CHECK = "rows and image ids"
PROVENANCE_CHECK = "provenance"
FILE_CHECK = "whole-file SHA-256"
CHECKSUM_CHECK = "row CRC-32"
FINITE_CHECK = "no NaN or infinity"
NONZERO_CHECK = "no row all zero"
CAPTIONS_CHECK = "image ids of the captions file"
CHECKS = (  # in the order of the table
    INDEX_CHECK,
    READABLE_CHECK,
    PLAN_CHECK,
    ROWS_CHECK,
    PROVENANCE_CHECK,
    FILE_CHECK,
    CHECKSUM_CHECK,
    FINITE_CHECK,
    NONZERO_CHECK,
    CAPTIONS_CHECK,
)
MAX_EXAMPLES = 5


@dataclass(frozen=True)
class Problem:
    """A problem of a store.

    Attributes:
        check: one of CHECKS.
        shard: file name of the shard, or "" for the store as a whole.
        detail: description.
    """

    check: str
    shard: str
    detail: str


@dataclass
class Report:
    """Result of a verification.

    Attributes:
        checked: check -> number of shards, rows, or ids checked.
        problems: the problems.
        rows, valid: number of rows and of valid rows in all readable shards.
    """

    checked: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    rows: int = 0
    valid: int = 0

    def note(self, check: str, count: int, shard: str, problem: str | None) -> None:
        """Count a check; `problem` is a description, or None if the check passed."""
        self.checked[check] += count
        if problem is not None:
            self.problems.append(Problem(check, shard, problem))


def verify_store(
    path: Path, captions_ids: Collection[int] | None = None, on_shard: Callable[[int], object] | None = None
) -> Report:
    """Verify a store. All files are read twice, for the checksums of files and of rows.

    The shards of the plan must exist, and the index must agree with them. A store without an index is incomplete; its
    existing shards are verified.

    Args:
        path: the index file.
        captions_ids: expected image ids, from a captions file.
        on_shard: called after each shard with its number of rows.

    Raises:
        StoreError: the plan is missing or corrupted, or `path` is not an index.
        StoreAccessError: the system could not read a file.
    """
    folder, plan = store_folder(path), plan_of(path)
    report = Report()
    index = _verify_index(path, plan, report)
    for shard in range(plan.shards):
        _verify_shard(folder, plan, shard, index, report)
        if on_shard is not None:
            on_shard(len(plan.rows_of(shard)))
    if captions_ids is not None:
        stored = {image_id for shard in range(plan.shards) for image_id, _ in plan.images_of(shard, folder)}
        _compare_ids(stored, set(captions_ids), report)
    return report


def plan_of(path: Path) -> Plan:
    """Return the plan of a store.

    Raises:
        StoreError: there is no such store, or its plan is missing or corrupted.
    """
    folder = store_folder(path)
    if not (folder / FILE).exists():
        if not path.is_file():
            code = errno.EISDIR if path.is_dir() else errno.ENOENT
            raise store_error_from(OSError(code, os.strerror(code)), path)
        raise StoreError(
            f"{path}: {folder / FILE} does not exist, so this is not a store written by gridcap extract or import",
            "pass the index file of a store, next to the folder of its shards",
        )
    return read_plan(folder)


@dataclass(frozen=True)
class _Index:
    """Shards and rows as recorded in the index."""

    sha256: dict[str, str]
    valid: np.ndarray
    invalid_reasons: dict[int, str]


def _verify_index(path: Path, plan: Plan, report: Report) -> _Index | None:
    """Verify the index against the plan; return None if it is missing, corrupted, or belongs to another plan."""
    try:
        index = read_index(path)
    except (StoreError, FileNotFoundError) as error:
        if not path.exists():  # not written yet, or just deleted by a worker that adds shards
            report.note(INDEX_CHECK, 1, "", f"{path}: the index does not exist, so the store is incomplete")
            return None
        if isinstance(error, StoreAccessError | FileNotFoundError):
            raise
        if format_of(path) is None:  # not an index of gridcap, so --repair must not delete it
            raise
        report.note(FILE_CHECK, 1, "", error.message)
        return None
    report.note(FILE_CHECK, 1, "", None)
    if index.plan not in plan.digests:
        report.note(PLAN_CHECK, 1, "", f"{path}: the index belongs to another plan")
        return None
    report.note(PLAN_CHECK, 1, "", None)
    incomplete = f"{path}: images have been appended, but not all of them are complete"
    report.note(INDEX_CHECK, 1, "", incomplete if index.plan != plan.digest() else None)
    folder = store_folder(path)
    same_images = _has_planned_images(plan, folder, index.image_id, index.file_name)
    report.note(ROWS_CHECK, 1, "", None if same_images else f"{path}: the images differ from those of the plan")
    names = [os.path.relpath(path.parent / name, folder) for name in index.shard_names]
    outside = next((name for name in names if name.startswith("..")), None)
    renamed = f"{path}: its shards are in {(folder / outside).parent}; a store cannot be renamed" if outside else None
    report.note(ROWS_CHECK, 0, "", renamed)
    return _Index(dict(zip(names, index.shard_sha256, strict=True)), index.valid, index.invalid_reasons)


def _has_planned_images(plan: Plan, folder: Path, ids: np.ndarray, names: Sequence[str]) -> bool:
    """Return whether the index lists the images of the plan, up to the end of a shard."""
    shards = [shard for shard in range(plan.shards) if plan.rows_of(shard).stop <= len(ids)]
    if not shards or plan.rows_of(shards[-1]).stop != len(ids):
        return False
    for shard in shards:
        rows = slice(plan.rows_of(shard).start, plan.rows_of(shard).stop)
        if list(zip(ids[rows].tolist(), names[rows], strict=True)) != plan.images_of(shard, folder):
            return False
    return True


def _verify_shard(folder: Path, plan: Plan, shard: int, index: _Index | None, report: Report) -> None:
    name, images = plan.shard_name(shard), plan.images_of(shard, folder)
    try:
        info = read_header(folder / name)
        reader = ShardReader(folder / name)
        same_rows = list(zip(reader.image_id.tolist(), reader.file_name, strict=True)) == images
        same_source = reader.provenance == plan.provenance
    except StoreAccessError:  # the shard may be intact, so --repair must not delete it
        raise
    except (StoreError, ValueError) as error:
        report.note(READABLE_CHECK, 1, name, str(error))
        return
    with reader:
        report.note(READABLE_CHECK, 1, name, None)
        same_plan = (reader.plan, reader.index) == (plan.digest_of(shard), shard)
        report.note(PLAN_CHECK, 1, name, None if same_plan else "written by another plan")
        report.note(ROWS_CHECK, 1, name, None if same_rows else "the images differ from those of the plan")
        report.note(PROVENANCE_CHECK, 1, name, None if same_source else "the provenance differs from that of the plan")
        problem = None
        if info is None:
            problem = "no header: rewritten by another program"
        elif sha256_of(folder / name, HEADER_BYTES) != info.sha256:
            problem = "differs from the checksum in the header"
        report.note(FILE_CHECK, 1, name, problem)
        if index is not None and info is not None and problem is None and same_plan and name in index.sha256:
            same = index.sha256[name] == info.sha256 and _agrees(index, reader, plan.rows_of(shard))
            report.note(PLAN_CHECK, 0, "", None if same else f"{name}: differs from the index")
        _verify_rows(reader, name, report)


def _agrees(index: _Index, reader: ShardReader, rows: range) -> bool:
    """Return whether the index and a shard record the same invalid images."""
    reasons = {row - rows.start: reason for row, reason in index.invalid_reasons.items() if row in rows}
    return reasons == reader.invalid_reasons and bool((index.valid[rows.start : rows.stop] == reader.valid).all())


def _verify_rows(reader: ShardReader, name: str, report: Report) -> None:
    """Verify the checksum and the values of every row."""
    failed: dict[str, list[int]] = {CHECKSUM_CHECK: [], FINITE_CHECK: [], NONZERO_CHECK: []}
    grid = np.empty(reader.shape[1:], reader.dtype)
    for view in reader.views:
        checksums = reader.checksums[view]
        for row in range(len(reader)):
            if reader.row_crc32(row, view) != checksums[row]:
                failed[CHECKSUM_CHECK].append(row)
                continue
            reader.read_row(row, grid, view)
            if reader.valid[row] and not np.isfinite(grid).all():
                failed[FINITE_CHECK].append(row)
            elif reader.valid[row] and not grid.any():
                failed[NONZERO_CHECK].append(row)
    report.rows += len(reader)
    report.valid += int(reader.valid.sum())
    for check, rows in failed.items():
        problem = f"rows {rows[:MAX_EXAMPLES]}{' ...' if len(rows) > MAX_EXAMPLES else ''}" if rows else None
        report.note(check, len(reader) * len(reader.views), name, problem)


def _compare_ids(stored: set[int], expected: set[int], report: Report) -> None:
    """Compare the image ids of the store with those of the captions file."""
    missing, extra = len(expected - stored), len(stored - expected)
    problem = (
        f"{plural(missing, 'image')} of the captions file missing in the store, "
        f"{plural(extra, 'image')} of the store missing in the captions file"
    )
    report.note(CAPTIONS_CHECK, len(expected), "", problem if missing or extra else None)
