"""The plan: which image goes to which row of which shard, fixed before any work and kept in `plan.json`.

Every worker reads the same plan, so any machine can make any shard, and what a shard holds depends on nothing
else. A rerun compares its own plan with the one on disk and refuses to mix two.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.annotations import ImageRecord
from common.errors import MismatchError, StoreError
from common.files import write_text
from common.store import MATCHED, differences

FORMAT = "gridcap-plan"
VERSION = 1


@dataclass(frozen=True)
class Plan:
    """The work of one store.

    Attributes:
        split: its name.
        images: (image_id, file_name) in row order.
        shard_size: rows in every shard but the last.
        batch_size: images encoded together; a part of the plan, since sums round differently in other batches.
        provenance: what the grids will be.
    """

    split: str
    images: tuple[tuple[int, str], ...]
    shard_size: int
    batch_size: int
    provenance: dict[str, Any]

    @classmethod
    def make(
        cls, split: str, records: Sequence[ImageRecord], shard_size: int, batch_size: int, provenance: dict[str, Any]
    ) -> Plan:
        """Plan a store for these images."""
        return cls(split, tuple((r.image_id, r.file_name) for r in records), shard_size, batch_size, provenance)

    @property
    def shards(self) -> int:
        """How many shards."""
        return -(-len(self.images) // self.shard_size)

    def shard_name(self, shard: int) -> str:
        """The file name of a shard."""
        return f"{shard:05}.h5"

    def rows_of(self, shard: int) -> range:
        """The rows of a shard, counted over the store."""
        return range(shard * self.shard_size, min(len(self.images), (shard + 1) * self.shard_size))

    def to_json(self) -> str:
        """The file's text: an image a line, so that two plans can be compared with ordinary tools."""
        head = {
            "format": FORMAT, "version": VERSION, "split": self.split, "shard_size": self.shard_size,
            "batch_size": self.batch_size, "provenance": self.provenance,
        }  # fmt: skip
        lines = ",\n".join(json.dumps(image, ensure_ascii=False) for image in self.images)
        return json.dumps(head, indent=1, sort_keys=True, ensure_ascii=False)[:-2] + f',\n "images": [\n{lines}\n]}}\n'

    def digest(self) -> str:
        """The SHA-256 of the plan; every shard and the index carry it."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        StoreError: not a plan, or of a newer version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["version"] > VERSION:
            raise StoreError(f"{path}: a plan of another format or a newer version", "update gridcap")
        images = tuple((int(i), str(name)) for i, name in data["images"])
        return Plan(data["split"], images, data["shard_size"], data["batch_size"], data["provenance"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path}: not a plan: {error}", "choose another --output, or delete the whole folder"
        ) from error


def settle_plan(wanted: Plan, path: Path, any_precision: bool = False) -> Plan:
    """Keep the plan on disk if the wanted one agrees with it; write the wanted one if there is none.

    The shard size and the batch size of the plan on disk are kept: they belong to the store once it is begun.

    Args:
        wanted: what was asked for.
        path: of `plan.json`.
        any_precision: accept a plan of another precision, for a complete store and a precision left to "auto".

    Raises:
        MismatchError: another image list, encoder, weights, preprocessing or precision, with what differs.
    """
    if not path.exists():
        write_text(path, wanted.to_json())
        return wanted
    kept = read_plan(path)
    lines = differences(kept.provenance, wanted.provenance, MATCHED if any_precision else (*MATCHED, "precision"))
    if kept.images != wanted.images:
        old, new = set(kept.images), set(wanted.images)
        lines.append(
            f"images: {len(old)} there, {len(new)} here ({len(new - old)} new, {len(old - new)} gone)"
            if old != new else "images: another order"
        )  # fmt: skip
    if lines:
        raise MismatchError(
            f"{path}: this store was planned differently: {'; '.join(lines)}",
            f"choose another --output, or delete {path.parent} and its index to begin again",
        )
    return kept
