"""Images downloaded one by one, from a server that fails in every way."""

from __future__ import annotations

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from gridcap.common.errors import DownloadError
from gridcap.extract.download import datasets, images
from gridcap.extract.download.cli import main
from gridcap.extract.download.datasets import Dataset, SplitFiles
from gridcap.extract.download.images import download_images


def jpeg(value):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (value % 256, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """The first letter of an image's name selects how its first request fails, if at all."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        first = name not in self.server.requests
        self.server.requests.append(name)
        content = self.server.files.get(name) or jpeg(len(name))
        if name[0] == "m":  # missing
            self.send_error(404)
        elif name[0] == "b" and first:  # busy
            self.send_error(503)
        elif name[0] == "h":  # HTML with status 200
            self.reply(b"<html>please log in</html>", "text/html")
        elif name[0] == "t":  # truncated, without Content-Length
            self.reply(content[: len(content) // 2], length=None)
        elif name[0] == "d" and first:  # dropped connection
            self.reply(content[:50], length=len(content))
            self.connection.close()
        elif name[0] == "w" and first:  # wrong length
            self.reply(content, length=len(content) + 100)
        else:
            self.reply(content)

    def reply(self, content, kind="image/jpeg", length=0):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests, httpd.files = [], {}
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def no_wait(seconds):
    assert 0 < seconds <= 30


def test_images_survive_drops_and_wrong_sizes_and_failures_are_named(server, tmp_path):
    names = ["a.jpg", "b.jpg", "d.jpg", "w.jpg", "m.jpg", "h.jpg", "t.jpg", *(f"x{i}.jpg" for i in range(40))]
    wanted = {tmp_path / "images" / name: f"{server.url}/images/{name}" for name in names}
    failed = download_images(wanted, no_wait)
    assert {file.name for file in failed} == {"m.jpg", "h.jpg", "t.jpg"}
    assert "404" in failed[tmp_path / "images/m.jpg"]
    assert "the server sent text/html" in failed[tmp_path / "images/h.jpg"]
    assert "not a complete image" in failed[tmp_path / "images/t.jpg"]
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == sorted(set(names) - {f.name for f in failed})
    for file in wanted:
        if file not in failed:
            assert file.read_bytes() == jpeg(len(file.name))
    server.requests.clear()
    download_images(wanted, no_wait)
    assert set(server.requests) == {"m.jpg", "h.jpg", "t.jpg"}, "a rerun requests only what is missing"


def test_a_dead_server_ends_the_download_early(server, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_CONSECUTIVE_FAILURES", 5)
    wanted = {tmp_path / f"m{i}.jpg": f"{server.url}/m{i}.jpg" for i in range(500)}
    with pytest.raises(DownloadError, match="5 images in a row"):
        download_images(wanted, no_wait)
    assert len(server.requests) < 100


@pytest.fixture
def nocaps(server, tmp_path, monkeypatch):
    """A dataset whose images have URLs."""
    entries = [
        {"id": i, "file_name": f"n{i}.jpg", "coco_url": f"http://elsewhere.invalid/images/n{i}.jpg"} for i in range(20)
    ]
    annotations = [{"id": i, "image_id": i, "caption": "a red square"} for i in range(20)]
    server.files["c.json"] = json.dumps({"images": entries, "annotations": annotations}).encode()
    dataset = Dataset(
        "nocaps",
        "some terms",
        annotation_files={"c.json": "http://elsewhere.invalid/c.json"},
        splits={"val": SplitFiles("images", "c.json")},
    )
    monkeypatch.setitem(datasets.OTHERS, "nocaps", lambda: dataset)
    monkeypatch.chdir(tmp_path)
    return server


def download(*arguments, status=0):
    done = CliRunner().invoke(main, ["nocaps", *arguments])
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done.output


def test_limit_downloads_exactly_the_images_that_extraction_selects(nocaps, tmp_path):
    output = download("--mirror", nocaps.url, "--limit", "6")
    files = sorted(p.name for p in Path("data/nocaps/images").iterdir())
    assert len(files) == 6
    assert "some terms" in output
    assert "next: extract-features --config data/nocaps/pipeline.yaml --split val" in output
    from gridcap.common.captions.split import load_split
    from gridcap.common.config import load_config

    config = load_config(Path("data/nocaps/pipeline.yaml"))
    assert sorted(r.file_name for r in load_split(config.data.splits["val"], "val", config.seed).records) == files
    assert "already complete" in download("--mirror", nocaps.url, "--limit", "6")
    download("--mirror", nocaps.url)
    assert len(list(Path("data/nocaps/images").iterdir())) == 20


def test_failed_images_are_listed_with_exit_status_1_and_retried(nocaps, tmp_path):
    content = json.loads(nocaps.files["c.json"])
    content["images"][3]["coco_url"] = "http://elsewhere.invalid/images/missing.jpg"
    nocaps.files["c.json"] = json.dumps(content).encode()
    output = download("--mirror", nocaps.url, status=1)
    assert "failed: data/nocaps/images/n3.jpg" in output
    assert "1 image could not be downloaded" in output
    assert len(list(Path("data/nocaps/images").iterdir())) == 19


def test_captions_that_are_not_json_are_rejected(nocaps):
    nocaps.files["c.json"] = b"<html>gone</html>"
    output = download("--mirror", nocaps.url, status=1)
    assert "did not send valid JSON" in output
    assert not list(Path("data/nocaps").glob("c.json*"))
