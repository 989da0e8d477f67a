"""Images with their captions, and the problems found while reading them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeGuard

from gridcap.common.errors import AnnotationError
from gridcap.common.text import escape_line, plural

MAX_EXAMPLES = 3  # per kind of problem
MAX_KINDS = 8  # file extensions that are counted separately in a message
INTEGER = re.compile("-?[0-9]{1,19}")
NO_ID = "image without a 64-bit integer id"


@dataclass(frozen=True)
class ImageRecord:
    """One image of a split.

    Attributes:
        image_id: 64-bit integer id.
        file_name: path relative to the image folder, separated by "/".
        captions: the K captions; may be empty.
        group: key that near-duplicate images share; empty if unknown.
    """

    image_id: int
    file_name: str
    captions: tuple[str, ...] = ()
    group: str = ""


@dataclass
class Problems:
    """Invalid items and skipped files, counted by kind.

    Attributes:
        counts: kind -> number of invalid items; these count towards `max_invalid`.
        examples: kind -> the first examples.
        skipped: file extension -> number of files that are not supported images (".heic" -> 3); never fatal.
        skipped_folders: reason -> number of linked folders; never fatal.
        notes: what was skipped or interpreted on purpose -> number of items; never fatal.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_folders: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Number of invalid items."""
        return sum(self.counts.values())

    def add(self, kind: str, example: object) -> None:
        """Count one invalid item."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(escape_line(shorten(example)))

    def clear(self) -> None:
        """Reset all counts."""
        self.counts.clear()
        self.examples.clear()
        self.skipped.clear()
        self.skipped_folders.clear()
        self.notes.clear()

    def lines(self) -> list[str]:
        """Return one line per kind, such as "3 x empty caption (annotation 17, annotation 90, ...)"."""
        lines = [
            f"{count} x {kind} ({', '.join(self.examples[kind])}{', ...' if count > MAX_EXAMPLES else ''})"
            for kind, count in self.counts.items()
        ]
        if self.skipped:
            kinds = [f"{count} {escape_line(kind)}" for kind, count in self.skipped.most_common(MAX_KINDS)]
            if others := self.skipped.total() - sum(count for _, count in self.skipped.most_common(MAX_KINDS)):
                kinds.append(f"{others} of other types")
            lines.append(f"skipped, not a supported image file: {', '.join(kinds)}")
        for reason, count in self.skipped_folders.items():
            lines.append(f"skipped: {plural(count, 'linked folder')} ({reason})")
        lines += [f"{count} x {note}" for note, count in self.notes.items()]
        return lines


@dataclass(frozen=True)
class CaptionSet:
    """The images of one split in file order, and the problems found while reading them.

    Attributes:
        records: the images.
        problems: invalid items.
        format: name of the format of the captions file; empty for an image folder.
        columns: role (image, caption, split, group) -> names of the columns it was read from, if the format has any.
    """

    records: list[ImageRecord]
    problems: Problems
    format: str = ""
    columns: dict[str, str] = field(default_factory=dict)


def id_from_name(file_name: str) -> int:
    """Return an image id for files that have none: 63 bits of the SHA-256 of the file name.

    The id does not depend on the other images. Among 10^8 names, the probability of a collision is 0.05%; writing a
    store with a collision fails.
    """
    return int.from_bytes(hashlib.sha256(file_name.encode()).digest()[:8], "big") >> 1


def join_captions(images: Iterable[tuple[int, str]], captions: dict[int, list[str]], problems: Problems) -> CaptionSet:
    """Join (id, file name) pairs with the captions of each id. Repeated ids are counted as problems."""
    records: list[ImageRecord] = []
    seen: set[int] = set()
    for image_id, file_name in images:
        if image_id in seen:
            problems.add("duplicate image id", f"{image_id} {file_name}")
            continue
        seen.add(image_id)
        records.append(ImageRecord(image_id, file_name, tuple(captions.get(image_id, ()))))
    return CaptionSet(records, problems)


def check_file_name(name: object, path: Path) -> str:
    """Return a file name that stays inside the image folder.

    Args:
        name: value read from a captions file.
        path: the captions file, for messages.

    Raises:
        AnnotationError: not a valid file name, or it leaves the image folder.
    """
    if not isinstance(name, str) or not name or "\0" in name or not is_utf8(name):
        raise AnnotationError(f"{path}: an image has an invalid file name: {shorten(name)!r}", "fix that entry")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise AnnotationError(
            f"{path}: the file name {shorten(name)!r} leaves the image folder",
            "use names relative to the image folder",
        )
    return name


def clean_caption(caption: object, source: str, problems: Problems) -> str | None:
    """Collapse white space in a caption. Return None and count a problem if it is empty or not a valid string."""
    if not isinstance(caption, str) or not caption.strip():
        problems.add("empty caption", source)
        return None
    if not is_utf8(caption):  # JSON can contain half of a surrogate pair, which no file can store
        problems.add("caption that is not valid Unicode", source)
        return None
    return " ".join(caption.split())


def is_image_id(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer that fits the 64-bit ids of a store."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def as_image_id(value: object) -> int | None:
    """Return the 64-bit id in an integer, an integral float, or a text; None if there is none.

    The id of a text that is not an integer is derived from the text.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        text = value.strip()
        if not text or not is_utf8(text):
            return None
        value = int(text) if INTEGER.fullmatch(text) else id_from_name(text)
    return value if is_image_id(value) else None


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8, as HDF5 and JSON require."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shorten(value: object) -> str:
    """Return the first 80 characters of a value, for messages."""
    try:
        return str(value)[:80]
    except (RecursionError, ValueError):  # deeply nested, or an integer with thousands of digits
        return "value too large to show"
