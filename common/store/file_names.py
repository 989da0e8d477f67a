"""File names of an index, read on demand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from gridcap.common.errors import StoreError
from gridcap.common.store.pinned_file import PinnedFile
from gridcap.common.store.shard_format import RECREATE_INDEX


class FileNames(Sequence[str]):
    """Sequence of fixed-length UTF-8 names that stay in their file: an index may list a hundred million images.

    Args:
        path: file that contains the names.
        offset: position of the first name in bytes.
        length: bytes per name, padded with zero bytes.
        count: number of names.
    """

    def __init__(self, path: Path, offset: int, length: int, count: int) -> None:
        self._file, self._offset, self._length, self._count = PinnedFile(path), offset, length, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> list[str]: ...
    def __getitem__(self, key: int | slice) -> str | list[str]:
        if not isinstance(key, slice):
            return self._read(range(self._count)[key], 1)[0]
        rows = range(self._count)[key]
        if rows.step != 1:
            return [self[row] for row in rows]
        return self._read(rows.start, len(rows))

    def _read(self, first: int, count: int) -> list[str]:
        names = bytearray(count * self._length)
        if not self._file.read_into(memoryview(names), self._offset + first * self._length):
            raise StoreError(f"{self._file.path}: ends inside its file names", RECREATE_INDEX)
        starts = range(0, len(names), self._length)
        try:
            return [names[start : start + self._length].rstrip(b"\0").decode() for start in starts]
        except UnicodeDecodeError as error:
            raise StoreError(f"{self._file.path}: corrupted file name: {error}", RECREATE_INDEX) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def close(self) -> None:
        """Close the file. The next access opens it again."""
        self._file.close()
