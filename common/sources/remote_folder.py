"""A folder in object storage or on another file system of fsspec."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path

from gridcap.common.captions.records import Problems
from gridcap.common.errors import AnnotationError, InvalidImageError
from gridcap.common.sources.registry import ImageSource, Member, MemberNames, keep_images, register_source, url_of
from gridcap.common.sources.storage import Storage

ARCHIVES = (".zip", ".tar", ".parquet")


@register_source
class RemoteFolderSource(ImageSource):
    """All images below a remote folder: ``s3://bucket/photos``, ``gs://bucket/photos``.

    Listing uses the requests of the storage, so a plain web server, which has none, needs a zip or tar file.
    """

    def __init__(self, path: Path, follow_links: bool) -> None:
        super().__init__(path, follow_links)
        self._lock = threading.Lock()

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether the path is a URL of anything but an archive."""
        return url_of(path) is not None and not str(path).lower().endswith(ARCHIVES)

    def names(self, problems: Problems) -> Iterator[str]:
        """Yield the paths of the images relative to the folder."""
        return keep_images(self._found, problems)

    def locate(self, name: str) -> Member:
        """Return an image file in the folder."""
        with self._lock:
            full = self._members.resolve(name)
        return Member(f"{self}/{full}", functools.partial(self._read, full))

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

    @functools.cached_property
    def _found(self) -> list[str]:
        try:
            files = self._storage.fs.find(self._root)
        except FileNotFoundError as error:
            raise AnnotationError(f"{self}: no such folder", "check the address") from error
        return [file.removeprefix(f"{self._root}/") for file in files]

    @functools.cached_property
    def _members(self) -> MemberNames:
        return MemberNames(keep_images(self._found, Problems()))
