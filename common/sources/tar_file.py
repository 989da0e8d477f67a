"""Tar files in WebDataset layout, as img2dataset writes them, read in place."""

from __future__ import annotations

import functools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gridcap.common.errors import AnnotationError, InvalidImageError
from gridcap.common.sources.registry import MAX_MEMBER_BYTES, MemberSource, register_source
from gridcap.common.sources.storage import Storage, is_named


@dataclass(frozen=True)
class _Position:
    """Where the content of a member is."""

    file: str
    offset: int
    size: int


@register_source
class TarSource(MemberSource):
    """The images in one or several tar files: ``cc3m/{00000..00331}.tar``, ``shards/*.tar``.

    The headers are read once; images are then read by position, in any order. With several files, the name of an image
    starts with the name of its file: ``00017/000170042.jpg``.
    """

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether the path ends with .tar."""
        return is_named(path, ".tar")

    def _list(self) -> list[str]:
        return [name for name, _ in self._entries]

    def _read(self, name: str) -> bytes:
        position = self._positions[name]
        if position.size > MAX_MEMBER_BYTES:
            raise InvalidImageError(f"larger than {MAX_MEMBER_BYTES >> 20} MiB")
        content: bytes = self._storage.fs.cat_file(position.file, position.offset, position.offset + position.size)
        if len(content) < position.size:
            raise InvalidImageError("truncated in the tar file")
        return content

    @functools.cached_property
    def _storage(self) -> Storage:
        return Storage(self.path)

    @functools.cached_property
    def _entries(self) -> list[tuple[str, _Position]]:
        files = self._storage.files()
        prefixes = [f"{PurePosixPath(file).stem}/" if len(files) > 1 else "" for file in files]
        return [
            (prefix + name, position)
            for prefix, file in zip(prefixes, files, strict=True)
            for name, position in self._scan(file)
        ]

    @functools.cached_property
    def _positions(self) -> dict[str, _Position]:
        return dict(reversed(self._entries))  # of a repeated name, the first counts

    def _scan(self, file: str) -> Iterator[tuple[str, _Position]]:
        label = self._storage.label(file)
        try:
            with self._storage.open(file) as opened, tarfile.open(fileobj=opened, mode="r:") as archive:
                for member in archive:
                    if member.isfile():
                        yield member.name.removeprefix("./"), _Position(file, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise AnnotationError(
                f"{label}: not a complete, uncompressed tar file: {error}", "copy it again, or unpack .tar.gz files"
            ) from error
