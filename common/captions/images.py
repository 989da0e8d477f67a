"""The images of a source: a folder, a list, an archive, or object storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gridcap.common.captions.limit import check_invalid
from gridcap.common.captions.records import CaptionSet, ImageRecord, Problems, id_from_name
from gridcap.common.errors import AnnotationError
from gridcap.common.sources.registry import IMAGE_SUFFIXES, open_source


class SourceImages:
    """All images of a source, without captions. Every command lists images through this class.

    Each iteration reads the source again.

    Args:
        path: folder, list, archive, or URL of the images.
        max_invalid: limit on invalid names.
        follow_links: whether to descend into linked folders.

    Attributes:
        problems: invalid names and skipped entries; complete after an iteration.

    Raises:
        PathError: no source reads the path.
        AnnotationError: during iteration: the source is missing or contains no images, or too many names are invalid.
    """

    def __init__(self, path: Path, max_invalid: str = "100%", follow_links: bool = False) -> None:
        self._source = open_source(path, follow_links)
        self._max_invalid = max_invalid
        self.problems = Problems()

    def __iter__(self) -> Iterator[ImageRecord]:
        self.problems.clear()
        valid = 0
        for name in self._source.names(self.problems):
            valid += 1
            yield ImageRecord(id_from_name(name), name)
        if not valid:
            reasons = "".join(f"; {line}" for line in self.problems.lines())
            raise AnnotationError(
                f"{self._source}: contains no images{reasons}", f"supported formats: {', '.join(IMAGE_SUFFIXES)}"
            )
        check_invalid(self._source.path, self.problems, valid, self._max_invalid, "rename the files")


def list_images(path: Path, max_invalid: str = "100%", follow_links: bool = False) -> CaptionSet:
    """Return all images of a source as a list; see `SourceImages` for arguments and errors."""
    images = SourceImages(path, max_invalid, follow_links)
    return CaptionSet(list(images), images.problems)
