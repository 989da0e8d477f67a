"""A text file with one image per line, or a CSV file with a column of images."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterator
from pathlib import Path

from gridcap.common.captions.records import Problems, is_utf8
from gridcap.common.errors import AnnotationError, InvalidImageError
from gridcap.common.sources.registry import ImageSource, register_source
from gridcap.common.sources.storage import is_named

COLUMNS = ("image", "file_name", "filename", "image_path", "path", "file")
ABSOLUTE = "absolute path (set data.follow_links=true to allow paths outside the folder of the list)"


@register_source
class ListSource(ImageSource):
    """The images named in a list, in its order; paths are relative to the folder of the list.

    Absolute paths lead out of this folder, so they need `follow_links`, like symbolic links that do.
    """

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether the path is a local .txt or .csv file."""
        return path.is_file() and is_named(path, ".txt", ".csv")

    def names(self, problems: Problems) -> Iterator[str]:
        """Yield the paths as written."""
        seen: set[str] = set()
        for name in self._listed:
            if not is_utf8(name):
                problems.add("file name that is not UTF-8", ascii(name))
            elif name in seen:
                problems.add("repeated name", name)
            elif Path(name).is_absolute() and not self.follow_links:
                problems.add(ABSOLUTE, name)
            else:
                seen.add(name)
                yield name

    def locate(self, name: str) -> Path:
        """Return the path of an image."""
        from gridcap.common.image.path import image_path  # only here: it loads Pillow

        if Path(name).is_absolute():
            if not self.follow_links:
                raise InvalidImageError(ABSOLUTE)
            return Path(name)
        return image_path(self.path.parent, name, self.follow_links)

    @functools.cached_property
    def _listed(self) -> list[str]:
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise AnnotationError(f"{self.path}: not UTF-8 text", "save the list as UTF-8") from error
        if self.path.suffix.lower() == ".txt":
            return [line.strip() for line in text.splitlines() if line.strip()]
        rows = csv.DictReader(io.StringIO(text))
        columns = {name.strip().lower(): name for name in rows.fieldnames or ()}
        column = next((columns[name] for name in COLUMNS if name in columns), None)
        if column is None:
            raise AnnotationError(
                f"{self.path}: has no column of images (columns: {', '.join(columns) or 'none'})",
                f"name the column {' or '.join(COLUMNS[:2])}",
            )
        return [row[column].strip() for row in rows if row[column] and row[column].strip()]
