"""The images of a split: a captions file or an image folder, and the subset that the configuration selects."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gridcap.common.captions.images import SourceImages, list_images
from gridcap.common.captions.limit import check_invalid
from gridcap.common.captions.match_files import EXACT, MISSING, match_files
from gridcap.common.captions.read import read_captions
from gridcap.common.captions.records import CaptionSet, ImageRecord, Problems
from gridcap.common.captions.source import Columns
from gridcap.common.config import DataConfig, SplitConfig
from gridcap.common.errors import AnnotationError

SUBSET_STREAM = 0x5B5E7  # separates this random stream from others with the same seed


def load_split(
    split: SplitConfig,
    name: str,
    seed: int = 0,
    max_invalid: str = "20%",
    follow_links: bool = False,
    columns: Columns | None = None,
) -> CaptionSet:
    """Load the images and captions of a split and select its subset.

    Args:
        split: paths and subset.
        name: name of the split; it selects the part of a Karpathy file (`karpathy-train` or `train`).
        seed: seed of the random order that `skip` and `limit` cut. Subsets are cut by image, not by caption, so no
            image is in two disjoint subsets.
        max_invalid: limit on invalid images and captions, such as "10" or "5%".
        follow_links: for an image folder: whether to descend into linked folders.
        columns: columns of the captions file; None: by their names.

    Raises:
        AnnotationError: unreadable file, unsupported format, too many invalid items, or no images left.
    """
    source = split.annotations or split.images
    if split.annotations is None:
        loaded = list_images(split.images, max_invalid, follow_links)
    else:
        loaded = read_captions(split.annotations, name, columns)
        check_invalid(source, loaded.problems, sum(max(1, len(r.captions)) for r in loaded.records), max_invalid)
    records = _subset(loaded.records, split, seed)
    if not records:
        raise AnnotationError(f"{source}: no images left for split {name!r}", "check the path, limit, and skip")
    return CaptionSet(records, loaded.problems)


def _subset(records: list[ImageRecord], split: SplitConfig, seed: int) -> list[ImageRecord]:
    if split.limit is None and not split.skip:
        return records
    order = np.random.default_rng([seed, SUBSET_STREAM]).permutation(len(records))
    end = None if split.limit is None else split.skip + split.limit
    return [records[i] for i in np.sort(order[split.skip : end])]


def split_images(
    split: SplitConfig, name: str, data: DataConfig, seed: int = 0
) -> tuple[Iterable[ImageRecord], Problems]:
    """Return the images of a split for extraction, where captions do not matter. A whole folder is streamed.

    The images of a captions file are matched with the files of the folder: by exact path, relative to the folder, or by
    a unique name without extension.

    Args:
        split: paths and subset.
        name: name of the split.
        data: limit on invalid items, links, and columns.
        seed: seed of the random order that `skip` and `limit` cut.

    Returns:
        The images, which can be iterated repeatedly, and the problems. For a folder, the problems are complete after
        an iteration.

    Raises:
        AnnotationError: as for `load_split`, or a name matches several files; for a folder, during iteration.
    """
    if split.annotations is None and split.limit is None and not split.skip:
        images = SourceImages(split.images, data.max_invalid, data.follow_links)
        return images, images.problems
    loaded = load_split(split, name, seed, data.max_invalid, data.follow_links, columns_of(data))
    if split.annotations is None or not split.images.exists():  # object storage is matched exactly
        return loaded.records, loaded.problems
    records, kinds = match_files(loaded.records, split.images, data.follow_links)
    if set(kinds) - {EXACT, MISSING}:
        loaded.problems.notes.update(kinds)
    return records, loaded.problems


def columns_of(data: DataConfig) -> Columns:
    """Return the columns that the configuration chooses."""
    return Columns(data.image_column, data.caption_column, data.group_column)


def captions_only(path: Path) -> SplitConfig:
    """Return a split for a captions file whose images are not needed."""
    return SplitConfig(images=path.parent, annotations=path)
