"""Archives of datasets: download and unpacking."""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from gridcap.common.download import Remote, fetch, size_of
from gridcap.common.errors import DownloadError
from gridcap.common.files import temporary_file
from gridcap.common.lock import exclusive_lock
from gridcap.common.progress import progress_bar
from gridcap.common.text import plural

SPACE_FACTOR = 1.02  # file systems round file sizes up


@dataclass(frozen=True)
class Archive:
    """A zip or .tar.gz file.

    Attributes:
        server: address of the server.
        path: path on the server.
        size: size in bytes; None: as the server says.
        checksum: as for `Remote`.
        prefixes: prefixes of the members to unpack: folders (ending in "/") or files.
        files: number of these members.
        unpacked: their approximate total size in bytes.
        folder: subfolder of <output> to unpack into.
    """

    server: str
    path: str
    size: int | None
    checksum: str
    prefixes: tuple[str, ...]
    files: int
    unpacked: int
    folder: str = ""

    @property
    def name(self) -> str:
        """File name of the archive."""
        return PurePosixPath(self.path).name

    def remote(self, mirror: str | None) -> Remote:
        """Return the file to download, from a mirror or the official server.

        Raises:
            DownloadError: the size is unknown, and the server does not answer.
        """
        url = self.url(mirror)
        return Remote(url, size_of(url) if self.size is None else self.size, self.checksum)

    def url(self, mirror: str | None) -> str:
        """Return the address, on a mirror or the official server."""
        return f"{(mirror or self.server).rstrip('/')}/{self.path}"

    @property
    def approximate_size(self) -> int:
        """Size in bytes; photos hardly compress."""
        return self.unpacked if self.size is None else self.size

    def is_unpacked(self, to: Path) -> bool:
        """Return whether all members have been unpacked."""
        counts = [self._count(to, prefix) for prefix in self.prefixes]
        return all(counts) and sum(counts) >= self.files

    def _count(self, to: Path, prefix: str) -> int:
        path = to / self.folder / prefix
        if prefix.endswith("/"):
            return sum(entry.name.endswith(".jpg") for entry in os.scandir(path)) if path.is_dir() else 0
        return int(path.is_file())


def space_needed(archives: list[Archive], to: Path, keep: bool) -> int:
    """Return the maximum disk space in bytes that downloading and unpacking will take."""
    missing = [archive for archive in archives if not archive.is_unpacked(to)]
    zips = [archive.approximate_size - _downloaded(archive, to) for archive in missing]
    return int(SPACE_FACTOR * (sum(a.unpacked for a in missing) + (sum(zips) if keep else max(zips, default=0))))


def _downloaded(archive: Archive, to: Path) -> int:
    """Return how many bytes of an archive have been downloaded."""
    sizes = [p.stat().st_size for p in (to / archive.name, to / f"{archive.name}.part") if p.exists()]
    return min(archive.approximate_size, sum(sizes))


def check_space(archives: list[Archive], to: Path, keep: bool) -> None:
    """Check that there is enough disk space.

    Raises:
        DownloadError: not enough.
    """
    folder = next(path for path in (to, *to.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, space_needed(archives, to, keep)
    if needed > free:
        raise DownloadError(
            f"{to}: not enough disk space: {needed / 1e9:.1f} GB required, {free / 1e9:.1f} GB free",
            "free some space, choose another --output, or download less: --splits val, --annotations-only",
        )


def download(archive: Archive, to: Path, mirror: str | None, keep: bool) -> int:
    """Download an archive and unpack the requested members. An interrupted call is resumed.

    Args:
        archive: the archive.
        to: destination folder.
        mirror: address of a mirror; None for the official server.
        keep: whether to keep the zip file.

    Returns:
        Number of unpacked files; 0 if all existed.

    Raises:
        DownloadError: as for `fetch`, or a member is missing, or another process is unpacking the archive.
    """
    if archive.is_unpacked(to):
        return 0
    path = to / archive.name
    conflict = DownloadError(
        f"{to}: another process is downloading or unpacking {archive.name}",
        "wait until it has finished, then rerun the command",
    )
    with exclusive_lock(to / f".{archive.name}.unpack.lock", conflict):
        if archive.is_unpacked(to):  # another process has just finished
            return 0
        fetch(archive.remote(mirror), path)
        count = _unpack(archive, path, to)
        if not archive.is_unpacked(to):
            raise DownloadError(
                f"{path}: contains {count} of the expected {plural(archive.files, 'file')}",
                "delete it, then rerun the command",
            )
        if not keep:
            path.unlink()
        return count


def _unpack(archive: Archive, path: Path, to: Path) -> int:
    """Unpack the requested members and return their number."""
    count = 0
    try:
        with contextlib.closing(_members(path)) as members:
            for name, size, content in progress_bar(members, unit="file", desc=f"unpacking {archive.name}"):
                if not name.startswith(archive.prefixes):
                    continue
                if ".." in PurePosixPath(name).parts:
                    raise DownloadError(f"{path}: member {name!r} leaves the folder", "check --mirror")
                count += 1
                target = to / archive.folder / name
                if target.is_file() and target.stat().st_size == size:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary_file(target) as temporary:  # no fsync per file: the next run checks the sizes
                    with content() as source, open(temporary, "wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
                    os.replace(temporary, target)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise DownloadError(f"{path}: corrupted archive: {error}", "delete it, then rerun the command") from error
    return count


def _members(path: Path) -> Generator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """Yield the name and size of each file in an archive, and a function that opens it."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as opened:
            for member in opened.infolist():
                if not member.is_dir():
                    yield member.filename, member.file_size, partial(opened.open, member)
        return
    with tarfile.open(path, "r|gz") as stream:
        for entry in stream:
            content = stream.extractfile(entry) if entry.isfile() else None
            if content is not None:
                yield entry.name, entry.size, partial(contextlib.nullcontext, content)  # type: ignore[misc]
