"""The plan of a store: assigns every image to a row of a shard before any work starts.

    features/train/plan.json                split, shard size, batch size, provenance, and the image lists
    features/train/images-<sha256>.jsonl    images in row order, one line per image: [image_id, "file_name"]

All workers read the same plan, so any machine can produce any shard, and the content of a shard depends on nothing
else. A rerun compares its requested plan with the one on disk (`planning.py`). `--append` adds a second image list.

Memory grows by a few numbers per shard, not per image: the lists are streamed, and a shard's lines are found by their
byte offset.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gridcap.common.errors import MismatchError, StoreError
from gridcap.common.store.index_writer import IndexSpec, write_index
from gridcap.common.store.shard_format import GridLayout, ShardSpec
from gridcap.common.store.shard_writer import ShardWriter
from gridcap.extract.manifest import RECREATE_HINT, Image, ImageList

FORMAT = "gridcap-plan"
VERSION = 2
FILE = "plan.json"
MAX_SHARDS_PER_FOLDER = 1000


@dataclass(frozen=True)
class Plan:
    """The work of one store.

    Attributes:
        split: name of the split.
        shard_size: rows per shard; the last shard of a list may have fewer.
        batch_size: images encoded together; part of the plan because rounding depends on it.
        provenance: description of the grids.
        lists: image lists, the first one and those appended later.
    """

    split: str
    shard_size: int
    batch_size: int
    provenance: dict[str, Any]
    lists: tuple[ImageList, ...]

    @functools.cached_property
    def _first_shards(self) -> list[int]:
        """First shard of each list, then the number of shards."""
        return [0, *itertools.accumulate(len(part.crc32) for part in self.lists)]

    @functools.cached_property
    def _first_rows(self) -> list[int]:
        return [0, *itertools.accumulate(part.images for part in self.lists)]

    def _list_of(self, shard: int) -> int:
        return bisect_right(self._first_shards, shard) - 1

    @property
    def images(self) -> int:
        """Number of images, which is the number of rows."""
        return self._first_rows[-1]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self._first_shards[-1]

    @property
    def name_bytes(self) -> int:
        """Length of the longest file name in bytes."""
        return max(part.name_bytes for part in self.lists)

    def shard_name(self, shard: int) -> str:
        """Return the path of a shard relative to the store's folder; from 1000 on, one subfolder per thousand."""
        name = f"{shard:05}.h5"
        return name if shard < MAX_SHARDS_PER_FOLDER else f"{shard // MAX_SHARDS_PER_FOLDER:03}/{name}"

    @property
    def folders(self) -> list[str]:
        """Folders of the shards, in order, relative to the store's folder."""
        return [str(Path(self.shard_name(first)).parent) for first in range(0, self.shards, MAX_SHARDS_PER_FOLDER)]

    def rows_of(self, shard: int) -> range:
        """Return the rows of a shard, counted over the store."""
        part = self._list_of(shard)
        start = self._first_rows[part] + (shard - self._first_shards[part]) * self.shard_size
        return range(start, min(self._first_rows[part + 1], start + self.shard_size))

    def images_of(self, shard: int, folder: Path) -> list[Image]:
        """Read the (image_id, file_name) of a shard's rows from its image list.

        Raises:
            StoreError: the list is missing or corrupted.
        """
        part = self._list_of(shard)
        return self.lists[part].images_of(shard - self._first_shards[part], folder)

    def existing_shards(self, folder: Path) -> list[int]:
        """List the shards that exist, in order; lists folders instead of querying each file."""
        existing: list[int] = []
        for number, subfolder in enumerate(folder / part for part in self.folders):
            names = {entry.name for entry in os.scandir(subfolder)} if subfolder.is_dir() else set()
            first, last = number * MAX_SHARDS_PER_FOLDER, min(self.shards, (number + 1) * MAX_SHARDS_PER_FOLDER)
            existing += [shard for shard in range(first, last) if f"{shard:05}.h5" in names]
        return existing

    def to_json(self) -> str:
        """Return the text of the plan file: readable settings, then one line per image list."""
        lists = ",\n  ".join(json.dumps(part.__dict__, sort_keys=True) for part in self.lists)
        return json.dumps(self._settings(), indent=1, sort_keys=True, ensure_ascii=False)[:-2] + (
            f',\n "lists": [\n  {lists}\n ]\n}}\n'
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "split": self.split,
            "shard_size": self.shard_size,
            "batch_size": self.batch_size,
            "provenance": self.provenance,
        }

    def digest(self) -> str:
        """Return the SHA-256 of the plan, which is stored in the index."""
        return self.digests[-1]

    def digest_of(self, shard: int) -> str:
        """Return the SHA-256 stored in a shard: of the plan up to the shard's list, so appending does not change it."""
        return self.digests[self._list_of(shard)]

    @functools.cached_property
    def digests(self) -> list[str]:
        """SHA-256 of the plan up to each of its lists; the last one is the digest of the whole plan."""
        digests = []
        for count in range(1, len(self.lists) + 1):
            lists = [part.sha256 for part in self.lists[:count]]
            text = json.dumps({**self._settings(), "lists": lists}, sort_keys=True, ensure_ascii=False)
            digests.append(hashlib.sha256(text.encode()).hexdigest())
        return digests


def read_plan(folder: Path) -> Plan:
    """Read the plan of a store.

    Raises:
        StoreError: the plan is missing, corrupted, or has another version.
        OSError: the plan cannot be read.
    """
    path = folder / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"unknown format {data['format']!r}")
        if data["version"] != VERSION:
            raise StoreError(
                f"{path}: plan version {data['version']} is not supported (supported: {VERSION})",
                "use the gridcap version that wrote it, or choose another --output",
            )
        lists = tuple(
            ImageList(p["images"], p["sha256"], p["name_bytes"], tuple(p["offsets"]), tuple(p["crc32"]))
            for p in data["lists"]
        )
        plan = Plan(data["split"], data["shard_size"], data["batch_size"], data["provenance"], lists)
        for part in lists:
            if not len(part.crc32) == len(part.offsets) - 1 == -(-part.images // plan.shard_size) > 0:
                raise ValueError("image lists and shards do not match")
        return plan
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{path}: no such file, so {folder} is not a store written by extract-features", "check the path"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError, ZeroDivisionError) as error:
        raise StoreError(f"{path}: not a valid plan: {error}", RECREATE_HINT) from error


def check_plan_on_disk(plan: Plan, shard: int, folder: Path) -> None:
    """Check that the plan on disk still contains the list of a shard, before the shard gets its final name.

    A plan without shards may be replaced, by a process that was started later with other images or settings.

    Raises:
        MismatchError: the plan has been replaced.
    """
    if plan.digest_of(shard) not in read_plan(folder).digests:
        raise MismatchError(
            f"{folder / FILE}: another process has replaced the plan of this run",
            "rerun the command with the same images and settings as the other process, or choose another --output",
        )


def store_folder(output: Path) -> Path:
    """Return the folder of the shards of an index file: features/train.h5 -> features/train."""
    return output.with_suffix("")


def shard_writer(folder: Path, plan: Plan, shard: int) -> ShardWriter:
    """Create the writer of a planned shard."""
    layout = GridLayout.from_provenance(plan.provenance)
    images = plan.images_of(shard, folder)
    spec = ShardSpec(images, layout, plan.provenance, shard, plan.digest_of(shard), plan.split)
    return ShardWriter(folder / plan.shard_name(shard), spec)


def write_planned_index(output: Path, plan: Plan) -> None:
    """Write the index of a store whose shards are complete."""
    folder = store_folder(output)
    names = [plan.shard_name(shard) for shard in range(plan.shards)]
    images = (plan.images_of(shard, folder) for shard in range(plan.shards))
    plans = [plan.digest_of(shard) for shard in range(plan.shards)]
    write_index(output, IndexSpec(folder, names, plans, images, plan.name_bytes, plan.split, plan.provenance))
