"""A captions file that is being read, and the interface of captions formats."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar, Protocol

from gridcap.common.captions.records import CaptionSet
from gridcap.common.errors import AnnotationError

SNIFFED_BYTES = 1 << 16
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Columns:
    """Columns chosen by the user; None: by name.

    Attributes:
        image: column with the file name or the id of the image.
        caption: column with the caption.
        group: column whose value is equal for near-duplicate images; None: no groups.
    """

    image: str | None = None
    caption: str | None = None
    group: str | None = None

    def given(self) -> tuple[str, ...]:
        """Return the columns that must exist."""
        return tuple(name for name in (self.image, self.caption, self.group) if name is not None)


@dataclass
class CaptionsFile:
    """A captions file: its path, and its content in the forms that formats need, loaded when used.

    Attributes:
        path: a file, or a folder of Parquet files.
        part: part to read of a file that contains several: train, val, test, or another value of a split column.
        columns: columns chosen by the user.
    """

    path: Path
    part: str = "train"
    columns: Columns = field(default_factory=Columns)

    @property
    def suffix(self) -> str:
        """The extension in lower case, with its dot."""
        return self.path.suffix.lower()

    @cached_property
    def head(self) -> bytes:
        """The first bytes of the file; empty for a folder."""
        if self.path.is_dir():
            return b""
        try:
            with self.path.open("rb") as file:
                return file.read(SNIFFED_BYTES)
        except OSError as error:
            raise AnnotationError(f"{self.path}: {error.strerror}", "check the path of the captions file") from error

    @cached_property
    def text(self) -> str:
        """The decoded text.

        Raises:
            AnnotationError: unreadable, not text, or not UTF-8.
        """
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise AnnotationError(f"{self.path}: {error.strerror}", "check the path of the captions file") from error
        return decode(content, self.path)

    @property
    def is_text(self) -> bool:
        """Whether the file may be text: it has no zero bytes at its beginning."""
        return not self.path.is_dir() and b"\0" not in self.head

    @cached_property
    def is_json(self) -> bool:
        """Whether the file is one JSON value, by its name or its first character."""
        if not self.is_text or self.suffix in JSON_LINES_SUFFIXES:
            return False
        return self.suffix == ".json" or self.text.lstrip()[:1] in ("{", "[")

    @cached_property
    def tree(self) -> Any:
        """The parsed JSON; None if the file is not JSON by its name and first character.

        Raises:
            AnnotationError: the file looks like JSON, but is not valid.
        """
        return parse_json(self.text, self.path) if self.is_json else None


class CaptionsFormat(Protocol):
    """A format of captions files.

    Attributes:
        name: name of the format, for messages.
        example: the beginning of such a file, or its layout, for messages.
    """

    name: ClassVar[str]
    example: ClassVar[str]

    def sniff(self, file: CaptionsFile) -> bool:
        """Return whether the content of a file is in this format. Formats are tried in the order of module names."""
        ...

    def read(self, file: CaptionsFile) -> CaptionSet:
        """Read the images of a part with their captions.

        Raises:
            AnnotationError: the file cannot be used.
        """
        ...


def decode(content: bytes, path: Path) -> str:
    """Decode UTF-8 text, with or without a byte order mark.

    Raises:
        AnnotationError: not UTF-8.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = _guess_encoding(content)
        if encoding is None:
            message = f"{path}: not a text file (byte {error.start} is not UTF-8)"
            raise AnnotationError(message, "pass a captions file; see docs/captions.md for the formats") from error
        raise _encoding_error(path, encoding) from error
    if "\0" in text[:4]:  # ASCII characters encoded as UTF-16 are valid UTF-8
        raise _encoding_error(path, "UTF-16")
    return text


def parse_json(text: str, path: Path) -> Any:
    """Parse JSON.

    Raises:
        AnnotationError: not valid.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise AnnotationError(
            f"{path}: not valid JSON: {position}", "if the file is truncated, download or write it again"
        ) from error
    except (ValueError, RecursionError) as error:  # an integer with thousands of digits, or deep nesting
        raise AnnotationError(f"{path}: not valid JSON: {error}", "write the file again") from error


def _guess_encoding(content: bytes) -> str | None:
    """Guess the encoding of text that is not UTF-8; None if it is not text."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:2]:
        return "UTF-16"
    controls = set(range(32)) - set(b"\t\n\f\r")
    return None if controls & set(content) else "CP1252"


def _encoding_error(path: Path, encoding: str) -> AnnotationError:
    name = {"CP1252": "probably CP1252 (Windows) or Latin-1"}.get(encoding, encoding)
    return AnnotationError(
        f"{path}: not UTF-8 text; the encoding is {name}",
        f"convert the file: iconv -f {encoding} -t UTF-8 {quote(path.name)} > {quote('utf8_' + path.name)}",
    )
