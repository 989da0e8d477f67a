"""Planning: compare a requested plan with the plan on disk, append images, and save the result.

`resolve_plan` decides everything without writing; `save_plan` writes the decision. Several processes may do both at
the same time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gridcap.common.config import max_invalid_count
from gridcap.common.errors import MismatchError
from gridcap.common.files import publish_text, write_text
from gridcap.common.lock import exclusive_lock
from gridcap.common.store.provenance import MATCHED, differences
from gridcap.common.text import plural
from gridcap.extract.manifest import Image, ImageList
from gridcap.extract.plan import FILE, Plan, read_plan

ARITHMETIC_KEYS = ("precision", "compile")
BLOCK_SIZE = 65536  # images compared at a time
MAX_EXAMPLES = 3
SAVE_ATTEMPTS = 5
LOCK = ".plan.lock"


@dataclass(frozen=True)
class PlanRequest:
    """A requested plan and the rules for combining it with the plan on disk.

    Attributes:
        plan: the requested plan, with one image list.
        images: the images of that list; iterated again where lists differ.
        folder: folder of the store's shards.
        auto_keys: settings ("precision", "compile", "batch_size") left at their default, which follow the plan on disk.
        append: add images that are new as another list; images that are gone from the list keep their rows.
        replace_empty: replace a different plan that has no shard yet, for example one with misspelled names, or one
            whose batch size does not fit in memory.
        images_dir: image folder, in which images that are gone from the list may still exist; None: they do not.
        max_invalid: limit on images of unfinished shards that are gone from the list and the folder ("10" or "5%").
    """

    plan: Plan
    images: Iterable[Image]
    folder: Path
    auto_keys: Collection[str] = ()
    append: bool = False
    replace_empty: bool = False
    images_dir: Path | None = None
    max_invalid: str = "0"


@dataclass(frozen=True)
class ResolvedPlan:
    """The outcome of a comparison.

    Attributes:
        plan: the plan to use; on disk already, or to be saved.
        stored: the plan that was on disk, if any.
        new_images: images of the last list of an unsaved plan.
    """

    plan: Plan
    stored: Plan | None
    new_images: Iterable[Image] = ()

    @property
    def is_saved(self) -> bool:
        """Whether the plan was on disk."""
        return self.stored is not None and self.stored.digest() == self.plan.digest()

    @property
    def replaces_stored(self) -> bool:
        """Whether saving discards the stored plan, which has no shards."""
        return self.stored is not None and self.stored.digest() not in self.plan.digests

    @property
    def appended_images(self) -> int:
        """Number of images that saving appends to the stored plan."""
        return 0 if self.stored is None or self.replaces_stored else self.plan.images - self.stored.images


def load_or_create_plan(request: PlanRequest) -> Plan:
    """Return the plan on disk if the request agrees with it, else save the requested or extended plan.

    Raises:
        MismatchError: see `resolve_plan`.
    """
    return save_plan(request, resolve_plan(request)).plan


def resolve_plan(request: PlanRequest) -> ResolvedPlan:
    """Combine a requested plan with the plan on disk, without writing anything.

    Shard size and batch size of the plan on disk are kept: they cannot change once a store has shards.

    Raises:
        MismatchError: the images, encoder, weights, preprocessing, or arithmetic differ; the message lists how.
        StoreError: the plan on disk cannot be used.
    """
    folder, requested = request.folder, request.plan
    if not (folder / FILE).exists():
        return ResolvedPlan(requested, None, request.images)
    stored = read_plan(folder)
    keys = (*MATCHED, "views", *(key for key in ARITHMETIC_KEYS if key not in request.auto_keys))
    mismatches = differences(stored.provenance, requested.provenance, keys)
    same_lists = [part.sha256 for part in stored.lists] == [part.sha256 for part in requested.lists]
    if same_lists and not mismatches:
        if _changes_batch_size(request, stored):
            return ResolvedPlan(requested, stored, request.images)
        return ResolvedPlan(stored, stored)
    new, gone = (0, 0) if same_lists else _count_differences(stored, request)
    reordered = not same_lists and not new and not gone and len(stored.lists) == 1
    if not mismatches and not new and not gone and (request.append or not reordered):
        return ResolvedPlan(stored, stored)
    only_new = bool(request.append and new and not gone and not mismatches)
    if request.replace_empty and not only_new and not stored.existing_shards(folder):
        return ResolvedPlan(requested, stored, request.images)
    if request.append and not mismatches:
        return _append(stored, request) if new else ResolvedPlan(stored, stored)
    if new or gone:
        mismatches.append(f"images: expected {stored.images}, got {requested.images} ({new} new, {gone} gone)")
    elif reordered:
        mismatches.append("images: a different order")
    only_images = bool(new or gone) and len(mismatches) == 1
    hint = "choose another --output, or delete the store to start over"
    if only_images:
        hint += "; with --append, new images are added and images that are gone keep their rows"
    raise MismatchError(f"{folder / FILE}: this store was planned differently: {'; '.join(mismatches)}", hint)


def _changes_batch_size(request: PlanRequest, stored: Plan) -> bool:
    """Return whether the request has another batch size than a plan without shards, which may change."""
    given = "batch_size" not in request.auto_keys and request.plan.batch_size != stored.batch_size
    return request.replace_empty and given and not stored.existing_shards(request.folder)


def save_plan(request: PlanRequest, resolved: ResolvedPlan) -> ResolvedPlan:
    """Write a resolved plan and its image list; if another process was faster, resolve again and compare.

    Raises:
        MismatchError: the other process planned something else, or the images changed in the meantime.
    """
    for _ in range(SAVE_ATTEMPTS):
        plan, stored = resolved.plan, resolved.stored
        if resolved.is_saved:
            return resolved
        image_list = ImageList.from_images(resolved.new_images, plan.shard_size, request.folder)
        if image_list.sha256 != plan.lists[-1].sha256:
            raise MismatchError(
                f"{request.folder}: the list of images changed while the plan was being written",
                "rerun the command when the images no longer change",
            )
        if _write(plan, stored, request.folder):
            return ResolvedPlan(plan, plan)
        resolved = resolve_plan(request)
    raise MismatchError(
        f"{request.folder / FILE}: other processes keep changing this plan", "wait for them, then rerun the command"
    )


def _write(plan: Plan, stored: Plan | None, folder: Path) -> bool:
    """Write a plan unless another process has changed the one on disk; return whether `plan` is on disk now."""
    path = folder / FILE
    if stored is None and publish_text(path, plan.to_json()):
        return True
    with exclusive_lock(folder / LOCK):  # comparing and replacing must not interleave with those of another process
        current = read_plan(folder)
        if current.digest() == plan.digest():
            return True
        if stored is None or current.digest() != stored.digest():
            return False
        write_text(path, plan.to_json())
    for file in {part.file for part in stored.lists}.difference(part.file for part in plan.lists):
        (folder / file).unlink(missing_ok=True)
    return True


def _stored_images(plan: Plan, folder: Path) -> Iterator[Image]:
    return itertools.chain.from_iterable(plan.images_of(shard, folder) for shard in range(plan.shards))


def _hashes(images: Iterable[Image]) -> np.ndarray:
    """Hash each image: 8 bytes instead of about a hundred per image; the hashes are valid in this process only."""
    return np.fromiter((hash(image) for image in images), np.int64)


def _count_differences(stored: Plan, request: PlanRequest) -> tuple[int, int]:
    """Count the images that are new in the requested list, and those that are gone from it."""
    old, new = _hashes(_stored_images(stored, request.folder)), _hashes(request.images)
    return len(np.setdiff1d(new, old)), len(np.setdiff1d(old, new))


@dataclass(frozen=True)
class _NewImages:
    """The images of a list that a store does not contain yet; can be iterated repeatedly.

    Attributes:
        images: the whole list.
        hashes, ids: sorted hashes and image ids of the store's images.
        folder: folder of the store, for errors.
    """

    images: Iterable[Image]
    hashes: np.ndarray
    ids: np.ndarray
    folder: Path

    def __iter__(self) -> Iterator[Image]:
        remaining = iter(self.images)
        while part := list(itertools.islice(remaining, BLOCK_SIZE)):
            known = _is_in(_hashes(part), self.hashes)
            taken = _is_in(np.array([image_id for image_id, _ in part], np.int64), self.ids)
            if len(conflicts := np.flatnonzero(~known & taken)):
                image_id, name = part[conflicts[0]]
                raise MismatchError(
                    f"{self.folder}: image id {image_id} is {name} in the list, and another file in the store",
                    "give the new image an id of its own, or choose another --output",
                )
            yield from itertools.compress(part, ~known)


def _append(stored: Plan, request: PlanRequest) -> ResolvedPlan:
    """Extend the stored plan by the images that are new in the requested list."""
    folder = request.folder
    hashes = np.sort(_hashes(_stored_images(stored, folder)))
    ids = np.sort(np.fromiter((image_id for image_id, _ in _stored_images(stored, folder)), np.int64))
    _check_unfinished_shards(stored, request)
    new = _NewImages(request.images, hashes, ids, folder)
    appended = ImageList.from_images(new, stored.shard_size)
    return ResolvedPlan(replace(stored, lists=(*stored.lists, appended)), stored, new)


def _check_unfinished_shards(stored: Plan, request: PlanRequest) -> None:
    """Reject a list without the images that unfinished shards still need, unless the image folder has them.

    Without this check, appending a list of other images from another folder to an unfinished store would make all
    images of its unfinished shards invalid.
    """
    folder = request.folder
    unfinished = sorted(set(range(stored.shards)).difference(stored.existing_shards(folder)))
    if not unfinished:
        return
    listed = np.sort(_hashes(request.images))
    lost: list[str] = []
    for shard in unfinished:
        images = stored.images_of(shard, folder)
        absent = itertools.compress(images, ~_is_in(_hashes(images), listed))
        lost += [name for _, name in absent if not _exists(request.images_dir, name)]
    if len(lost) > max_invalid_count(request.max_invalid, stored.images):
        examples = ", ".join(lost[:MAX_EXAMPLES]) + (", ..." if len(lost) > MAX_EXAMPLES else "")
        raise MismatchError(
            f"{folder}: {plural(len(unfinished), 'shard')} unfinished, and {plural(len(lost), 'image')} of them can be "
            f"found neither in the list nor in {request.images_dir or 'the image folder'}: {examples}",
            "finish the store with its original images before appending others, or raise --max-invalid to store the "
            "images that are gone as invalid",
        )


def _exists(folder: Path | None, name: str) -> bool:
    return folder is not None and os.path.exists(folder / name)  # noqa: PTH110 (False for names that cannot exist)


def _is_in(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Return a boolean mask of the values that are in a sorted array."""
    positions = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.asarray(ordered[positions] == values)
