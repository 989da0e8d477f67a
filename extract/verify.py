"""Verify a feature store: every byte against its checksums, every row against sense, and repair what is broken."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gridcap.common.errors import StoreAccessError, StoreError
from gridcap.common.files import sha256_of
from gridcap.common.store.header import HEADER_BYTES, format_of
from gridcap.common.store.index_reader import read_index
from gridcap.common.store.shard_format import read_header
from gridcap.common.store.shard_reader import ShardReader
from gridcap.extract.plan import FILE, Plan, read_plan, store_folder

CAPTIONS_CHECK = "image ids of the captions file"
INDEX_CHECK = "index complete"
# All checks, in the order of the table.
CHECKS = (
    INDEX_CHECK,
    "shard readable",
    "belongs to the plan",
    "rows and image ids",
    "provenance",
    "whole-file SHA-256",
    "row CRC-32",
    "no NaN or infinity",
    "no row all zero",
    CAPTIONS_CHECK,
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        check: one of CHECKS.
        shard: the shard's file name, or "" for the store as a whole.
        detail: what exactly.
    """

    check: str
    shard: str
    detail: str


@dataclass
class Report:
    """What a verification found.

    Attributes:
        checked: check -> how many shards, rows or ids went through it.
        problems: what is wrong.
        rows, valid: over all readable shards.
    """

    checked: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    rows: int = 0
    valid: int = 0

    def note(self, check: str, count: int, shard: str, detail: str | None) -> None:
        """Count a check; `detail` is what was wrong, or None."""
        self.checked[check] += count
        if detail is not None:
            self.problems.append(Problem(check, shard, detail))

    @property
    def broken_shards(self) -> list[str]:
        """The shards that must be made again."""
        return sorted({problem.shard for problem in self.problems if problem.shard})


def verify_store(
    path: Path, captions_ids: Collection[int] | None = None, on_shard: Callable[[int], object] | None = None
) -> Report:
    """Check a store from end to end; everything is read twice, once for the file hashes and once by rows.

    The plan says what must be there, the index what was there when the store became complete. A store whose index
    is missing is incomplete, and what there is of it is checked.

    Args:
        path: the index file.
        captions_ids: image ids that the store should have, from a captions file.
        on_shard: called after each shard with its number of rows.

    Raises:
        StoreError: neither an index nor a plan is there, or one of them is unreadable.
    """
    folder, plan = store_folder(path), plan_of(path)
    report = Report()
    index = _read_index(path, plan, report) if path.exists() else None
    if not path.exists():
        report.note(INDEX_CHECK, 1, "", f"{path}: the index is missing: the store is not complete")
    for shard in range(plan.shards):
        _verify_shard(folder, plan, shard, index, report)
        if on_shard is not None:
            on_shard(len(plan.rows_of(shard)))
    if captions_ids is not None:
        stored = {image_id for shard in range(plan.shards) for image_id, _ in plan.images_of(shard, folder)}
        _compare_ids(stored, set(captions_ids), report)
    return report


def plan_of(path: Path) -> Plan:
    """The plan of a store.

    Raises:
        StoreError: there is none, or it is unreadable.
    """
    folder = store_folder(path)
    if not (folder / FILE).exists():
        raise StoreError(
            f"{path}: has no plan ({folder / FILE}), so it is no store of extract-features or import-features",
            "give the index file that one of them wrote, beside the folder of its shards",
        )
    return read_plan(folder)


@dataclass(frozen=True)
class _Index:
    """What the index says of its shards and rows."""

    hashes: dict[str, str]
    valid: np.ndarray
    rejects: dict[int, str]


def _read_index(path: Path, plan: Plan, report: Report) -> _Index | None:
    """What the index says, after comparing it with its own hash and with the plan; None if it is not sound."""
    folder = store_folder(path)
    try:
        index = read_index(path)
    except StoreAccessError:
        raise
    except StoreError as error:
        if format_of(path) is None:  # not an index of gridcap: not for --repair to delete
            raise
        report.note("whole-file SHA-256", 1, "", error.message)
        return None
    report.note("whole-file SHA-256", 1, "", None)
    if index.plan not in plan.digests:
        report.note("belongs to the plan", 1, "", f"{path}: the index belongs to another plan")
        return None
    report.note("belongs to the plan", 1, "", None)
    appended = "images were appended since, and are not all there yet" if index.plan != plan.digest() else None
    report.note(INDEX_CHECK, 1, "", f"{path}: {appended}" if appended else None)
    ids, names = index.image_id, index.file_name
    shards = [shard for shard in range(plan.shards) if plan.rows_of(shard).stop <= len(ids)]
    agree = bool(shards) and plan.rows_of(shards[-1]).stop == len(ids)
    for shard in shards if agree else ():
        rows = plan.rows_of(shard)
        listed_images = zip(ids[rows.start : rows.stop].tolist(), names[rows.start : rows.stop], strict=True)
        agree = agree and list(listed_images) == plan.images_of(shard, folder)
    report.note("rows and image ids", 1, "", None if agree else f"{path}: other images than the plan's")
    listed = [os.path.relpath(path.parent / name, folder) for name in index.shard_names]
    renamed = next((name for name in listed if name.startswith("..")), None)
    why = f"{path}: its shards are in {path.parent / renamed}: a store keeps its name" if renamed else None
    report.note("rows and image ids", 0, "", why)
    hashes = dict(zip(listed, index.shard_sha256, strict=True))
    return _Index(hashes, index.valid, index.invalid_reasons)


def _verify_shard(folder: Path, plan: Plan, shard: int, index: _Index | None, report: Report) -> None:
    name, expected = plan.shard_name(shard), plan.images_of(shard, folder)
    try:
        info = read_header(folder / name)
        reader = ShardReader(folder / name)
        same_rows = list(zip(reader.image_id.tolist(), reader.file_name, strict=True)) == expected
        same_source = reader.provenance == plan.provenance
        rejects, valid = reader.invalid_reasons, reader.valid
        report.note("shard readable", 1, name, None)
    except StoreAccessError:  # the shard may be intact: not for --repair to delete
        raise
    except (StoreError, ValueError) as error:
        report.note("shard readable", 1, name, str(error))
        return
    with reader:
        same_plan = (reader.plan, reader.index) == (plan.digest_of(shard), shard)
        report.note("belongs to the plan", 1, name, None if same_plan else "made by another plan")
        report.note("rows and image ids", 1, name, None if same_rows else "other images than the plan's")
        report.note("provenance", 1, name, None if same_source else "another provenance than the plan's")
        wrong = None
        if info is None:
            wrong = "has no header: it was rewritten by another program"
        elif sha256_of(folder / name, HEADER_BYTES) != info.sha256:
            wrong = "differs from the shard's header"
        report.note("whole-file SHA-256", 1, name, wrong)
        if index is not None and info is not None and wrong is None and same_plan and name in index.hashes:
            rows = plan.rows_of(shard)
            listed = {row - rows.start: why for row, why in index.rejects.items() if row in rows}
            same = index.hashes[name] == info.sha256 and listed == rejects
            same = same and bool((index.valid[rows.start : rows.stop] == valid).all())
            report.note("belongs to the plan", 0, "", None if same else f"{name}: the index says other things of it")
        _verify_rows(reader, name, report)


def _verify_rows(reader: ShardReader, name: str, report: Report) -> None:
    bad: dict[str, list[int]] = {"row CRC-32": [], "no NaN or infinity": [], "no row all zero": []}
    out = np.empty(reader.shape[1:], reader.dtype)
    for view in reader.views:
        checksums = reader.checksums[view]
        for row in range(len(reader)):
            if reader.row_crc32(row, view) != checksums[row]:
                bad["row CRC-32"].append(row)
                continue
            reader.read_row(row, out, view)
            if reader.valid[row] and not np.isfinite(out).all():
                bad["no NaN or infinity"].append(row)
            elif reader.valid[row] and not out.any():
                bad["no row all zero"].append(row)
    report.rows += len(reader)
    report.valid += int(reader.valid.sum())
    for check, rows in bad.items():
        detail = f"rows {rows[:5]}{' ...' if len(rows) > 5 else ''}" if rows else None
        report.note(check, len(reader) * len(reader.views), name, detail)


def _compare_ids(stored: set[int], wanted: set[int], report: Report) -> None:
    gone, new = len(stored - wanted), len(wanted - stored)
    detail = f"{new} images of the captions file are not in the store, {gone} of the store not in the captions file"
    report.note(CAPTIONS_CHECK, len(wanted), "", detail if gone or new else None)
