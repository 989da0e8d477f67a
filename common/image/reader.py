"""A file reader with a limit on the CPU time spent decoding."""

from __future__ import annotations

import io
import os
import stat
import time

from gridcap.common.errors import InvalidImageError
from gridcap.common.sources.registry import ImageFile, Member

MAX_SECONDS = 10  # CPU time per image; waiting for the disk does not count
LARGE_READ = 1 << 16  # decoders read at least this much at once; header parsers read less
START_OF_SCAN = b"\xff\xda"  # JPEG marker; within scan data, 0xff is followed by 0


class ImageReader(io.BufferedReader):
    """A binary file that raises an error when decoding it takes too long.

    The size of a JPEG does not limit its decoding time: thousands of scans of a few bytes each may cover all of its
    pixels. A thread cannot be interrupted from outside, but Pillow's decoders read the file piece by piece.

    Args:
        raw: the raw file.

    Attributes:
        max_scans: number of JPEG scans returned per read; None for no limit.

    Raises:
        InvalidImageError: while reading: the time limit is exceeded.
    """

    def __init__(self, raw: io.RawIOBase | io.BytesIO) -> None:
        super().__init__(raw)
        self._start = time.thread_time()
        self.max_scans: int | None = None

    @classmethod
    def open(cls, path: ImageFile) -> ImageReader:
        """Open a regular file, or a member of an archive.

        Raises:
            InvalidImageError: not a regular file.
            OSError: the file cannot be opened.
        """
        if isinstance(path, Member):
            return cls(io.BytesIO(path.read_bytes()))
        reader = cls(io.FileIO(path, opener=_open_nonblocking))
        if not stat.S_ISREG(os.fstat(reader.fileno()).st_mode):
            reader.close()
            raise InvalidImageError("not a regular file")
        return reader

    def read(self, size: int | None = -1, /) -> bytes:
        """Read bytes as `io.BufferedReader` does; large reads end after `max_scans` scans."""
        if size is not None and 0 <= size < LARGE_READ:
            return super().read(size)
        if time.thread_time() - self._start > MAX_SECONDS:
            raise InvalidImageError(f"takes more than {MAX_SECONDS} s to decode")
        data = super().read(size)
        if self.max_scans is not None and data.count(START_OF_SCAN) > self.max_scans:
            length, end = len(data), 0
            for _ in range(self.max_scans + 1):
                end = data.index(START_OF_SCAN, end) + len(START_OF_SCAN)
            data = data[: end - len(START_OF_SCAN)]
            self.seek(len(data) - length, os.SEEK_CUR)
        return data


def _open_nonblocking(name: str, flags: int) -> int:
    """Open a file without waiting for the other end of a named pipe."""
    return os.open(name, flags | os.O_NONBLOCK)
