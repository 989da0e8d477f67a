"""A folder in object storage or on another file system of fsspec."""

from __future__ import annotations

import functools
from pathlib import Path

from gridcap.common.errors import AnnotationError, InvalidImageError
from gridcap.common.sources.registry import MemberSource, register_source, url_of
from gridcap.common.sources.storage import Storage

ARCHIVES = (".zip", ".tar", ".parquet")


@register_source
class RemoteFolderSource(MemberSource):
    """All images below a remote folder: ``s3://bucket/photos``, ``gs://bucket/photos``.

    Listing uses the requests of the storage, so a plain web server, which has none, needs a zip or tar file.
    """

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether the path is a URL of anything but an archive."""
        return url_of(path) is not None and not str(path).lower().endswith(ARCHIVES)

    def _read(self, name: str) -> bytes:
        try:
            content: bytes = self._storage.fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError as error:
            raise InvalidImageError("missing") from error
        return content

    @functools.cached_property
    def _storage(self) -> Storage:
        return Storage(self.path)

    @property
    def _root(self) -> str:
        return str(self._storage.root).rstrip("/")

    def _list(self) -> list[str]:
        try:
            files = self._storage.fs.find(self._root)
        except FileNotFoundError as error:
            raise AnnotationError(f"{self}: no such folder", "check the address") from error
        return [file.removeprefix(f"{self._root}/") for file in files]
