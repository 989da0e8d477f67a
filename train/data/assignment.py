"""Splitting the images of one store into training, validation, and test images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gridcap.common.errors import CheckpointError, MismatchError, UserError
from gridcap.train.data.captioned import CaptionedImages

FILE = "splits.json"  # in the folder of a run: file name -> split
STREAM = 0x5917  # separates this random stream from others with the same seed
SPLITS = ("train", "val", "test")


def assign_splits(groups: Sequence[str], val: float, test: float, seed: int) -> list[str]:
    """Assign images to splits. Images of one group are in the same split.

    Groups are taken in a random order until a split has at least its share of the images. The result depends on the
    groups and the seed, but not on the order of the images.

    Args:
        groups: group of each image.
        val, test: shares of the images, from 0 to 1.
        seed: random seed.

    Returns:
        "train", "val", or "test" for each image.
    """
    names, members = np.unique(np.asarray(groups, object).astype(str), return_inverse=True)
    sizes = np.bincount(members, minlength=len(names))
    split_of_group = np.full(len(names), "train", object)
    order = iter(np.random.default_rng([seed, STREAM]).permutation(len(names)).tolist())
    for split, share in (("val", val), ("test", test)):
        wanted, count = round(share * len(groups)), 0
        while count < wanted and (group := next(order, None)) is not None:
            split_of_group[group] = split
            count += int(sizes[group])
    return [str(split_of_group[group]) for group in members]


def group_by_prefix(name: str, separator: str) -> str:
    """Return the group of a file name: the part of its base name before the separator."""
    return name.rpartition("/")[2].partition(separator)[0]


def split_images(data: CaptionedImages, val: float, test: float, seed: int) -> dict[str, CaptionedImages]:
    """Split the images of a store, see `assign_splits`.

    Returns:
        Split -> images, for the splits that were requested. Each contains the assignment of all images.

    Raises:
        UserError: a split would be empty.
    """
    assigned = np.array(assign_splits(data.groups, val, test, seed))
    assignment = dict(zip(data.file_names(), assigned.tolist(), strict=True))
    splits: dict[str, CaptionedImages] = {}
    for name, share in (("train", 1.0), ("val", val), ("test", test)):
        chosen = np.flatnonzero(assigned == name)
        if share and not len(chosen):
            raise UserError(
                f"{data.store.path}: no images are left for {name}: {len(data)} images, {len(set(data.groups))} groups",
                "use other fractions, or more images",
            )
        if share:
            splits[name] = data.select(chosen.tolist(), assignment)
    return splits


def read_assignment(run: Path) -> dict[str, str] | None:
    """Return the assignment of a run: file name -> split; None if its data was not split.

    Raises:
        CheckpointError: the file is corrupted.
    """
    file = run / FILE
    if not file.is_file():
        return None
    try:
        assignment = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(assignment, dict) or not set(assignment.values()) <= set(SPLITS):
            raise ValueError("not an assignment of images to splits")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: corrupted: {error}", "train again, or restore the file") from error
    return assignment


def select_split(data: CaptionedImages, assignment: Mapping[str, str], split: str, run: Path) -> CaptionedImages:
    """Return the images of a split, by an assignment.

    Raises:
        MismatchError: there are none.
    """
    chosen = [i for i, name in enumerate(data.file_names()) if assignment.get(name) == split]
    if not chosen:
        raise MismatchError(
            f"{data.store.path}: contains no {split} images of {run / FILE}",
            "use the store that the run was trained on, or train with --test-fraction",
        )
    return data.select(chosen, assignment)
