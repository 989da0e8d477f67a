"""Downloads from a real server that disconnects, reports a wrong size, or sends another file."""

import errno
import hashlib
import ssl
import subprocess
import sys
import threading
import urllib.error
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gridcap.common.download import Remote, fetch
from gridcap.common.errors import DownloadError
from gridcap.common.lock import exclusive_lock

DATA = bytes(range(256)) * 8000  # 2 MB


class Server:
    """Serves `data` at any address.

    Attributes:
        data: the content.
        resumes: whether it supports Range.
        break_after: bytes after which each connection is closed; None for never.
        reported_size: wrong size to report; None for the right one.
        status: error status to return; None for 200.
        offsets: first requested byte of each request.
    """

    def __init__(self):
        self.data, self.resumes, self.break_after, self.reported_size, self.status = DATA, True, None, None, None
        self.offsets = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
                server.offsets.append(first)
                if server.status:
                    self.send_error(server.status)
                    return
                size = len(server.data) if server.reported_size is None else server.reported_size
                if first and server.resumes:
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
                else:
                    first = 0
                    self.send_response(200)
                self.send_header("Content-Length", str(size - first))
                self.end_headers()
                body = server.data[first:]
                self.wfile.write(body if server.break_after is None else body[: server.break_after])

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/some.zip"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def remote(self, **change):
        known = {"url": self.url, "size": len(DATA), "checksum": f"md5:{hashlib.md5(DATA).hexdigest()}"}
        return Remote(**known | change)


@pytest.fixture
def server():
    started = Server()
    yield started
    started.server.shutdown()
    started.server.server_close()


@pytest.fixture
def waits():
    """Wait times in seconds, recorded instead of slept."""
    return []


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_downloaded_once(server, waits, tmp_path):
    for _ in range(2):
        fetch(server.remote(), tmp_path / "deep" / "x.zip", waits.append)
    assert (tmp_path / "deep" / "x.zip").read_bytes() == DATA
    assert names(tmp_path / "deep") == ["x.zip"]
    assert (server.offsets, waits) == ([0], [])


def test_sha256_checksums_are_supported(server, waits, tmp_path):
    checksum = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
    fetch(server.remote(checksum=checksum), tmp_path / "x.zip", waits.append)
    assert (tmp_path / "x.zip").read_bytes() == DATA


def test_a_connection_that_breaks_repeatedly_is_resumed(server, waits, tmp_path):
    server.break_after = 300_000
    fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert (tmp_path / "x.zip").read_bytes() == DATA
    assert server.offsets == list(range(0, len(DATA), 300_000))


def test_a_later_call_resumes_an_earlier_one(server, waits, tmp_path):
    (tmp_path / "x.zip.part").write_bytes(DATA[:1_000_000])
    fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert (tmp_path / "x.zip").read_bytes() == DATA
    assert server.offsets == [1_000_000]


def test_a_server_without_range_support_restarts(server, waits, tmp_path):
    server.resumes = False
    (tmp_path / "x.zip.part").write_bytes(b"old" * 1000)
    fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert (tmp_path / "x.zip").read_bytes() == DATA


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize("existing", [0, 1000])
def test_a_wrong_size_is_an_error_before_the_transfer(server, waits, tmp_path, existing, resumes):
    server.reported_size, server.resumes = len(DATA) + 5, resumes
    if existing:
        (tmp_path / "x.zip.part").write_bytes(DATA[:existing])
    with pytest.raises(DownloadError, match=f"has {len(DATA) + 5} bytes, expected {len(DATA)}"):
        fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert names(tmp_path) == (["x.zip.part"] if existing else []), "data from the right server is kept"


def test_a_file_with_a_wrong_checksum_is_removed(server, waits, tmp_path):
    server.data = DATA[:-1] + b"!"
    with pytest.raises(DownloadError, match="wrong content: its MD5"):
        fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert names(tmp_path) == []
    server.data = DATA
    fetch(server.remote(), tmp_path / "x.zip", waits.append)


def test_a_missing_file_is_not_retried(server, waits, tmp_path):
    server.status = 404
    with pytest.raises(DownloadError, match="404"):
        fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert (server.offsets, waits) == ([0], [])


@pytest.mark.parametrize("status", [503, 429, 408])
def test_temporary_server_errors_are_retried_and_partial_data_is_kept(server, waits, tmp_path, status):
    server.status = status
    (tmp_path / "x.zip.part").write_bytes(DATA[:1000])
    with pytest.raises(DownloadError, match=str(status)):
        fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert server.offsets == [1000] * 6
    assert waits == sorted(waits)
    assert names(tmp_path) == ["x.zip.part"]


def test_an_unreachable_server_is_reported_with_the_progress(server, waits, tmp_path):
    remote = server.remote(url="http://127.0.0.1:9/x.zip")
    with pytest.raises(DownloadError, match=f"refused.*0 of {len(DATA)} bytes"):
        fetch(remote, tmp_path / "x.zip", waits.append)


def test_a_server_that_ends_early_is_an_error(server, waits, tmp_path):
    """It reports the right size and closes the connection at the same byte each time."""
    server.data = DATA[:5000]
    server.reported_size = len(DATA)
    with pytest.raises(DownloadError, match="after 5000 bytes"):
        fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert (tmp_path / "x.zip.part").stat().st_size == 5000


@pytest.mark.parametrize(
    "error",
    [
        ssl.SSLError(1, "[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC] decryption failed"),
        ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_item_23_network_errors_during_a_read_are_retried_and_named(
    server, waits, tmp_path, monkeypatch, error, wrapped
):
    def fail(request, timeout):
        raise urllib.error.URLError(error) if wrapped else error

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(DownloadError) as caught:
        fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert len(waits) == 5
    assert server.url in caught.value.message
    assert "network" in caught.value.hint
    assert "permission" not in caught.value.hint


def test_item_23_an_untrusted_certificate_is_not_retried(server, waits, tmp_path, monkeypatch):
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "certificate has expired"

    def fail(request, timeout):
        raise urllib.error.URLError(error)

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(DownloadError, match="certificate has expired") as caught:
        fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert waits == []
    assert "SSL_CERT_FILE" in caught.value.hint


def test_a_disk_error_is_not_called_a_network_error(server, waits, tmp_path, monkeypatch):
    def fail(request, timeout):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(OSError, match="No space"):
        fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert waits == []


def test_item_01_a_second_process_cannot_download_the_same_file(server, waits, tmp_path):
    """Both would append to the same partial file."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom gridcap.common.lock import exclusive_lock\n"
        "with exclusive_lock(Path(sys.argv[1])):\n    print('locked', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / ".x.zip.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(DownloadError, match="another process"):
            fetch(server.remote(), tmp_path / "x.zip", waits.append)
        assert server.offsets == []
        other.kill()
    fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert names(tmp_path) == ["x.zip"], "the lock of a killed process is released and removed"


def test_item_01_a_file_that_another_process_has_just_finished_is_not_downloaded_again(server, waits, tmp_path):
    with exclusive_lock(tmp_path / ".x.zip.lock"):
        (tmp_path / "x.zip").write_bytes(DATA)
    fetch(server.remote(), tmp_path / "x.zip", waits.append)
    assert server.offsets == []
