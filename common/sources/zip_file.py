"""A zip file, read in place."""

from __future__ import annotations

import functools
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from gridcap.common.captions.records import Problems
from gridcap.common.errors import AnnotationError, InvalidImageError
from gridcap.common.sources.registry import (
    MAX_MEMBER_BYTES,
    ImageSource,
    Member,
    MemberNames,
    keep_images,
    register_source,
)
from gridcap.common.sources.storage import Storage, is_named

ENCRYPTED = 1  # flag bit


@register_source
class ZipSource(ImageSource):
    """The images in a zip file, local or remote.

    `zipfile.ZipFile` may be read by several threads; it serializes the reads and decompresses in parallel.
    """

    def __init__(self, path: Path, follow_links: bool) -> None:
        super().__init__(path, follow_links)
        self._lock = threading.Lock()

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether the path ends with .zip."""
        return is_named(path, ".zip")

    def names(self, problems: Problems) -> Iterator[str]:
        """Yield the names of the image files."""
        return keep_images((m.filename for m in self._archive.infolist() if not m.is_dir()), problems)

    def locate(self, name: str) -> Member:
        """Return an image file in the archive."""
        with self._lock:
            full = self._members.resolve(name)
        return Member(f"{self}/{full}", functools.partial(self._read, full))

    def _read(self, name: str) -> bytes:
        member = self._archive.getinfo(name)
        if member.flag_bits & ENCRYPTED:
            raise InvalidImageError("encrypted in the zip file")
        if member.file_size > MAX_MEMBER_BYTES:
            raise InvalidImageError(f"larger than {MAX_MEMBER_BYTES >> 20} MiB")
        try:
            return self._archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise InvalidImageError(f"corrupted in the zip file: {error}") from error

    @functools.cached_property
    def _archive(self) -> zipfile.ZipFile:
        storage = Storage(self.path)
        file = storage.open(storage.root)
        try:
            return zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise AnnotationError(f"{self}: not a complete zip file: {error}", "copy or download it again") from error

    @functools.cached_property
    def _members(self) -> MemberNames:
        return MemberNames(keep_images((m.filename for m in self._archive.infolist() if not m.is_dir()), Problems()))
