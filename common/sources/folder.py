"""A local folder and its subfolders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from gridcap.common.captions.records import Problems, is_utf8
from gridcap.common.errors import AnnotationError
from gridcap.common.sources.registry import IMAGE_SUFFIXES, NO_EXTENSION, ImageSource, register_source

NOT_FOLLOWED = "set data.follow_links=true to include them"
LOOP = "they lead back to a parent folder"


@register_source
class FolderSource(ImageSource):
    """All images below a folder, sorted by path.

    Listing holds the names of one subfolder at a time, so the number of images is not limited by memory. A link to one
    of its own parents is skipped.
    """

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether the path is a local folder."""
        return path.is_dir()

    def names(self, problems: Problems) -> Iterator[str]:
        """Yield the paths of the images relative to the folder."""
        if not self.path.is_dir():
            raise AnnotationError(f"{self.path}: no such image folder", "check the path of the image folder")
        for name in self._names_below("", frozenset(), problems):
            if is_utf8(name):
                yield name
            else:
                problems.add("file name that is not UTF-8", ascii(name))

    def locate(self, name: str) -> Path:
        """Return the path of an image."""
        from gridcap.common.image.path import image_path  # only here: it loads Pillow

        return image_path(self.path, name, self.follow_links)

    def _names_below(self, prefix: str, parents: frozenset[tuple[int, int]], problems: Problems) -> Iterator[str]:
        """Yield the image files below a subfolder in the order of their full paths: "a-b/x" comes before "a/x"."""
        status = (self.path / prefix).stat()
        parents |= {(status.st_dev, status.st_ino)}
        names = []
        with os.scandir(self.path / prefix) as entries:
            for entry in entries:
                if _is_folder(entry):
                    if self._descends(entry, parents, problems):
                        names.append(entry.name + "/")
                elif entry.name.startswith("._"):
                    continue  # macOS metadata
                elif _is_image(entry):
                    names.append(entry.name)
                else:
                    problems.skipped[Path(entry.name).suffix.lower() or NO_EXTENSION] += 1
        for name in sorted(names):
            if name.endswith("/"):
                yield from self._names_below(prefix + name, parents, problems)
            else:
                yield prefix + name

    def _descends(self, entry: os.DirEntry[str], parents: frozenset[tuple[int, int]], problems: Problems) -> bool:
        """Return whether a subfolder is listed; count it if it is not."""
        if not entry.is_symlink():
            return True
        if not self.follow_links:
            problems.skipped_folders[NOT_FOLLOWED] += 1
            return False
        status = entry.stat()
        if (status.st_dev, status.st_ino) in parents:
            problems.skipped_folders[LOOP] += 1
            return False
        return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is an image by its name. A broken link counts: it is a missing image."""
    is_file = entry.is_symlink() or entry.is_file(follow_symlinks=False)
    return is_file and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES
