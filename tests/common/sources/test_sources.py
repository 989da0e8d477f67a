"""Image sources: the same images from a folder, a list, a zip, tar files, Parquet, and remote storage."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sqlite3
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gridcap.common.captions.images import SourceImages, list_images
from gridcap.common.captions.records import id_from_name
from gridcap.common.errors import AnnotationError, GridcapError, InvalidImageError, PathError
from gridcap.common.image import load_image
from gridcap.common.sources import registry
from gridcap.common.sources.registry import open_source, url_of

NAMES = ("a/1.jpg", "a/2.jpg", "a-b/3.png", "4.webp")


def encoded(name: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(len(name) + ord(name[0])).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[Path(name).suffix])
    return buffer.getvalue()


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("empty") if hasattr(archive, "mkdir") else None
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, files: dict[str, bytes]) -> Path:
    images = pa.array(
        [{"bytes": b, "path": n} for n, b in files.items()], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({"caption": ["x"] * len(files), "image": images})
    pq.write_table(table, path, row_group_size=2)
    return path


def write_list(path: Path, files: dict[str, bytes]) -> Path:
    write_folder(path.parent, files)
    path.write_text("\n".join(files) + "\n\n")
    return path


def write_csv(path: Path, files: dict[str, bytes]) -> Path:
    write_folder(path.parent, files)
    path.write_text("id,image\n" + "".join(f'1,"{name}"\n' for name in files), encoding="utf-8-sig")
    return path


LOCAL: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "photos": write_folder,
    "photos.zip": write_zip,
    "photos.tar": write_tar,
    "photos.parquet": write_parquet,
    "listed/photos.txt": write_list,
    "table/photos.csv": write_csv,
}


def contents(path: Path) -> dict[str, bytes]:
    source = open_source(path)
    return {name: source.locate(name).read_bytes() for name in (r.file_name for r in SourceImages(path))}


@pytest.mark.parametrize("kind", LOCAL)
def test_all_sources_give_the_same_names_ids_and_bytes(tmp_path: Path, kind: str) -> None:
    (tmp_path / kind).parent.mkdir(exist_ok=True)
    path = LOCAL[kind](tmp_path / kind, {name: encoded(name) for name in NAMES})
    listed = list_images(path)
    assert sorted(r.file_name for r in listed.records) == sorted(NAMES)
    assert all(r.image_id == id_from_name(r.file_name) for r in listed.records)
    assert contents(path) == {name: encoded(name) for name in NAMES}
    source = open_source(path)
    square = load_image(source.locate("a/1.jpg"), 16, "stretch")
    assert np.array_equal(
        square, load_image(write_folder(tmp_path / "x", {"1.jpg": encoded("a/1.jpg")}) / "1.jpg", 16, "stretch")
    )


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_a_range_of_files_is_one_source(tmp_path: Path, suffix: str) -> None:
    write = write_tar if suffix == "tar" else write_parquet
    for shard in range(3):
        write(tmp_path / f"{shard:05}.{suffix}", {f"{shard}{i}.jpg": encoded(f"{shard}{i}.jpg") for i in range(2)})
    expected = [f"{shard}{i}.jpg" for shard in range(3) for i in range(2)]
    for pattern in (f"{{00000..00002}}.{suffix}", f"*.{suffix}"):
        source = open_source(tmp_path / pattern)
        names = [r.file_name for r in SourceImages(tmp_path / pattern)]
        prefix = (lambda n: f"0000{n[0]}/{n}") if suffix == "tar" else (lambda n: n)
        assert names == [prefix(name) for name in expected]
        assert source.locate("21.jpg").read_bytes() == encoded("21.jpg"), "captions files omit the prefix"
    with pytest.raises(AnnotationError, match=rf"00003\.{suffix}: no such file"):
        list(SourceImages(tmp_path / f"{{00000..00003}}.{suffix}"))


def test_img2dataset_text_members_are_not_images(tmp_path: Path) -> None:
    files = {"1.jpg": encoded("1.jpg"), "1.txt": b"a cat", "1.json": json.dumps({"caption": "a cat"}).encode()}
    listed = list_images(write_tar(tmp_path / "s.tar", files))
    assert [r.file_name for r in listed.records] == ["1.jpg"]
    assert listed.problems.skipped == {".txt": 1, ".json": 1}


def test_parquet_without_paths_and_with_plain_bytes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [encoded("1.jpg"), None]}), tmp_path / "train.parquet")
    source = open_source(tmp_path / "train.parquet")
    assert [r.file_name for r in SourceImages(tmp_path / "train.parquet")] == [
        "train/00000000.jpg",
        "train/00000001.jpg",
    ]
    assert source.locate("train/00000000.jpg").read_bytes() == encoded("1.jpg")
    with pytest.raises(InvalidImageError, match="no image in this row"):
        source.locate("train/00000001.jpg").read_bytes()


def test_names_resolve_exactly_then_by_the_end_of_the_path(tmp_path: Path) -> None:
    files = {
        "train/a.jpg": b"1",
        "train/b.jpg": b"2",
        "val/b.jpg": b"3",
        "b.jpg": b"4",
        "x/c.jpg": b"5",
        "y/c.jpg": b"6",
    }
    source = open_source(write_zip(tmp_path / "z.zip", files))
    assert source.locate("a.jpg").read_bytes() == b"1"
    assert source.locate("b.jpg").read_bytes() == b"4"
    with pytest.raises(InvalidImageError, match=r"several files end with this name: x/c\.jpg, y/c\.jpg"):
        source.locate("c.jpg")
    with pytest.raises(InvalidImageError, match="not in the archive"):
        source.locate("d.jpg")


def test_dangerous_and_broken_members_are_invalid(tmp_path: Path) -> None:
    files = {"../evil.jpg": b"x", "ok.jpg": encoded("ok.jpg"), "__MACOSX/._ok.jpg": b"x", "bad.jpg": encoded("bad.jpg")}
    path = write_zip(tmp_path / "z.zip", files)
    listed = list_images(path)
    assert [r.file_name for r in listed.records] == ["bad.jpg", "ok.jpg"]
    assert listed.problems.counts == {"name that leads out of the archive": 1}
    content = bytearray(path.read_bytes())
    position = content.index(b"bad.jpg") + 60
    content[position] ^= 255
    path.write_bytes(content)
    source = open_source(path)
    with pytest.raises(InvalidImageError, match="corrupted in the zip file"):
        source.locate("bad.jpg").read_bytes()
    assert source.locate("ok.jpg").read_bytes() == encoded("ok.jpg")


def test_a_repeated_member_counts_as_invalid_and_the_first_is_used(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for content in (b"first", b"second"):
            member = tarfile.TarInfo("a.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    listed = list_images(tmp_path / "t.tar")
    assert [r.file_name for r in listed.records] == ["a.jpg"]
    assert listed.problems.counts == {"repeated name": 1}
    assert open_source(tmp_path / "t.tar").locate("a.jpg").read_bytes() == b"first"


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.parquet"])
def test_a_corrupted_archive_is_one_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not an archive" * 100)
    with pytest.raises(AnnotationError, match=rf"{name}: not a complete"):
        list(SourceImages(tmp_path / name))


def test_an_encrypted_member_is_an_invalid_image(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "z.zip", {"a.jpg": encoded("a.jpg")})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for match in re.finditer(re.escape(signature), bytes(content)):
            content[match.start() + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(InvalidImageError, match="encrypted"):
        open_source(path).locate("a.jpg").read_bytes()


def test_absolute_paths_in_a_list_need_follow_links(tmp_path: Path) -> None:
    photo = write_folder(tmp_path / "elsewhere", {"1.jpg": encoded("1.jpg")}) / "1.jpg"
    (tmp_path / "list.txt").write_text(f"{photo}\n")
    with pytest.raises(AnnotationError, match="follow_links=true"):
        list(SourceImages(tmp_path / "list.txt"))
    allowed = open_source(tmp_path / "list.txt", follow_links=True)
    (record,) = SourceImages(tmp_path / "list.txt", follow_links=True)
    assert allowed.locate(record.file_name) == photo


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no such folder or archive"), ("x.docx", "not a folder, list"), ("missing.zip", "no such folder")],
)
def test_a_path_that_no_source_reads_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "x.docx").write_bytes(b"")
    with pytest.raises(PathError, match=message):
        open_source(tmp_path / name)


def test_urls_survive_path() -> None:
    assert url_of(Path("s3://bucket/photos.zip")) == "s3://bucket/photos.zip"
    assert url_of(Path("https://host/a/b.tar")) == "https://host/a/b.tar"
    assert url_of(Path("photos/a.zip")) is None
    assert url_of(Path("/data/photos")) is None


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


@pytest.mark.parametrize("kind", ["photos.zip", "photos.tar", "photos.parquet"])
def test_archives_in_remote_storage(tmp_path: Path, memory: fsspec.AbstractFileSystem, kind: str) -> None:
    local = LOCAL[kind](tmp_path / kind, {name: encoded(name) for name in NAMES})
    memory.pipe_file(f"/bucket/{kind}", local.read_bytes())
    assert contents(Path(f"memory://bucket/{kind}")) == {name: encoded(name) for name in NAMES}


def test_a_remote_folder(memory: fsspec.AbstractFileSystem) -> None:
    for name in NAMES:
        memory.pipe_file(f"/bucket/photos/{name}", encoded(name))
    assert contents(Path("memory://bucket/photos")) == {name: encoded(name) for name in NAMES}
    with pytest.raises(GridcapError, match="nowhere"):
        list(SourceImages(Path("memory://bucket/nowhere")))


class _RangeHandler(SimpleHTTPRequestHandler):
    """A web server that answers range requests."""

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        if requested := self.headers.get("Range"):
            first, last = requested.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last or len(content)) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
            content = part
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(content)

    def do_HEAD(self) -> None:
        size = Path(self.translate_path(self.path)).stat().st_size
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_zip_file_on_a_web_server(tmp_path: Path) -> None:
    write_zip(tmp_path / "photos.zip", {name: encoded(name) for name in NAMES})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_RangeHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/photos.zip"
        assert contents(Path(url)) == {name: encoded(name) for name in NAMES}
    finally:
        server.shutdown()
        server.server_close()


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a zip file in a bucket of a local S3 server."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for name in NAMES:
            client.put_object(Bucket="bucket", Key=f"photos/{name}", Body=encoded(name))
        archive = write_zip(tmp_path / "photos.zip", {name: encoded(name) for name in NAMES})
        client.upload_file(str(archive), "bucket", "photos.zip")
        for url in ("s3://bucket/photos", "s3://bucket/photos.zip"):
            assert contents(Path(url)) == {name: encoded(name) for name in NAMES}
    finally:
        server.stop()
        fsspec.filesystem("s3").clear_instance_cache()


def test_reading_is_safe_for_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    files = {f"{i}.jpg": bytes([i]) * 5000 for i in range(100)}
    for path in (write_zip(tmp_path / "z.zip", files), write_parquet(tmp_path / "p.parquet", files)):
        source = open_source(path)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda name, s=source: s.locate(name).read_bytes(), files)) == list(files.values())


def test_the_module_in_the_documentation_adds_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "@register_source" in block)
    monkeypatch.setattr(registry, "_SOURCES", [*registry._SOURCES])
    open_source(tmp_path)  # loads the modules
    exec(compile(code, "sqlite.py", "exec"), {"__name__": "sqlite"})
    with contextlib.closing(sqlite3.connect(tmp_path / "photos.sqlite")) as database:
        database.execute("CREATE TABLE photos (name TEXT, content BLOB)")
        database.executemany("INSERT INTO photos VALUES (?, ?)", [(name, encoded(name)) for name in NAMES])
        database.commit()
    assert contents(tmp_path / "photos.sqlite") == {name: encoded(name) for name in NAMES}
