"""Rows with an image and captions, which tables, JSON lists, JSON Lines, and Parquet files have in common."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from gridcap.common.captions.records import (
    CaptionSet,
    ImageRecord,
    Problems,
    check_file_name,
    clean_caption,
    id_from_name,
    is_image_id,
    shorten,
)
from gridcap.common.captions.source import CaptionsFile, Columns
from gridcap.common.errors import AnnotationError

IMAGE_COLUMNS = (
    *("image", "file_name", "filename", "image_path", "image_name", "file_path", "filepath", "path", "img", "file"),
    *("image_id", "__key__", "image_url", "url"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "sentence", "sentences", "comment", "comments", "caption_str", "raw"),
    *("description", "txt"),
)
SPLIT_COLUMNS = ("split", "set_name", "set", "partition")
NUMBERED_CAPTION = re.compile(r"(caption|text|sentence|comment)[_ -]?\d+")
INTEGER = re.compile(r"(-?[0-9]{1,19})(\.0+)?")
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class RowColumns:
    """The columns that rows are read from.

    Attributes:
        image: column of the file name or id of the image.
        captions: columns of the captions.
        split: column that assigns rows to parts, or None.
        group: column of the group key, or None.
    """

    image: str
    captions: tuple[str, ...]
    split: str | None = None
    group: str | None = None

    def roles(self) -> dict[str, str]:
        """Return role -> names of columns, for messages."""
        roles = {"image": self.image, "caption": ", ".join(self.captions), "split": self.split, "group": self.group}
        return {role: names for role, names in roles.items() if names is not None}


def find_columns(names: Sequence[str], columns: Columns) -> RowColumns | None:
    """Choose the columns of rows by their names; case and surrounding spaces do not matter.

    Args:
        names: names of all columns.
        columns: columns chosen by the user.

    Returns:
        The columns, or None if there is no image column or no caption column.
    """
    by_name = {name.strip().lower(): name for name in reversed(names)}

    def first(candidates: Iterable[str]) -> str | None:
        return next((by_name[name] for name in candidates if name in by_name), None)

    given = {name: by_name.get(name.strip().lower()) for name in columns.given()}
    if None in given.values():
        return None
    numbered = tuple(name for name in names if NUMBERED_CAPTION.fullmatch(name.strip().lower()))
    caption = given[columns.caption] if columns.caption else first(CAPTION_COLUMNS)
    image = given[columns.image] if columns.image else first(IMAGE_COLUMNS)
    captions = (caption,) if caption is not None else numbered
    if image is None or not captions:
        return None
    return RowColumns(image, captions, first(SPLIT_COLUMNS), given[columns.group] if columns.group else None)


def missing_columns(file: CaptionsFile, names: Sequence[str]) -> AnnotationError:
    """Return the error for a file without an image column or a caption column."""
    shown = ", ".join(shorten(name.strip()) for name in names[:12])
    absent = [name for name in file.columns.given() if name.strip().lower() not in {n.strip().lower() for n in names}]
    if absent:
        return AnnotationError(f"{file.path}: no column {absent[0]!r}; columns: {shown}", "choose one of its columns")
    return AnnotationError(
        f"{file.path}: no image column and caption column recognized; columns: {shown}",
        "pass --image-column and --caption-column, or rename the columns to image,caption",
    )


@dataclass
class _Image:
    captions: list[str] = field(default_factory=list)
    group: str = ""
    image_id: int = 0


def read_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]], columns: RowColumns, file: CaptionsFile, problems: Problems
) -> CaptionSet:
    """Group rows by image and keep those of the file's part.

    Args:
        rows: (position for messages, column -> value) per row; several rows may describe one image.
        columns: the columns to read.
        file: the captions file, for its path and part.
        problems: receives invalid rows.

    Raises:
        AnnotationError: a file name leaves the image folder, or the split column does not contain the part.
    """
    reader = _RowReader(columns, file, problems)
    if columns.split is None:
        for position, row in rows:
            reader.add(position, row)
        return reader.result()
    others: list[tuple[str, Mapping[str, Any]]] = []  # rows before the first one of the part: it may have none
    values: dict[str, None] = {}
    for position, row in rows:
        value = str(row.get(columns.split) or "").strip()
        values[value] = None
        if is_of_part(value, file.part):
            reader.add(position, row)
        elif not reader.images:
            others.append((position, row))
    if not reader.images and others:
        _check_part(file, columns.split, values, problems)
        for position, row in others:
            reader.add(position, row)
    return reader.result()


def is_of_part(value: str, part: str) -> bool:
    """Return whether a value of a split column selects a part; "validation" and "dev" select val."""
    part = part.removeprefix("karpathy-").lower()
    return value.lower() in PARTS.get(part, (part,))


def _check_part(file: CaptionsFile, split: str, values: Iterable[str], problems: Problems) -> None:
    """Raise an error if a well-known part has no rows; other names of splits select all rows, with a note."""
    known = ", ".join(map(shorten, list(values)[:8]))
    if file.part.removeprefix("karpathy-") in PARTS:
        raise AnnotationError(
            f"{file.path}: no rows with {split} = {file.part} (values: {known})",
            "pass --split with one of these values",
        )
    problems.notes[f"column {split!r} ignored: it has no value {file.part!r} ({known})"] += 1


class _RowReader:
    """Rows grouped by image."""

    def __init__(self, columns: RowColumns, file: CaptionsFile, problems: Problems) -> None:
        self._columns = columns
        self._file = file
        self._problems = problems
        self.images: dict[str, _Image] = {}

    def add(self, position: str, row: Mapping[str, Any]) -> None:
        """Add one row, or count a problem."""
        columns = self._columns
        named = image_of(row.get(columns.image))
        if named is None:
            self._problems.add("row without an image", position)
            return
        image_id, name = named
        image = self.images.setdefault(check_file_name(name, self._file.path), _Image(image_id=image_id))
        if columns.group is not None:
            image.group = image.group or str(row.get(columns.group) or "")
        texts = [text for column in columns.captions for text in captions_of(row.get(column))]
        if len(columns.captions) > 1:  # images may have fewer captions than columns
            texts = [text for text in texts if isinstance(text, str) and text.strip()] or [""]
        for text in texts:
            if caption := clean_caption(text, position, self._problems):
                image.captions.append(caption)

    def result(self) -> CaptionSet:
        """Return the images; two names with one id are a problem."""
        records: list[ImageRecord] = []
        seen: dict[int, str] = {}
        for name, image in self.images.items():
            other = seen.setdefault(image.image_id, name)
            if other != name:
                self._problems.add("duplicate image id", f"{image.image_id}: {other} and {name}")
            else:
                records.append(ImageRecord(image.image_id, name, tuple(image.captions), image.group))
        return CaptionSet(records, self._problems, columns=self._columns.roles())


def image_of(value: Any) -> tuple[int, str] | None:
    """Return the id and the name of an image column's value; None if there is no usable value.

    Integers, integral floats, and their texts are ids. URLs become "host/path". A dict is an image of a Hugging Face
    dataset, which has a path.
    """
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return (value, str(value)) if is_image_id(value) else None
    if not isinstance(value, str) or not (name := value.strip()):
        return None
    if number := INTEGER.fullmatch(name):
        return (int(number[1]), number[1]) if is_image_id(int(number[1])) else None
    if "://" in name[:12]:
        parts = urlsplit(name)
        name = f"{parts.netloc}{parts.path}".rstrip("/")
    try:
        return id_from_name(name), name
    except UnicodeEncodeError:  # half of a surrogate pair
        return None


def captions_of(value: Any) -> list[Any]:
    """Return the captions in a value: a text, a list of texts, or the text of a list (JSON or Python)."""
    if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
        value = _parse_list(value)
    if isinstance(value, Mapping):
        return [next((value[key] for key in CAPTION_COLUMNS if key in value), None)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in (captions_of(item) if isinstance(item, Mapping) else [item])]
    return [value]


def _parse_list(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
    return text  # a caption in brackets
