"""The path of an image inside its folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gridcap.common.errors import InvalidImageError

INVALID_CHARACTERS = re.compile("[\0\ud800-\udfff]")


def image_path(folder: Path, name: str, follow_links: bool) -> Path:
    """Return the path of an image.

    Args:
        folder: the image folder.
        name: file name relative to the folder.
        follow_links: whether symbolic links may lead out of the folder.

    Raises:
        InvalidImageError: the name is invalid, or the path leads out of the folder.
    """
    if name.startswith("/") or ".." in name.split("/"):
        raise InvalidImageError("file name leads out of the image folder")
    if INVALID_CHARACTERS.search(name):
        raise InvalidImageError("invalid file name")
    path = folder / name
    if follow_links or not _has_link(folder, name):
        return path
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise InvalidImageError("link leads out of the image folder (--set data.follow_links=true allows it)")
    return path


def _has_link(folder: Path, name: str) -> bool:
    """Return whether any component of a name is a link. Much cheaper than resolving the path."""
    path = str(folder)
    for part in name.split("/"):
        path = f"{path}/{part}"
        if os.path.islink(path):  # noqa: PTH114 (creating a Path takes longer than the check)
            return True
    return False
