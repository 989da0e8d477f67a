"""The interface and the registry of image sources.

A source is one module with a subclass of `ImageSource`. `open_source` chooses it by the path.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gridcap.common.captions.records import Problems, is_utf8
from gridcap.common.errors import InvalidImageError, PathError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".avif", ".heic", ".heif", ".jxl"),
)
MAX_MEMBER_BYTES = 2**28
NO_EXTENSION = "without an extension"
_URL = re.compile(r"([a-z][a-z0-9+]+):/+(.*)", re.DOTALL)  # Path drops one of the slashes


class ImageSource(ABC):
    """A place from which images are read.

    Args:
        path: the path that the user gave; `url_of` returns it as a URL if it is one.
        follow_links: whether symbolic links may lead out of a folder.
    """

    def __init__(self, path: Path, follow_links: bool) -> None:
        self.path = path
        self.follow_links = follow_links

    def __str__(self) -> str:
        return url_of(self.path) or str(self.path)

    @classmethod
    @abstractmethod
    def matches(cls, path: Path) -> bool:
        """Return whether this is the source for a path, without reading anything but the type of a local file."""

    @abstractmethod
    def names(self, problems: Problems) -> Iterator[str]:
        """Yield the names of the images in a fixed order, and count what is skipped or invalid.

        Raises:
            AnnotationError: the source cannot be read.
        """

    @abstractmethod
    def locate(self, name: str) -> ImageFile:
        """Return the file of an image, given its name. Thread-safe.

        Raises:
            InvalidImageError: there is no such image, or its name is not allowed.
        """


@dataclass(frozen=True)
class Member:
    """An image file inside an archive or in object storage.

    Attributes:
        label: name of the file for messages.
        read_bytes: returns its content; raises InvalidImageError if the content is corrupted, OSError otherwise.
    """

    label: str
    read_bytes: Callable[[], bytes]

    def __str__(self) -> str:
        return self.label


ImageFile = Path | Member
SourceClass = TypeVar("SourceClass", bound=type[ImageSource])
_SOURCES: list[type[ImageSource]] = []


def register_source(source: SourceClass) -> SourceClass:
    """Register the decorated subclass of `ImageSource`. Later registrations are asked first."""
    _SOURCES.insert(0, source)
    return source


def open_source(path: Path, follow_links: bool = False) -> ImageSource:
    """Return the source for a path; nothing is read yet.

    Raises:
        PathError: there is no such folder or file, or no source reads it.
    """
    source = find_source(path)
    if source is None:
        problem = "no such folder or archive of images"
        if path.is_file():
            problem = "not a folder, list (.txt, .csv), .zip, .tar, or .parquet file of images"
        raise PathError(f"{path}: {problem}", "check the path of the images")
    return source(path, follow_links)


def find_source(path: Path) -> type[ImageSource] | None:
    """Return the class of the source for a path; None if there is none."""
    _load_modules()
    return next((source for source in _SOURCES if source.matches(path)), None)


@functools.cache
def _load_modules() -> None:
    """Import the modules of this package, which register their sources."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")


def url_of(path: Path) -> str | None:
    """Return a path as a URL such as s3://bucket/photos.zip; None for a local path."""
    match = _URL.fullmatch(str(path))
    return f"{match[1]}://{match[2]}" if match else None


def keep_images(names: Iterable[str], problems: Problems) -> Iterator[str]:
    """Yield the names with the suffix of an image, sorted and without duplicates; count the others.

    Metadata of macOS (``__MACOSX/``, ``._name``) is ignored.
    """
    kept: set[str] = set()
    for name in names:
        base = name.rpartition("/")[2]
        suffix = Path(base).suffix.lower()
        if base.startswith("._") or name.startswith("__MACOSX/"):
            continue
        if not is_utf8(name):
            problems.add("file name that is not UTF-8", ascii(name))
        elif suffix not in IMAGE_SUFFIXES:
            problems.skipped[suffix or NO_EXTENSION] += 1
        elif name.startswith("/") or ".." in name.split("/"):
            problems.add("name that leads out of the archive", name)
        elif name in kept:
            problems.add("repeated name", name)
        else:
            kept.add(name)
    yield from sorted(kept)


class MemberNames:
    """The names in an archive, and those by which captions files may call them.

    A name is looked up exactly, then as the end of a path: "COCO_1.jpg" finds "train2014/COCO_1.jpg" if no other
    member ends with it.

    Args:
        names: the names of all images.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._by_base: dict[str, list[str]] | None = None

    def resolve(self, name: str) -> str:
        """Return the full name.

        Raises:
            InvalidImageError: no member has this name, or several do.
        """
        if name in self._names:
            return name
        if self._by_base is None:
            by_base = defaultdict(list)
            for member in sorted(self._names):
                by_base[member.rpartition("/")[2]].append(member)
            self._by_base = by_base
        matches = [m for m in self._by_base.get(name.rpartition("/")[2], ()) if m.endswith(f"/{name}")]
        if len(matches) > 1:
            raise InvalidImageError(f"several files end with this name: {', '.join(matches[:2])}")
        if not matches:
            raise InvalidImageError("not in the archive")
        return matches[0]


class MemberSource(ImageSource):
    """Base class of sources whose images are members that are listed once: archives and remote folders."""

    def __init__(self, path: Path, follow_links: bool) -> None:
        super().__init__(path, follow_links)
        self._lock = threading.Lock()

    @abstractmethod
    def _list(self) -> list[str]:
        """Return the names of all files. Called once."""

    @abstractmethod
    def _read(self, name: str) -> bytes:
        """Return the content of a file, see `Member.read_bytes`. Thread-safe."""

    def names(self, problems: Problems) -> Iterator[str]:
        """Yield the names of the image files."""
        return keep_images(self._listed, problems)

    def locate(self, name: str) -> Member:
        """Return an image file."""
        with self._lock:
            full = self._members.resolve(name)
        return Member(f"{self}/{full}", functools.partial(self._read, full))

    @functools.cached_property
    def _listed(self) -> list[str]:
        return self._list()

    @functools.cached_property
    def _members(self) -> MemberNames:
        return MemberNames(keep_images(self._listed, Problems()))
