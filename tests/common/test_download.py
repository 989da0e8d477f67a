"""Fetching from a real server, which breaks off, lies about sizes, or sends another file."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gridcap.common.download import Remote, fetch
from gridcap.common.errors import DownloadError

DATA = bytes(range(256)) * 8000  # 2 MB


class Server:
    """Serves `data` at any address.

    Attributes:
        data: what it sends.
        resumes: whether it understands Range.
        break_after: bytes after which each connection breaks; None: never.
        lie: the size it says, if not the right one.
        status: what it answers instead of 200.
        asked: for each request the first byte that was asked for.
    """

    def __init__(self):
        self.data, self.resumes, self.break_after, self.lie, self.status = DATA, True, None, None, None
        self.asked = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
                server.asked.append(first)
                if server.status:
                    self.send_error(server.status)
                    return
                size = len(server.data) if server.lie is None else server.lie
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
def waited():
    """Seconds that would have been waited."""
    return []


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_whole_and_is_not_fetched_twice(server, waited, tmp_path):
    for _ in range(2):
        fetch(server.remote(), tmp_path / "deep" / "x.zip", waited.append)
    assert (tmp_path / "deep" / "x.zip").read_bytes() == DATA
    assert names(tmp_path / "deep") == ["x.zip"]
    assert (server.asked, waited) == ([0], [])


def test_sha256_serves_too(server, waited, tmp_path):
    checksum = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
    fetch(server.remote(checksum=checksum), tmp_path / "x.zip", waited.append)
    assert (tmp_path / "x.zip").read_bytes() == DATA


def test_a_connection_that_breaks_again_and_again_is_gone_on_with(server, waited, tmp_path):
    server.break_after = 300_000
    fetch(server.remote(), tmp_path / "x.zip", waited.append)
    assert (tmp_path / "x.zip").read_bytes() == DATA
    assert server.asked == list(range(0, len(DATA), 300_000))


def test_a_later_call_goes_on_where_an_earlier_one_stopped(server, waited, tmp_path):
    (tmp_path / "x.zip.part").write_bytes(DATA[:1_000_000])
    fetch(server.remote(), tmp_path / "x.zip", waited.append)
    assert (tmp_path / "x.zip").read_bytes() == DATA
    assert server.asked == [1_000_000]


def test_a_server_that_cannot_resume_sends_it_from_the_beginning(server, waited, tmp_path):
    server.resumes = False
    (tmp_path / "x.zip.part").write_bytes(b"old" * 1000)
    fetch(server.remote(), tmp_path / "x.zip", waited.append)
    assert (tmp_path / "x.zip").read_bytes() == DATA


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize("there", [0, 1000])
def test_another_size_is_refused_before_it_is_fetched(server, waited, tmp_path, there, resumes):
    server.lie, server.resumes = len(DATA) + 5, resumes
    if there:
        (tmp_path / "x.zip.part").write_bytes(DATA[:there])
    with pytest.raises(DownloadError, match=f"has {len(DATA) + 5} bytes there, and should have {len(DATA)}"):
        fetch(server.remote(), tmp_path / "x.zip", waited.append)
    assert names(tmp_path) == (["x.zip.part"] if there else []), "what came from the right server is not lost"


def test_another_file_of_the_same_size_is_removed(server, waited, tmp_path):
    server.data = DATA[:-1] + b"!"
    with pytest.raises(DownloadError, match="not the right file: its MD5"):
        fetch(server.remote(), tmp_path / "x.zip", waited.append)
    assert names(tmp_path) == []
    server.data = DATA
    fetch(server.remote(), tmp_path / "x.zip", waited.append)


def test_a_missing_file_is_told_at_once(server, waited, tmp_path):
    server.status = 404
    with pytest.raises(DownloadError, match="404"):
        fetch(server.remote(), tmp_path / "x.zip", waited.append)
    assert (server.asked, waited) == ([0], [])


def test_a_server_in_trouble_is_tried_some_times_and_what_came_is_kept(server, waited, tmp_path):
    server.status = 503
    (tmp_path / "x.zip.part").write_bytes(DATA[:1000])
    with pytest.raises(DownloadError, match="503"):
        fetch(server.remote(), tmp_path / "x.zip", waited.append)
    assert server.asked == [1000] * 6
    assert waited == sorted(waited)
    assert names(tmp_path) == ["x.zip.part"]


def test_a_server_that_is_not_there_is_told_with_how_much_has_come(server, waited, tmp_path):
    remote = server.remote(url="http://127.0.0.1:9/x.zip")
    with pytest.raises(DownloadError, match=f"refused.*0 of {len(DATA)} bytes"):
        fetch(remote, tmp_path / "x.zip", waited.append)


def test_a_server_that_ends_early_without_an_error(server, waited, tmp_path):
    """It says the right size and closes the connection, again and again at the same place."""
    server.data = DATA[:5000]
    server.lie = len(DATA)
    with pytest.raises(DownloadError, match="after 5000 bytes"):
        fetch(server.remote(), tmp_path / "x.zip", waited.append)
    assert (tmp_path / "x.zip.part").stat().st_size == 5000
