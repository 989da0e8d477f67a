"""Images that are downloaded one by one: in parallel, resumable, verified."""

from __future__ import annotations

import http.client
import io
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path

from PIL import Image

from gridcap.common.download import MAX_ATTEMPTS, MAX_WAIT, TIMEOUT, download_error, is_retryable
from gridcap.common.errors import DownloadError, first_line
from gridcap.common.files import temporary_file
from gridcap.common.progress import progress_bar

CONNECTIONS = 16
MAX_CONSECUTIVE_FAILURES = 50  # then the server or the network is down, and waiting for each image is pointless
MAX_BYTES = 2**28


class _IncompleteError(DownloadError):
    """A transfer ended early."""


def download_images(images: Mapping[Path, str], sleep: Callable[[float], None] = time.sleep) -> dict[Path, str]:
    """Download the images that are missing.

    An image gets its name only when it has been received completely and decoded once, so an existing file is complete.

    Args:
        images: file -> address.
        sleep: called with the number of seconds before each retry.

    Returns:
        The images that could not be downloaded, with reasons.

    Raises:
        DownloadError: `MAX_CONSECUTIVE_FAILURES` images failed in a row.
        OSError: a file cannot be written.
    """
    failed: dict[Path, str] = {}
    missing = ((file, url) for file, url in images.items() if not file.exists())
    stop = threading.Event()
    consecutive = 0
    with (
        ThreadPoolExecutor(CONNECTIONS) as pool,
        progress_bar(total=len(images), unit="image", desc="images") as bar,
    ):
        pending: dict[Future[None], Path] = {}

        def fill() -> None:
            for file, url in islice(missing, 2 * CONNECTIONS - len(pending)):
                pending[pool.submit(_download_image, url, file, sleep, stop)] = file

        bar.update(sum(file.exists() for file in images))
        fill()
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    file = pending.pop(future)
                    bar.update()
                    try:
                        future.result()
                        consecutive = 0
                    except DownloadError as error:
                        failed[file] = error.message
                        consecutive += 1
                        if consecutive >= MAX_CONSECUTIVE_FAILURES:
                            raise DownloadError(
                                f"{consecutive} images in a row could not be downloaded: {error.message}", error.hint
                            ) from error
                fill()
        finally:
            stop.set()  # an error or Ctrl-C ends the other threads before their next attempt
    return failed


def _download_image(url: str, file: Path, sleep: Callable[[float], None], stop: threading.Event) -> None:
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            content = _read(url)
            break
        except (OSError, http.client.HTTPException, _IncompleteError) as error:
            retryable = isinstance(error, _IncompleteError) or is_retryable(error)
            if attempt == MAX_ATTEMPTS or stop.is_set() or not retryable:
                if isinstance(error, DownloadError):
                    raise
                raise download_error(url, error) from error
            sleep(min(MAX_WAIT, 2.0**attempt))
    file.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(file) as temporary:
        temporary.write_bytes(content)
        os.replace(temporary, file)


def _read(url: str) -> bytes:
    """Return an image file.

    Raises:
        DownloadError: it is too large, incomplete, or not an image.
    """
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        content: bytes = response.read(MAX_BYTES + 1)
        announced, kind = response.headers.get("Content-Length", ""), response.headers.get("Content-Type", "")
    if len(content) > MAX_BYTES:
        raise DownloadError(f"{url}: larger than {MAX_BYTES >> 20} MiB", "check the captions file")
    if announced.isdigit() and len(content) != int(announced):
        raise _IncompleteError(f"{url}: {len(content)} of {announced} bytes received", "rerun the command")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except Exception as error:  # Pillow raises many types for a corrupted file
        what = f"the server sent {kind}" if kind and not kind.startswith("image/") else first_line(error)
        raise DownloadError(f"{url}: not a complete image: {what}", "check --mirror, or try again later") from error
    return content
