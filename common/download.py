"""A large file from a web server: resumed where it broke off, checked, and put in place whole.

Neither torch.hub nor torchvision nor pooch goes on where a transfer broke off, which for 13 GB is what matters.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gridcap.common.errors import DownloadError
from gridcap.common.files import fsync_path
from gridcap.common.progress import progress_bar

_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_TRIES = 6  # in a row that bring nothing
_AGAIN = "run the same command again: it goes on where it stopped"


@dataclass(frozen=True)
class Remote:
    """A file and what is known of it.

    Attributes:
        url: where it is.
        size: in bytes.
        checksum: "md5:..." or "sha256:...", in hexadecimal.
    """

    url: str
    size: int
    checksum: str


def fetch(remote: Remote, path: Path, wait: Callable[[float], None] = time.sleep) -> None:
    """Fetch a file, unless it is there.

    What has come is in `<path>.part`. A transfer that breaks off is tried again from there, and so is one of an
    earlier call. Nothing gets its name before size and checksum are right.

    Args:
        remote: the file.
        path: where it goes.
        wait: before another try, in seconds.

    Raises:
        DownloadError: no connection, no such file there, or it is not what it should be.
    """
    if path.is_file() and path.stat().st_size == remote.size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    failed = 0
    with progress_bar(total=remote.size, unit="B", unit_scale=True, unit_divisor=1024, desc=path.name) as bar:
        while (there := _size(part)) < remote.size:
            bar.n = there
            try:
                _go_on(remote, part, there, bar.update)
            except (OSError, http.client.HTTPException) as error:
                failed = 0 if _size(part) > there else failed + 1
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if refused or failed == _TRIES or not _of_the_network(error):
                    raise _explained(remote, part, error) from error
                wait(min(30.0, 2.0**failed))
            else:
                if _size(part) == there:  # the server ended early, politely
                    failed += 1
                    if failed == _TRIES:
                        raise DownloadError(f"{remote.url}: the server ends it after {there} bytes", _AGAIN)
                    wait(min(30.0, 2.0**failed))
    _check(remote, part)
    fsync_path(part)
    os.replace(part, path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _go_on(remote: Remote, part: Path, there: int, progress: Callable[[int], object]) -> None:
    """Append what the server still has, from `there` on."""
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={there}-"} if there else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        resumed = answer.status == http.client.PARTIAL_CONTENT
        said = answer.headers.get("Content-Range" if resumed else "Content-Length", "")
        whole = said.rpartition("/")[2]  # "bytes 5-9/10", or "10"
        if whole.isdigit() and int(whole) != remote.size:  # what has come may be of the right one, so it stays
            raise DownloadError(
                f"{remote.url}: has {whole} bytes there, and should have {remote.size}",
                "it is another file: check --mirror, or try again later",
            )
        if there and not resumed:  # a server that cannot resume: from the beginning
            progress(-there)
        with open(part, "ab" if resumed else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                progress(len(block))


def _of_the_network(error: Exception) -> bool:
    """Whether trying again may help: a full disk stays full."""
    return isinstance(error, urllib.error.URLError | ConnectionError | TimeoutError | http.client.HTTPException)


def _explained(remote: Remote, part: Path, error: Exception) -> Exception:
    if not _of_the_network(error):
        return error  # the disk's, with its own hint
    if isinstance(error, urllib.error.HTTPError):
        return DownloadError(f"{remote.url}: the server says {error.code} {error.reason}", "check --mirror and network")
    reason = getattr(error, "reason", None) or f"{type(error).__name__} {error}"
    return DownloadError(f"{remote.url}: {reason}; {_size(part)} of {remote.size} bytes have come", _AGAIN)


def _check(remote: Remote, part: Path) -> None:
    """Make sure that the file is the one that was meant; if not, remove it."""
    kind, _, wanted = remote.checksum.partition(":")
    found = hashlib.new(kind, usedforsecurity=False)
    with (
        open(part, "rb") as file,
        progress_bar(
            total=remote.size, unit="B", unit_scale=True, unit_divisor=1024, desc="checking", leave=False
        ) as bar,
    ):
        while block := file.read(_BLOCK):
            found.update(block)
            bar.update(len(block))
    if _size(part) != remote.size or found.hexdigest() != wanted:
        part.unlink()
        raise DownloadError(
            f"{remote.url}: not the right file: its {kind.upper()} is not {wanted}; it was removed",
            "run the same command again; if it happens twice, check --mirror",
        )
