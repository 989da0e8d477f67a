"""A store's list of images: a file with a line each, written and compared as a stream, read shard by shard.

[image_id, "file_name"]
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
_MOST_NAME = 4096  # bytes, as of a path on Linux; a column of a store is as wide as its longest name
_quoted = json.encoder.encode_basestring


@dataclass(frozen=True)
class ImageList:
    """One list of images: its file's hash, and where each shard's lines stand in it.

    Attributes:
        images: how many.
        sha256: of the file.
        name_bytes: of the longest file name, in UTF-8.
        offsets: the byte where each shard's lines begin, and the end of the file.
        crc32: of each shard's lines.
    """

    images: int
    sha256: str
    name_bytes: int
    offsets: tuple[int, ...]
    crc32: tuple[int, ...]

    @property
    def file(self) -> str:
        """Its name; made from its content, so that workers who write it at once write the same."""
        return f"images-{self.sha256[:16]}.jsonl"

    @classmethod
    def make(cls, images: Iterable[Image], shard_size: int, folder: Path | None = None) -> ImageList:
        """Go through the images once; with a `folder`, write the list there.

        Raises:
            UserError: a file name of more than 4096 bytes.
        """
        if folder is None:
            return cls._scan(images, shard_size, None)
        new = not folder.exists()
        try:
            with temporary_file(folder / "images.jsonl") as temporary:
                with open(temporary, "wb") as sink:
                    made = cls._scan(images, shard_size, sink)
                put_in_place(temporary, folder / made.file)
        except BaseException:
            if new:  # empty, it would look like a store that was begun
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        return made

    @classmethod
    def _scan(cls, images: Iterable[Image], shard_size: int, sink: IO[bytes] | None) -> ImageList:
        total, longest = 0, 1
        digest, offsets, checksums = hashlib.sha256(), [0], []
        left = iter(images)
        while part := list(itertools.islice(left, shard_size)):
            lines = "".join(f"[{image_id}, {_quoted(name)}]\n" for image_id, name in part).encode()
            digest.update(lines)
            checksums.append(zlib.crc32(lines))
            offsets.append(offsets[-1] + len(lines))
            total += len(part)
            longest = max(longest, *(len(name.encode()) for _, name in part))
            if longest > _MOST_NAME:
                raise _too_long(part)
            if sink is not None:
                sink.write(lines)
        return cls(total, digest.hexdigest(), longest, tuple(offsets), tuple(checksums))

    def of(self, shard: int, folder: Path) -> list[Image]:
        """The images of a shard, counted from this list's first.

        Raises:
            StoreError: the list is missing or damaged.
        """
        return _read_lines(folder / self.file, self.offsets[shard], self.offsets[shard + 1], self.crc32[shard])


def _too_long(images: Iterable[Image]) -> UserError:
    image_id, name = max(images, key=lambda image: len(image[1].encode()))
    return UserError(
        f"image {image_id}: its file name {name[:40]!r}... has {len(name.encode())} bytes; a path has {_MOST_NAME} "
        "at most",
        "mend its entry in the captions file, or its key among the features",
    )


@functools.lru_cache(maxsize=8)
def _read_lines(path: Path, start: int, stop: int, crc32: int) -> list[Image]:
    try:
        with open(path, "rb") as file:
            lines = os.pread(file.fileno(), stop - start, start)
    except OSError as error:
        raise StoreError(f"{path}: {os_reason(error)}", _BEGIN_AGAIN) from error
    if zlib.crc32(lines) != crc32:
        raise StoreError(f"{path}: damaged: bytes {start} to {stop} are not those of the plan", _BEGIN_AGAIN)
    return [(image_id, name) for image_id, name in json.loads(b"[" + lines[:-1].replace(b"\n", b",") + b"]")]


_BEGIN_AGAIN = "delete plan.json there and run the same extract-features command again: it keeps the shards"
