"""A zip file, read in place."""

from __future__ import annotations

import functools
import zipfile
import zlib
from pathlib import Path

from gridcap.common.errors import AnnotationError, InvalidImageError
from gridcap.common.sources.registry import MAX_MEMBER_BYTES, MemberSource, register_source
from gridcap.common.sources.storage import Storage, is_named

ENCRYPTED = 1  # flag bit


@register_source
class ZipSource(MemberSource):
    """The images in a zip file, local or remote.

    `zipfile.ZipFile` may be read by several threads; it serializes the reads and decompresses in parallel.
    """

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether the path ends with .zip."""
        return is_named(path, ".zip")

    def _list(self) -> list[str]:
        return [member.filename for member in self._archive.infolist() if not member.is_dir()]

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
