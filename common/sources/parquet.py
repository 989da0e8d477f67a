"""Parquet files with an image column, as Hugging Face datasets store images."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gridcap.common.errors import AnnotationError, InvalidImageError, UserError, first_line
from gridcap.common.sources.registry import MemberSource, register_source
from gridcap.common.sources.storage import Storage, is_named


@dataclass(frozen=True)
class _Cell:
    """Where an image is: file, row group, and row in the group."""

    file: str
    group: int
    row: int


@register_source
class ParquetSource(MemberSource):
    """The images in one or several Parquet files: ``data/train-*.parquet``.

    The image column is the first one whose values are structs with ``bytes`` (and ``path``), or else the first binary
    column. An image without a path is called ``<file>/<row>.jpg``; its format is recognized by its content.
    """

    def __init__(self, path: Path, follow_links: bool) -> None:
        super().__init__(path, follow_links)
        self._reading = threading.Lock()
        self._group: tuple[tuple[str, int], Any] | None = None  # the last row group: rows are read in order

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether the path ends with .parquet."""
        return is_named(path, ".parquet")

    def _list(self) -> list[str]:
        return [name for name, _ in self._entries]

    def _read(self, name: str) -> bytes:
        with self._reading:
            cell = self._cells[name]
            if self._group is None or self._group[0] != (cell.file, cell.group):
                opened, column = self._open(cell.file)
                with opened:
                    try:
                        values = opened.read_row_group(cell.group, columns=[column]).column(0)
                    except OSError as error:
                        if error.errno is not None:
                            raise
                        raise InvalidImageError(f"corrupted in the Parquet file: {first_line(error)}") from error
                self._group = (cell.file, cell.group), values
            value = self._group[1][cell.row].as_py()
        content: bytes | None = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise InvalidImageError("no image in this row")
        return content

    @functools.cached_property
    def _storage(self) -> Storage:
        return Storage(self.path)

    @functools.cached_property
    def _entries(self) -> list[tuple[str, _Cell]]:
        entries = []
        for file in self._storage.files():
            opened, column = self._open(file)
            stem = PurePosixPath(file).stem
            with opened:
                number = 0
                for group in range(opened.num_row_groups):
                    for row, path in enumerate(_paths(opened, group, column)):
                        entries.append((path or f"{stem}/{number:08}.jpg", _Cell(file, group, row)))
                        number += 1
        return entries

    def _open(self, file: str) -> tuple[Any, str]:
        """Return a Parquet file and the name of its image column."""
        try:
            from pyarrow import ArrowInvalid, parquet, types
        except ImportError as error:
            raise UserError(f"{self}: Parquet files need pyarrow", "pip install 'gridcap[parquet]'") from error
        label = self._storage.label(file)
        try:
            opened = parquet.ParquetFile(self._storage.open(file))
        except ArrowInvalid as error:
            raise AnnotationError(
                f"{label}: not a complete Parquet file: {first_line(error)}", "copy or download it again"
            ) from error
        schema = opened.schema_arrow
        structs = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
        binary = [f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)]
        if not structs and not binary:
            raise AnnotationError(
                f"{label}: has no image column (columns: {', '.join(schema.names)})",
                "store images as structs of bytes and path, or as binary values",
            )
        return opened, (structs or binary)[0]

    @functools.cached_property
    def _cells(self) -> dict[str, _Cell]:
        return dict(reversed(self._entries))  # of a repeated name, the first counts


def _paths(opened: Any, group: int, column: str) -> list[str | None]:
    """Return the recorded paths of the images in a row group, without reading the images."""
    rows: int = opened.metadata.row_group(group).num_rows
    if f"{column}.path" not in opened.schema.names and not any(
        opened.schema.column(i).path == f"{column}.path" for i in range(len(opened.schema.names))
    ):
        return [None] * rows
    values = opened.read_row_group(group, columns=[f"{column}.path"]).column(0)
    return [value and value["path"] for value in values.to_pylist()]
