"""WebDataset tars: the `.txt` or `.json` member next to an image of the same key contains its caption."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, ClassVar

from gridcap.common.captions.records import CaptionSet, Problems
from gridcap.common.captions.rows import CAPTION_COLUMNS, RowColumns, read_rows
from gridcap.common.captions.source import CaptionsFile, decode
from gridcap.common.errors import AnnotationError
from gridcap.common.sources.registry import IMAGE_SUFFIXES

MAGIC, MAGIC_POSITION = b"ustar", 257
MAX_MEMBER_BYTES = 1 << 24
COLUMNS = RowColumns("image", ("caption",))


class WebDataset:
    """WebDataset tar; the file name of an image is the name of its member."""

    name: ClassVar[str] = "WebDataset tar"
    example: ClassVar[str] = "members 0001.jpg and 0001.txt or 0001.json"

    def sniff(self, file: CaptionsFile) -> bool:
        """Return whether it is an uncompressed tar."""
        return file.head[MAGIC_POSITION:].startswith(MAGIC)

    def read(self, file: CaptionsFile) -> CaptionSet:
        """Read all images; the file has one part."""
        problems = Problems()
        try:
            with tarfile.open(file.path, "r:") as tar:
                images, texts = _members(tar, file, problems)
        except (tarfile.TarError, OSError) as error:
            raise AnnotationError(f"{file.path}: cannot be read as tar: {error}", "write the file again") from error
        loaded = read_rows(_rows(images, texts), COLUMNS, file, problems)
        return CaptionSet(loaded.records, problems)


def _members(
    tar: tarfile.TarFile, file: CaptionsFile, problems: Problems
) -> tuple[dict[str, str], dict[str, list[Any]]]:
    """Return key -> name of the image, and key -> captions. The key is the name up to the first dot of its last part.

    A `.txt` member takes precedence over a `.json` member, which repeats its caption.
    """
    images: dict[str, str] = {}
    texts: dict[str, list[Any]] = {}
    from_txt: set[str] = set()
    for member in tar:
        suffix = PurePosixPath(member.name).suffix.lower()
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        key = folder + slash + base.partition(".")[0]
        if not member.isfile():
            continue
        if suffix in IMAGE_SUFFIXES:
            images[key] = member.name.removeprefix("./")
        elif suffix in (".txt", ".json") and member.size <= MAX_MEMBER_BYTES:
            stream = tar.extractfile(member)
            content = b"" if stream is None else stream.read()
            if suffix == ".txt":
                texts[key] = [line for line in decode(content, file.path / member.name).splitlines() if line.strip()]
                from_txt.add(key)
            elif key not in from_txt:
                texts[key] = _captions_of_json(content, member.name, problems)
    return images, texts


def _captions_of_json(content: bytes, name: str, problems: Problems) -> list[Any]:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        problems.add("member that is not valid JSON", name)
        return []
    value = next((tree[key] for key in CAPTION_COLUMNS if key in tree), None) if isinstance(tree, dict) else tree
    return value if isinstance(value, list) else [value]


def _rows(images: Mapping[str, str], texts: Mapping[str, list[Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, name in images.items():
        yield name, {"image": name, "caption": texts.get(key) or ""}


FORMAT = WebDataset()
