"""Read errors: which of them are retried, and how the last one is reported."""

from __future__ import annotations

import errno
import http.client
import os
import ssl
from pathlib import Path

import pytest
from PIL import Image

from gridcap.common import retry
from gridcap.common.errors import InvalidImageError, ReadError
from gridcap.common.image import load_image
from gridcap.common.retry import ATTEMPTS, is_transient, retry_transient_errors


class HttpError(http.client.HTTPException):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


def system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.fixture(autouse=True)
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (system_error(errno.EIO), True),
        (system_error(errno.ESTALE), True),
        (system_error(errno.ETIMEDOUT), True),
        (system_error(errno.EHOSTUNREACH), True),
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), True),
        (TimeoutError("timed out"), True),
        (ConnectionResetError(), True),
        (http.client.IncompleteRead(b""), True),
        (HttpError(503), True),
        (HttpError(429), True),
        (HttpError(403), False),
        (system_error(errno.ENOENT), False),
        (system_error(errno.EACCES), False),
        (system_error(errno.EMFILE), False),
        (OSError("broken data stream"), False),  # Pillow, for corrupted files
        (ValueError("corrupted"), False),
        (InvalidImageError("truncated"), False),
    ],
    ids=repr,
)
def test_only_errors_of_the_network_and_the_storage_are_transient(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


def test_waiting_times_double_until_the_error_passes(delays: list[float]) -> None:
    errors = [system_error(errno.ESTALE), ssl.SSLError(1, "bad record"), TimeoutError()]

    def read() -> str:
        if errors:
            raise errors.pop()
        return "content"

    assert retry_transient_errors(read, "a.jpg") == "content"
    assert delays == [retry.DELAY, 2 * retry.DELAY, 4 * retry.DELAY]


@pytest.mark.parametrize(
    ("error", "message", "waits"),
    [
        (OSError(errno.EIO, "Input/output error"), "a.jpg: cannot be read: input/output error (5 attempts)", 4),
        (TimeoutError("timed out"), "a.jpg: cannot be read: timed out (5 attempts)", 4),
        (HttpError(502), "a.jpg: cannot be read: status 502 (5 attempts)", 4),
        (OSError(errno.EACCES, "Permission denied", "inner.jpg"), "inner.jpg: cannot be read: permission denied", 0),
    ],
    ids=repr,
)
def test_an_error_that_persists_names_the_file(delays: list[float], error: Exception, message: str, waits: int) -> None:
    def read() -> None:
        raise error

    with pytest.raises(ReadError) as caught:
        retry_transient_errors(read, "a.jpg")
    assert str(caught.value) == message
    assert len(delays) == waits <= ATTEMPTS


def test_other_errors_are_not_changed(delays: list[float]) -> None:
    def read() -> None:
        raise InvalidImageError("truncated")

    with pytest.raises(InvalidImageError, match="truncated"):
        retry_transient_errors(read, "a.jpg")
    assert not delays


@pytest.mark.parametrize("error", [TimeoutError("timed out"), HttpError(500), ConnectionResetError()], ids=repr)
def test_a_network_error_while_decoding_does_not_make_the_image_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> bytes:
        raise error

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr("gridcap.common.image.reader.ImageReader.read", fail)
    with pytest.raises(type(error)):
        load_image(tmp_path / "a.png", 8, "stretch")
