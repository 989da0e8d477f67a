"""The image manifest of a store: a JSON Lines file that is written and compared as a stream and read shard by shard.

Each line is `[image_id, "file_name"]`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gridcap.common.errors import StoreError, UserError, os_reason
from gridcap.common.files import put_in_place, temporary_file

Image = tuple[int, str]  # image_id, file_name
MAX_NAME_BYTES = 4096  # PATH_MAX on Linux; the name column of a store is as wide as its longest name
RECREATE_HINT = (
    "restore the file from a backup, or delete plan.json in this folder and rerun the command that wrote the store: "
    "finished shards are kept, unless images were appended"
)
_quote = json.encoder.encode_basestring


@dataclass(frozen=True)
class ImageList:
    """An image list: the checksum of its file and the position of each shard's lines.

    Attributes:
        images: number of images.
        sha256: SHA-256 of the file.
        name_bytes: length of the longest file name in UTF-8.
        offsets: byte offset of each shard's first line, then the size of the file.
        crc32: CRC-32 of each shard's lines.
    """

    images: int
    sha256: str
    name_bytes: int
    offsets: tuple[int, ...]
    crc32: tuple[int, ...]

    @property
    def file(self) -> str:
        """Name of the file; derived from its content, so that concurrent writers write the same file."""
        return f"images-{self.sha256[:16]}.jsonl"

    @classmethod
    def from_images(cls, images: Iterable[Image], shard_size: int, folder: Path | None = None) -> ImageList:
        """Build the list in one pass over the images and, with `folder`, write its file there.

        Raises:
            UserError: a file name is longer than 4096 bytes.
        """
        if folder is None:
            return cls._scan(images, shard_size, None)
        is_new = not folder.exists()
        try:
            with temporary_file(folder / "images.jsonl") as temporary:
                with open(temporary, "wb") as sink:
                    image_list = cls._scan(images, shard_size, sink)
                put_in_place(temporary, folder / image_list.file)
        except BaseException:
            if is_new:  # an empty folder would look like a started store
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        return image_list

    @classmethod
    def _scan(cls, images: Iterable[Image], shard_size: int, sink: IO[bytes] | None) -> ImageList:
        total, longest = 0, 1
        digest, offsets, checksums = hashlib.sha256(), [0], []
        remaining = iter(images)
        while part := list(itertools.islice(remaining, shard_size)):
            lines = "".join(f"[{image_id}, {_quote(name)}]\n" for image_id, name in part).encode()
            digest.update(lines)
            checksums.append(zlib.crc32(lines))
            offsets.append(offsets[-1] + len(lines))
            total += len(part)
            longest = max(longest, *(len(name.encode()) for _, name in part))
            if longest > MAX_NAME_BYTES:
                raise _name_too_long(part)
            if sink is not None:
                sink.write(lines)
        return cls(total, digest.hexdigest(), longest, tuple(offsets), tuple(checksums))

    def images_of(self, shard: int, folder: Path) -> list[Image]:
        """Read the images of a shard, counted from the first shard of this list.

        Raises:
            StoreError: the file is missing or corrupted.
        """
        return _read_lines(folder / self.file, self.offsets[shard], self.offsets[shard + 1], self.crc32[shard])


def _name_too_long(images: Iterable[Image]) -> UserError:
    image_id, name = max(images, key=lambda image: len(image[1].encode()))
    return UserError(
        f"image {image_id}: file name {name[:40]!r}... has {len(name.encode())} bytes; at most {MAX_NAME_BYTES} are "
        "supported",
        "fix the entry in the captions file, or the key in the features file",
    )


@functools.lru_cache(maxsize=8)
def _read_lines(path: Path, start: int, stop: int, crc32: int) -> list[Image]:
    try:
        with open(path, "rb") as file:
            lines = os.pread(file.fileno(), stop - start, start)
    except FileNotFoundError as error:
        raise StoreError(f"{path}: {os_reason(error)}", RECREATE_HINT) from error
    if zlib.crc32(lines) != crc32:
        raise StoreError(f"{path}: corrupted: bytes {start} to {stop} do not match the plan", RECREATE_HINT)
    return [(image_id, name) for image_id, name in json.loads(b"[" + lines[:-1].replace(b"\n", b",") + b"]")]
