"""Downloads of large files: resumed, checked, and renamed to their final name when complete.

torch.hub, torchvision, and pooch do not resume an interrupted transfer, which matters for 13 GB.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gridcap.common.errors import DownloadError
from gridcap.common.files import fsync_path
from gridcap.common.lock import exclusive_lock
from gridcap.common.progress import progress_bar

T = TypeVar("T")

BLOCK_SIZE = 1 << 20
TIMEOUT = 60  # seconds without data
MAX_ATTEMPTS = 6  # consecutive attempts without progress
MAX_WAIT = 30.0  # seconds between attempts
RERUN = "rerun the command to resume the download"
NETWORK_ERRNOS = (errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET)
TEMPORARY_STATUSES = (http.client.REQUEST_TIMEOUT, http.client.TOO_MANY_REQUESTS)


@dataclass(frozen=True)
class Remote:
    """A file on a web server.

    Attributes:
        url: address.
        size: size in bytes.
        checksum: "md5:..." or "sha256:...", in hexadecimal.
    """

    url: str
    size: int
    checksum: str


def fetch(remote: Remote, path: Path, wait: Callable[[float], None] = time.sleep) -> None:
    """Download a file unless it exists.

    The data is written to `<path>.part`. An interrupted transfer is resumed from there, also by a later call. The file
    gets its final name only after its size and checksum have been verified.

    Args:
        remote: the file.
        path: destination.
        wait: called with the number of seconds before each retry.

    Raises:
        DownloadError: no connection, no such file on the server, wrong size or checksum, or another process is
            downloading the same file.
    """
    if _is_complete(remote, path):
        return
    with download_lock(path):
        if _is_complete(remote, path):  # another process has just finished
            return
        part = path.with_name(f"{path.name}.part")
        _fetch_part(remote, part, wait)
        _verify(remote, part)
        fsync_path(part)
        os.replace(part, path)


def download_lock(path: Path) -> AbstractContextManager[None]:
    """Hold the lock of a file to download; raise DownloadError if another process holds it."""
    conflict = DownloadError(
        f"{path}: another process is downloading this file", "wait until it has finished, then rerun the command"
    )
    return exclusive_lock(path.with_name(f".{path.name}.lock"), conflict)


def fetch_unverified(url: str, path: Path, check: Callable[[Path], None]) -> None:
    """Download a file whose size and checksum are not known in advance. The caller holds its lock.

    Args:
        url: address.
        path: destination.
        check: called with the downloaded file before it gets its final name; raises an error if it is invalid.

    Raises:
        DownloadError: as for `fetch`.
    """
    part = path.with_name(f"{path.name}.part")
    _fetch_part(Remote(url, size_of(url), ""), part, time.sleep)
    try:
        check(part)
    except DownloadError:
        part.unlink()
        raise
    fsync_path(part)
    os.replace(part, path)


def size_of(url: str) -> int:
    """Ask the server for the size of a file, in bytes.

    Raises:
        DownloadError: no connection, no such file, or the server does not say.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT) as response:
            length = response.headers.get("Content-Length", "")
    except (OSError, http.client.HTTPException) as error:
        raise download_error(url, error) from error
    if not length.isdigit():
        raise DownloadError(
            f"{url}: the server does not state the size of the file", "try again later, or use --mirror"
        )
    return int(length)


def retry_network_errors(attempt: Callable[[], T], attempts: int = 3, wait: Callable[[float], None] | None = None) -> T:
    """Call a function that downloads something, repeatedly if the network fails in a way that may pass.

    Args:
        attempt: the function.
        attempts: maximum number of calls.
        wait: called with the number of seconds before each retry; None: `time.sleep`.

    Raises:
        Exception: the error of the last call.
    """
    for failures in range(1, attempts):
        try:
            return attempt()
        except (OSError, http.client.HTTPException) as error:
            if not is_retryable(error):
                raise
        (wait or time.sleep)(min(MAX_WAIT, 2.0**failures))
    return attempt()


def _is_complete(remote: Remote, path: Path) -> bool:
    return path.is_file() and path.stat().st_size == remote.size


def _fetch_part(remote: Remote, part: Path, wait: Callable[[float], None]) -> None:
    failures = 0
    with progress_bar(
        total=remote.size, unit="B", unit_scale=True, unit_divisor=1024, desc=part.name.removesuffix(".part")
    ) as bar:
        while (size := _size(part)) < remote.size:
            bar.n = size
            try:
                _append(remote, part, bar.update)
            except (OSError, http.client.HTTPException) as error:
                failures = 0 if _size(part) > size else failures + 1
                if not is_retryable(error) or failures == MAX_ATTEMPTS:
                    received = f"; {_size(part)} of {remote.size} bytes received"
                    raise download_error(remote.url, error, received) from error
            else:
                # A server may end the transfer early without an error.
                failures = 0 if _size(part) > size else failures + 1
                if failures == MAX_ATTEMPTS:
                    raise DownloadError(f"{remote.url}: the server ends the transfer after {size} bytes", RERUN)
            if _size(part) < remote.size:
                wait(min(MAX_WAIT, 2.0**failures))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _append(remote: Remote, part: Path, progress: Callable[[int], object]) -> None:
    """Append the bytes that are still missing."""
    size = _size(part)
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={size}-"} if size else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        header = response.headers.get("Content-Range" if resumed else "Content-Length", "")
        total = header.rpartition("/")[2]  # "bytes 5-9/10", or "10"
        if total.isdigit() and int(total) != remote.size:  # the partial file may be right, so it is kept
            raise DownloadError(
                f"{remote.url}: has {total} bytes, expected {remote.size}",
                "the server has another file: check --mirror, or try again later",
            )
        if size and not resumed:  # the server cannot resume: start from the beginning
            progress(-size)
        with open(part, "ab" if resumed else "wb") as file:
            while block := response.read(BLOCK_SIZE):
                file.write(block)
                progress(len(block))


def is_retryable(error: Exception) -> bool:
    """Return whether another attempt may succeed: not with a full disk, a missing file, or an untrusted certificate."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in TEMPORARY_STATUSES
    return _is_network_error(error) and not isinstance(_cause(error), ssl.SSLCertVerificationError)


def _is_network_error(error: Exception) -> bool:
    network = (urllib.error.URLError, ssl.SSLError, socket.gaierror, ConnectionError, TimeoutError)
    if isinstance(error, (*network, http.client.HTTPException)):
        return True
    return isinstance(error, OSError) and error.errno in NETWORK_ERRNOS


def _cause(error: Exception) -> object:
    """Return the error inside a URLError."""
    return error.reason if isinstance(error, urllib.error.URLError) else error


def download_error(url: str, error: Exception, progress: str = "") -> Exception:
    """Return the error to raise for a failed transfer: a DownloadError, or the error itself if it is not the network's.

    Args:
        url: address of the file.
        error: as raised by urllib.
        progress: what has been received, for the message.
    """
    if not _is_network_error(error):
        return error  # a disk error has its own hint
    if isinstance(error, urllib.error.HTTPError):
        return DownloadError(
            f"{url}: the server responds {error.code} {error.reason}", "check the network and --mirror"
        )
    cause = _cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return DownloadError(
            f"{url}: the server's certificate is not trusted: {cause.verify_message}",
            "check the clock and the CA certificates (SSL_CERT_FILE), or choose another server with --mirror",
        )
    reason = str(cause) or type(cause).__name__
    if isinstance(cause, ssl.SSLError):
        reason = f"TLS connection failed: {reason}"
    return DownloadError(f"{url}: {reason}{progress}", f"check the network, then {RERUN}")


def _verify(remote: Remote, part: Path) -> None:
    """Check the size and checksum of a downloaded file. Remove the file if they are wrong."""
    algorithm, _, expected = remote.checksum.partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with (
        open(part, "rb") as file,
        progress_bar(
            total=remote.size, unit="B", unit_scale=True, unit_divisor=1024, desc="verifying", leave=False
        ) as bar,
    ):
        while block := file.read(BLOCK_SIZE):
            digest.update(block)
            bar.update(len(block))
    if _size(part) != remote.size or digest.hexdigest() != expected:
        part.unlink()
        raise DownloadError(
            f"{remote.url}: wrong content: its {algorithm.upper()} is not {expected}; the download was removed",
            "rerun the command; if this repeats, check --mirror",
        )
