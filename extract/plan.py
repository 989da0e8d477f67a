"""The plan: which image goes to which row of which shard, fixed before any work.

    features/train/plan.json                the split, shard and batch size, provenance, and the image lists below
    features/train/images-<sha256>.jsonl    the images in row order, a line each: [image_id, "file_name"]

Every worker reads the same plan, so any machine can make any shard, and what a shard holds depends on nothing
else. A rerun compares its own plan with the one on disk and refuses to mix two. `--append` adds a second list.

Nothing here grows with the number of images but a few numbers for each shard: a list is written and compared as a
stream, and a shard's part of it is found by its place in the file.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gridcap.common.errors import MismatchError, StoreError
from gridcap.common.files import publish_text, write_text
from gridcap.common.store.index import write_index
from gridcap.common.store.provenance import MATCHED, differences
from gridcap.common.store.shard import ShardWriter
from gridcap.extract.manifest import Image, ImageList

FORMAT = "gridcap-plan"
VERSION = 2
FILE = "plan.json"
SHARDS_IN_FOLDER = 1000
_ARITHMETIC = ("precision", "compile")

_BLOCK = 65536


@dataclass(frozen=True)
class Plan:
    """The work of one store.

    Attributes:
        split: its name.
        shard_size: rows in every shard but a list's last.
        batch_size: images encoded together; a part of the plan, since sums round differently in other batches.
        provenance: what the grids will be.
        lists: of images: the first, then those that were appended.
    """

    split: str
    shard_size: int
    batch_size: int
    provenance: dict[str, Any]
    lists: tuple[ImageList, ...]

    @functools.cached_property
    def _first_shards(self) -> list[int]:
        """The first shard of each list, and the number of shards."""
        return [0, *itertools.accumulate(len(part.crc32) for part in self.lists)]

    @functools.cached_property
    def _first_rows(self) -> list[int]:
        return [0, *itertools.accumulate(part.images for part in self.lists)]

    def _list_of(self, shard: int) -> int:
        return bisect_right(self._first_shards, shard) - 1

    @property
    def images(self) -> int:
        """How many images, and rows."""
        return self._first_rows[-1]

    @property
    def shards(self) -> int:
        """How many shards."""
        return self._first_shards[-1]

    @property
    def name_bytes(self) -> int:
        """Bytes of the longest file name."""
        return max(part.name_bytes for part in self.lists)

    def shard_name(self, shard: int) -> str:
        """The path of a shard below the store's folder; after the first thousand, a folder for each thousand."""
        name = f"{shard:05}.h5"
        return name if shard < SHARDS_IN_FOLDER else f"{shard // SHARDS_IN_FOLDER:03}/{name}"

    @property
    def folders(self) -> list[str]:
        """The folders below the store's that hold shards, in the order of these."""
        return [str(Path(self.shard_name(first)).parent) for first in range(0, self.shards, SHARDS_IN_FOLDER)]

    def rows_of(self, shard: int) -> range:
        """The rows of a shard, counted over the store."""
        part = self._list_of(shard)
        start = self._first_rows[part] + (shard - self._first_shards[part]) * self.shard_size
        return range(start, min(self._first_rows[part + 1], start + self.shard_size))

    def images_of(self, shard: int, folder: Path) -> list[Image]:
        """The (image_id, file_name) of a shard's rows, read from its list.

        Raises:
            StoreError: the list is missing or damaged.
        """
        part = self._list_of(shard)
        return self.lists[part].of(shard - self._first_shards[part], folder)

    def existing_shards(self, folder: Path) -> list[int]:
        """The numbers of the shards that are there, in order, by listing folders, not by asking for each file."""
        there: list[int] = []
        for number, inside in enumerate(folder / part for part in self.folders):
            names = {entry.name for entry in os.scandir(inside)} if inside.is_dir() else set()
            first, last = number * SHARDS_IN_FOLDER, min(self.shards, (number + 1) * SHARDS_IN_FOLDER)
            there += [shard for shard in range(first, last) if f"{shard:05}.h5" in names]
        return there

    def to_json(self) -> str:
        """The file's text: everything but the lists for people to read, then a line a list."""
        lists = ",\n  ".join(json.dumps(part.__dict__, sort_keys=True) for part in self.lists)
        return json.dumps(self._head(), indent=1, sort_keys=True, ensure_ascii=False)[:-2] + (
            f',\n "lists": [\n  {lists}\n ]\n}}\n'
        )

    def _head(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "split": self.split,
            "shard_size": self.shard_size,
            "batch_size": self.batch_size,
            "provenance": self.provenance,
        }

    def digest(self) -> str:
        """The SHA-256 of the plan; the index carries it."""
        return self.digests[-1]

    def digest_of(self, shard: int) -> str:
        """The SHA-256 that a shard carries: of the plan up to its own list, so that appending leaves it as it is."""
        return self.digests[self._list_of(shard)]

    @functools.cached_property
    def digests(self) -> list[str]:
        """The SHA-256 of the plan up to each of its lists; the last is the plan's own."""
        made = []
        for count in range(1, len(self.lists) + 1):
            lists = [part.sha256 for part in self.lists[:count]]
            text = json.dumps({**self._head(), "lists": lists}, sort_keys=True, ensure_ascii=False)
            made.append(hashlib.sha256(text.encode()).hexdigest())
        return made


def read_plan(folder: Path) -> Plan:
    """Read a store's plan.

    Raises:
        StoreError: there is none, it is not a plan, or of another version.
    """
    path = folder / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"of the format {data['format']!r}")
        if data["version"] != VERSION:
            raise StoreError(
                f"{path}: a plan of version {data['version']}, and this gridcap reads version {VERSION}",
                "use the gridcap that made it, or choose another --output",
            )
        lists = tuple(
            ImageList(p["images"], p["sha256"], p["name_bytes"], tuple(p["offsets"]), tuple(p["crc32"]))
            for p in data["lists"]
        )
        plan = Plan(data["split"], data["shard_size"], data["batch_size"], data["provenance"], lists)
        for part in lists:
            if not len(part.crc32) == len(part.offsets) - 1 == -(-part.images // plan.shard_size) > 0:
                raise ValueError("its lists do not fit its shards")
        return plan
    except OSError as error:
        raise StoreError(f"{path}: no plan, so this is no store of extract-features", "check the path") from error
    except (ValueError, KeyError, TypeError, RecursionError, ZeroDivisionError) as error:
        raise StoreError(
            f"{path}: not a plan: {error}",
            "delete this file and run the same extract-features command again: it keeps the shards",
        ) from error


def load_or_create_plan(
    wanted: Plan,
    images: Iterable[Image],
    folder: Path,
    free: Collection[str] = (),
    append: bool = False,
    write: bool = True,
) -> Plan:
    """Keep the plan on disk if the wanted one agrees with it; write the wanted one if there is none.

    The shard size and the batch size of the plan on disk are kept: they belong to the store once it is begun.

    Args:
        wanted: what was asked for; its list must have been written to the folder if no plan is there.
        images: its images, to be gone through again where the lists differ.
        folder: of the store.
        free: keys of the arithmetic ("precision", "compile") that were left to "auto", and follow the plan on disk.
        append: add the images that are new as another list.
        write: what is new; False just says what the plan would be.

    Raises:
        MismatchError: another image list, encoder, weights, preprocessing or precision, with what differs.
    """
    path = folder / FILE
    if write and not path.exists() and publish_text(path, wanted.to_json()):
        return wanted
    kept = read_plan(folder)
    keys = (*MATCHED, "views", *(key for key in _ARITHMETIC if key not in free))
    lines = differences(kept.provenance, wanted.provenance, keys)
    if append and not lines:
        return _append(kept, images, folder, write)
    hint = "choose another --output, or delete the store to begin again"
    same = [part.sha256 for part in kept.lists] == [part.sha256 for part in wanted.lists]
    if not same and (other := _other_images(kept, wanted, images, folder)):
        hint += "; extract-features --append adds images that are new" if not lines and "(0 new" not in other[0] else ""
        lines += other
    if lines:
        raise MismatchError(f"{path}: this store was planned differently: {'; '.join(lines)}", hint)
    return kept


def _images_of(plan: Plan, folder: Path) -> Iterator[Image]:
    return itertools.chain.from_iterable(plan.images_of(shard, folder) for shard in range(plan.shards))


def _hashes(images: Iterable[Image]) -> np.ndarray:
    """A number for each image: 8 bytes, where the image itself takes a hundred."""
    return np.fromiter((hash(image) for image in images), np.int64)


def _other_images(kept: Plan, wanted: Plan, images: Iterable[Image], folder: Path) -> list[str]:
    """What differs between the image lists: nothing if the wanted one is what several lists make together."""
    old, new = _hashes(_images_of(kept, folder)), _hashes(images)
    more, less = len(np.setdiff1d(new, old)), len(np.setdiff1d(old, new))
    if more or less:
        return [f"images: {kept.images} there, {wanted.images} here ({more} new, {less} gone)"]
    return ["images: another order"] if len(kept.lists) == 1 else []


def _append(kept: Plan, images: Iterable[Image], folder: Path, write: bool) -> Plan:
    old = np.sort(_hashes(_images_of(kept, folder)))
    ids = np.sort(np.fromiter((image_id for image_id, _ in _images_of(kept, folder)), np.int64))
    gone = len(np.setdiff1d(old, _hashes(images)))
    if gone and len(there := kept.existing_shards(folder)) < kept.shards:
        raise MismatchError(
            f"{folder}: {kept.shards - len(there)} shards are still to be made, and {gone} of their images are "
            "not in this list",
            "finish the store with the list it was begun with, then append",
        )

    def new() -> Iterator[Image]:
        left = iter(images)
        while part := list(itertools.islice(left, _BLOCK)):
            known, taken = _among(_hashes(part), old), _among(np.array([i for i, _ in part], np.int64), ids)
            if len(clash := np.flatnonzero(~known & taken)):
                image_id, name = part[clash[0]]
                raise MismatchError(
                    f"image {image_id} is {name} in the list, and another file in {folder}",
                    "give the new image an id of its own, or choose another --output",
                )
            yield from itertools.compress(part, ~known)

    if next(new(), None) is None:
        return kept
    plan = replace(kept, lists=(*kept.lists, ImageList.make(new(), kept.shard_size, folder if write else None)))
    if write:
        if read_plan(folder).digest() != kept.digest():
            raise MismatchError(f"{folder / FILE}: another process has appended images just now", "start again")
        write_text(folder / FILE, plan.to_json())
    return plan


def _among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which values are among the ordered ones."""
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.asarray(ordered[places] == values)


def shard_writer(folder: Path, plan: Plan, shard: int) -> ShardWriter:
    """The writer of a planned shard."""
    images, provenance = plan.images_of(shard, folder), plan.provenance
    attributes = {
        "index": shard,
        "split": plan.split,
        "plan": plan.digest_of(shard),
        "provenance": provenance,
    }
    return ShardWriter(
        folder / plan.shard_name(shard),
        [i for i, _ in images],
        [n for _, n in images],
        provenance["grid_shape"],
        provenance["dtype"],
        attributes,
        provenance["views"],
    )


def store_folder(output: Path) -> Path:
    """The folder of the shards beside an index file: features/train.h5 -> features/train."""
    return output.with_suffix("")


def write_planned_index(output: Path, plan: Plan) -> None:
    """Write the index of a store whose shards are all there."""
    folder = store_folder(output)
    names = [plan.shard_name(shard) for shard in range(plan.shards)]
    images = (plan.images_of(shard, folder) for shard in range(plan.shards))
    plans = [plan.digest_of(shard) for shard in range(plan.shards)]
    write_index(output, folder, names, images, plan.name_bytes, plan.split, plans, plan.provenance)
