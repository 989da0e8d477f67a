"""Access to local and remote files through fsspec."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gridcap.common.errors import AnnotationError, UserError, first_line
from gridcap.common.sources.registry import url_of

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Storage:
    """The files that a path names: one file, a numbered range ``{000..331}``, or a pattern with ``*``.

    Args:
        path: a local path or a URL.

    Attributes:
        fs: the fsspec file system.
        root: the path on it.

    Raises:
        UserError: the protocol is unknown, or needs a package that is not installed.
    """

    def __init__(self, path: Path) -> None:
        import fsspec

        self._label = url_of(path) or str(path)
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self._label)
        except ImportError as error:
            raise UserError(
                f"{self._label}: {first_line(error)}", "pip install 'gridcap[cloud]' (S3, Google Cloud Storage, HTTP)"
            ) from error
        except ValueError as error:
            raise UserError(f"{self._label}: {first_line(error)}", "use s3://, gs://, https://, or a path") from error

    def files(self) -> list[str]:
        """Return the files, in order.

        Raises:
            AnnotationError: there is none.
        """
        if match := _RANGE.search(self.root):
            first, last = match[1], match[2]
            numbers = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
            return [f"{self.root[: match.start()]}{number}{self.root[match.end() :]}" for number in numbers]
        found: list[str] = sorted(self.fs.glob(self.root)) if "*" in self.root else [self.root]
        if not found:
            raise AnnotationError(f"{self._label}: no such files", "check the pattern")
        return found

    def open(self, file: str) -> Any:
        """Open a file for reading at any position.

        Raises:
            AnnotationError: it does not exist, or cannot be read.
        """
        try:
            return self.fs.open(file, "rb")
        except FileNotFoundError as error:
            raise AnnotationError(f"{self.label(file)}: no such file", "check the path of the images") from error

    def label(self, file: str) -> str:
        """Return the name of a file for messages."""
        protocol, separator, _ = self._label.partition("://")
        return f"{protocol}{separator}{file}" if separator and not file.startswith(f"{protocol}:") else file


def is_named(path: Path, *suffixes: str) -> bool:
    """Return whether a path ends with one of the suffixes and is remote, a pattern, or an existing local file."""
    text = str(path)
    if not text.lower().endswith(suffixes):
        return False
    return url_of(path) is not None or "*" in text or _RANGE.search(text) is not None or path.is_file()
