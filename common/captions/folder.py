"""Listing the images of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from gridcap.common.captions.limit import check_invalid
from gridcap.common.captions.records import CaptionSet, ImageRecord, Problems, id_from_name, is_utf8
from gridcap.common.errors import AnnotationError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".avif", ".heic", ".heif", ".jxl"),
)
NOT_FOLLOWED = "set data.follow_links=true to include them"
NO_EXTENSION = "without an extension"
LOOP = "they lead back to a parent folder"


class FolderImages:
    """All images below a folder, sorted by path, without captions. Every command lists folders through this class.

    Each iteration reads the folder again and holds the names of one subfolder at a time, so the number of images is
    not limited by memory.

    Args:
        folder: the image folder.
        max_invalid: limit on invalid file names.
        follow_links: whether to descend into linked folders; a link to one of its own parents is skipped.

    Attributes:
        problems: invalid file names and skipped entries; complete after an iteration.

    Raises:
        AnnotationError: during iteration: the folder is missing or contains no images, or too many names are invalid.
    """

    def __init__(self, folder: Path, max_invalid: str = "100%", follow_links: bool = False) -> None:
        self._folder = folder
        self._max_invalid = max_invalid
        self._follow_links = follow_links
        self.problems = Problems()

    def __iter__(self) -> Iterator[ImageRecord]:
        if not self._folder.is_dir():
            raise AnnotationError(f"{self._folder}: no such image folder", "check the path of the image folder")
        self.problems.clear()
        valid = 0
        for name in self._names_below("", frozenset()):
            if not is_utf8(name):
                self.problems.add("file name that is not UTF-8", ascii(name))
                continue
            valid += 1
            yield ImageRecord(id_from_name(name), name)
        if not valid:
            reasons = "".join(f"; {line}" for line in self.problems.lines())
            raise AnnotationError(
                f"{self._folder}: contains no images{reasons}", f"supported formats: {', '.join(IMAGE_SUFFIXES)}"
            )
        check_invalid(self._folder, self.problems, valid, self._max_invalid, "rename the files")

    def _names_below(self, prefix: str, parents: frozenset[tuple[int, int]]) -> Iterator[str]:
        """Yield the image files below a subfolder in the order of their full paths: "a-b/x" comes before "a/x"."""
        status = (self._folder / prefix).stat()
        parents |= {(status.st_dev, status.st_ino)}
        names = []
        with os.scandir(self._folder / prefix) as entries:
            for entry in entries:
                if _is_folder(entry):
                    if self._descends(entry, parents):
                        names.append(entry.name + "/")
                elif entry.name.startswith("._"):
                    continue  # macOS metadata
                elif _is_image(entry):
                    names.append(entry.name)
                else:
                    self.problems.skipped[Path(entry.name).suffix.lower() or NO_EXTENSION] += 1
        for name in sorted(names):
            if name.endswith("/"):
                yield from self._names_below(prefix + name, parents)
            else:
                yield prefix + name

    def _descends(self, entry: os.DirEntry[str], parents: frozenset[tuple[int, int]]) -> bool:
        """Return whether a subfolder is listed; count it if it is not."""
        if not entry.is_symlink():
            return True
        if not self._follow_links:
            self.problems.skipped_folders[NOT_FOLLOWED] += 1
            return False
        status = entry.stat()
        if (status.st_dev, status.st_ino) in parents:
            self.problems.skipped_folders[LOOP] += 1
            return False
        return True


def list_images(folder: Path, max_invalid: str = "100%", follow_links: bool = False) -> CaptionSet:
    """Return all images below a folder as a list; see `FolderImages` for arguments and errors."""
    images = FolderImages(folder, max_invalid, follow_links)
    return CaptionSet(list(images), images.problems)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is an image by its name. A broken link counts: it is a missing image."""
    is_file = entry.is_symlink() or entry.is_file(follow_symlinks=False)
    return is_file and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES
