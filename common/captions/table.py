"""CSV tables with the columns image,caption, one line per caption (Flickr8k's `captions.txt`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from gridcap.common.captions.folder import IMAGE_SUFFIXES
from gridcap.common.captions.records import (
    CaptionSet,
    Problems,
    check_file_name,
    clean_caption,
    id_from_name,
    join_captions,
    shorten,
)
from gridcap.common.errors import AnnotationError

IMAGE_COLUMNS = ("image", "file_name", "filename")
MAX_LINES = 1000  # physical lines of one quoted caption


def read_table(text: str, path: Path) -> CaptionSet:
    """Read a CSV table with the columns image,caption; the header is optional.

    With a header, the unquoted commas of a caption are part of it. Without one, every row must have two columns: a
    third column could be a caption number as well as the rest of a caption.

    Args:
        text: content of the file.
        path: the file, for messages.

    Raises:
        AnnotationError: other columns, or a file name that leaves the image folder.
    """
    problems = Problems()
    captions: dict[str, list[str]] = {}
    header: list[str] | None = None
    for count, (line, row) in enumerate(_rows(text, problems)):
        if count == 0 and not _is_image_name(row[0]):
            header = _check_header(row, path)
            continue
        if not _is_image_name(row[0]):
            problems.add("line whose first column is not an image file name", f"line {line}")
            continue
        if len(row) > 2 and header is None:
            raise _columns_error(path, f"line {line} has {len(row)} columns", row)
        captions_of_image = captions.setdefault(check_file_name(row[0].strip(), path), [])
        if caption := clean_caption(",".join(row[1:]), f"line {line}", problems):
            captions_of_image.append(caption)
    by_id = {id_from_name(name): name for name in captions}
    return join_captions(by_id.items(), {image_id: captions[name] for image_id, name in by_id.items()}, problems)


def _is_image_name(cell: str) -> bool:
    return cell.strip().lower().endswith(IMAGE_SUFFIXES)


def _check_header(row: list[str], path: Path) -> list[str]:
    columns = [cell.strip().lower() for cell in row]
    if len(columns) == 2 and columns[0] in IMAGE_COLUMNS and columns[1] == "caption":
        return columns
    raise _columns_error(path, "unsupported columns", row)


def _columns_error(path: Path, message: str, row: list[str]) -> AnnotationError:
    columns = " | ".join(shorten(cell.strip()) for cell in row[:8])
    for name, delimiter in (("tabs", "\t"), ("semicolons", ";"), ("vertical bars", "|")):
        if delimiter in row[0]:
            message = f"columns separated by {name}"
    return AnnotationError(
        f"{path}: {message}: {columns}",
        "use two columns separated by a comma, image,caption, and put quotes around captions that contain commas",
    )


def _rows(text: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) per non-empty row; a quoted cell may span several lines.

    A quote that is never closed must not swallow the rows after it: the row is counted as a problem, and reading
    resumes with the next line.
    """
    lines = io.StringIO(text, newline="").readlines()
    start = 0
    while start < len(lines):
        reader = csv.reader(lines[start : start + (MAX_LINES if '"' in lines[start] else 1)])
        try:
            row = next(reader, [])
        except csv.Error as error:
            problems.add(f"line that is not CSV ({error})", f"line {start + 1}")
            start += 1
            continue
        span = max(1, reader.line_num)
        if '"' in lines[start] and _is_unclosed(lines[start : start + span]):
            problems.add("quote that is never closed", f"line {start + 1}")
            span = 1
        elif any(cell.strip() for cell in row):
            yield start + 1, row
        start += span


def _is_unclosed(lines: list[str]) -> bool:
    """Return whether the quote that spans these lines is missing its end: the next rows have been read as text."""
    if any(_is_image_name(line.partition(",")[0]) for line in lines[1:]):
        return True
    try:
        for _ in csv.reader(lines, strict=True):
            pass
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False
