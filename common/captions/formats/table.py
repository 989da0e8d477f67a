"""Tables with a header: CSV, TSV, and files separated by semicolons or vertical bars (Flickr30k's `results.csv`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from gridcap.common.captions.records import CaptionSet, Problems
from gridcap.common.captions.rows import RowColumns, find_columns, missing_columns, read_rows
from gridcap.common.captions.source import SNIFFED_BYTES, CaptionsFile
from gridcap.common.errors import AnnotationError
from gridcap.common.sources.registry import IMAGE_SUFFIXES

DELIMITERS = (",", "\t", "|", ";")
TABLE_SUFFIXES = (".csv", ".tsv")
TEXT_SUFFIXES = (*TABLE_SUFFIXES, ".txt", ".tab", ".dat", "")
MAX_LINES = 1000  # physical lines of one quoted caption


@dataclass(frozen=True)
class _Layout:
    """How a table is read.

    Attributes:
        delimiter: separator of the cells.
        names: names of the columns.
        columns: columns with the image, the captions, the split, and the group.
        has_header: whether the first row contains the names.
    """

    delimiter: str
    names: list[str]
    columns: RowColumns
    has_header: bool


class Table:
    """A table with a header; a table of two columns, image and caption, needs none."""

    name: ClassVar[str] = "table (CSV, TSV, or separated by | or ;)"
    example: ClassVar[str] = "header image,caption,... in any order"

    def sniff(self, file: CaptionsFile) -> bool:
        """Return whether the columns of a text file are recognized; a file named .csv or .tsv always is a table."""
        if not file.is_text or file.text.lstrip()[:1] in ("{", "["):
            return False
        if file.suffix in TABLE_SUFFIXES and "#0\t" not in file.text[:4096]:
            return True
        return "#0\t" not in file.text[:4096] and _find_layout(file) is not None

    def read(self, file: CaptionsFile) -> CaptionSet:
        """Read the rows of a part.

        In a table with a header whose last column is the caption, the excess cells of a row are part of its caption,
        and a note reports their number. Without a header, or with other columns after the caption, they are errors.
        """
        layout = _find_layout(file)
        if layout is None:
            raise missing_columns(file, _first_row(file.text, _most_frequent(file.text)))
        problems = Problems()
        return read_rows(_named_rows(layout, file, problems), layout.columns, file, problems)


def is_image_name(cell: str) -> bool:
    """Return whether a cell ends like the file name of an image."""
    return cell.strip().lower().endswith(IMAGE_SUFFIXES)


def _first_row(text: str, delimiter: str) -> list[str]:
    lines = (line for line in io.StringIO(text[:SNIFFED_BYTES], newline="") if line.strip())
    try:
        return next(csv.reader(lines, delimiter=delimiter), [])
    except csv.Error:
        return []


def _most_frequent(text: str) -> str:
    first = next((line for line in text[:SNIFFED_BYTES].splitlines() if line.strip()), "")
    return max(DELIMITERS, key=first.count)


def _find_layout(file: CaptionsFile) -> _Layout | None:
    """Find the delimiter and the columns; None if they are not recognized."""
    for delimiter in DELIMITERS:
        names = _first_row(file.text, delimiter)
        if not any(map(is_image_name, names)) and (columns := find_columns(names, file.columns)) is not None:
            return _Layout(delimiter, names, columns, True)
    if file.columns.given():
        return None
    for delimiter in DELIMITERS:
        cells = _first_row(file.text, delimiter)
        if len(cells) > 1 and is_image_name(cells[0]):
            return _Layout(delimiter, ["image", "caption"], RowColumns("image", ("caption",)), False)
    cells = _first_row(file.text, ",")
    if len(cells) == 1 and is_image_name(cells[0]) and file.suffix in TABLE_SUFFIXES:
        return _Layout(",", ["image", "caption"], RowColumns("image", ("caption",)), False)
    return None


def _named_rows(layout: _Layout, file: CaptionsFile, problems: Problems) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield (position, column -> cell) of the rows that have an image."""
    names, columns = layout.names, layout.columns
    image = names.index(columns.image)
    joins = columns.captions[-1] == names[-1] and len(columns.captions) == 1
    expects_suffix: bool | None = None if layout.has_header else True
    for count, (line, row) in enumerate(_rows(file.text, layout, problems)):
        if count == 0 and layout.has_header:
            continue
        position = f"line {line}"
        if len(row) > len(names) and not layout.has_header and is_image_name(row[0]):
            raise _header_error(file, line, row)
        if len(row) > len(names) and not joins and any(cell.strip() for cell in row[len(names) :]):
            problems.add("row with more cells than the header", position)
            continue
        if expects_suffix is None:
            expects_suffix = len(row) > image and is_image_name(row[image])
        if len(row) <= image or (expects_suffix and not is_image_name(row[image])):
            problems.add("line whose image column is not an image file name", position)
            continue
        if len(row) > len(names) and joins:
            excess = layout.delimiter.join(row[len(names) - 1 :])
            row = [*row[: len(names) - 1], excess]
            problems.notes[f"caption with unquoted {layout.delimiter!r}: the rest of the line was read as caption"] += 1
        yield position, dict(zip(names, row, strict=False))


def _header_error(file: CaptionsFile, line: int, row: list[str]) -> AnnotationError:
    columns = " | ".join(cell.strip()[:80] for cell in row[:8])
    return AnnotationError(
        f"{file.path}: line {line} has {len(row)} columns, and the file has no header: {columns}",
        "add a header such as image,caption, and put quotes around captions that contain commas",
    )


def _rows(text: str, layout: _Layout, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) per non-empty row; a quoted cell may span several lines.

    A quote that is never closed must not swallow the rows after it: the row is counted as a problem, and reading
    resumes with the next line.
    """
    lines = io.StringIO(text, newline="").readlines()
    start = 0
    while start < len(lines):
        window = lines[start : start + (MAX_LINES if '"' in lines[start] else 1)]
        reader = csv.reader(window, delimiter=layout.delimiter)
        try:
            row = next(reader, [])
        except csv.Error as error:
            problems.add(f"line that is not CSV ({error})", f"line {start + 1}")
            start += 1
            continue
        span = max(1, reader.line_num)
        if '"' in lines[start] and _is_unclosed(lines[start : start + span], row, layout):
            problems.add("quote that is never closed", f"line {start + 1}")
            span = 1
        elif any(cell.strip() for cell in row):
            yield start + 1, row
        start += span


def _is_unclosed(lines: list[str], row: list[str], layout: _Layout) -> bool:
    """Return whether the quote that spans these lines is missing its end: the next rows have been read as text."""
    image = layout.names.index(layout.columns.image)
    if len(lines) > 1:
        if image == 0 and any(is_image_name(line.split(layout.delimiter)[0]) for line in lines[1:]):
            return True
        if len(row) <= image:
            return True
    try:
        for _ in csv.reader(lines, delimiter=layout.delimiter, strict=True):
            pass
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


FORMAT = Table()
