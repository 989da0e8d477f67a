"""Parquet files of Hugging Face datasets: one file, or a folder of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from gridcap.common.captions.records import CaptionSet, Problems
from gridcap.common.captions.rows import RowColumns, find_columns, missing_columns, read_rows
from gridcap.common.captions.source import CaptionsFile
from gridcap.common.errors import AnnotationError

MAGIC = b"PAR1"
INSTALL_HINT = "pip install 'gridcap[parquet]'"


class Parquet:
    """Hugging Face Parquet; the pixels of an image column are not read, only the paths of the images."""

    name: ClassVar[str] = "Hugging Face Parquet"
    example: ClassVar[str] = "a .parquet file, or a folder of them, with the columns image and caption"

    def sniff(self, file: CaptionsFile) -> bool:
        """Return whether it is a Parquet file, or a folder that contains some."""
        return bool(_files(file.path)) if file.path.is_dir() else file.head.startswith(MAGIC)

    def read(self, file: CaptionsFile) -> CaptionSet:
        """Read the rows of a part, batch by batch."""
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise AnnotationError(f"{file.path}: reading Parquet requires pyarrow", INSTALL_HINT) from error
        paths = _files(file.path) or [file.path]
        try:
            schema = parquet.read_schema(paths[0])
            columns = find_columns(schema.names, file.columns)
            if columns is None:
                raise missing_columns(file, schema.names)
            problems = Problems()
            return read_rows(_rows(paths, columns, schema), columns, file, problems)
        except (arrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise AnnotationError(
                f"{file.path}: cannot be read as Parquet: {reason}", "write the file again"
            ) from error


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.parquet")) if path.is_dir() else []


def _rows(paths: list[Path], columns: RowColumns, schema: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (position, column -> value) without the encoded images."""
    import pyarrow.parquet as parquet
    import pyarrow.types as types

    is_struct = types.is_struct(schema.field(columns.image).type)
    image = f"{columns.image}.path" if is_struct else columns.image
    names = [name for name in (image, *columns.captions, columns.split, columns.group) if name is not None]
    for path in paths:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", row


FORMAT = Parquet()
