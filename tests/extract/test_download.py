"""download-coco against a server of our own: the same layout, tiny archives."""

import dataclasses
import hashlib
import io
import shutil
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner

import gridcap.extract.coco
from gridcap.common.config import load_config
from gridcap.extract.coco import ANNOTATIONS, IMAGES, KARPATHY_SPLITS, choose, space_needed
from gridcap.extract.download_cli import main

MEMBERS = {
    "train2014.zip": {f"train2014/COCO_train2014_{i:012}.jpg": bytes([i]) * 500 for i in range(5)},
    "val2014.zip": {f"val2014/COCO_val2014_{i:012}.jpg": bytes([i]) * 400 for i in range(3)},
    "annotations_trainval2014.zip": {
        f"annotations/{kind}_{split}2014.json": f"{kind} {split}".encode()
        for kind in ("captions", "instances")
        for split in ("train", "val")
    },
    "caption_datasets.zip": {"dataset_coco.json": b"splits", "dataset_flickr8k.json": b"others"},
}


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A server with tiny archives, and a catalogue that knows them; gives its address and its folder."""
    folder = tmp_path / "served"

    def tiny(archive):
        data = zipped(MEMBERS[archive.name])
        path = folder / archive.place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        files = sum(name.startswith(archive.wanted) for name in MEMBERS[archive.name])
        checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return dataclasses.replace(archive, size=len(data), checksum=checksum, files=files, unpacked=2000)

    monkeypatch.setattr(gridcap.extract.coco, "IMAGES", {k: tiny(a) for k, a in IMAGES.items() if k[0] == "2014"})
    monkeypatch.setattr(gridcap.extract.coco, "ANNOTATIONS", {"2014": tiny(ANNOTATIONS["2014"])})
    monkeypatch.setattr(gridcap.extract.coco, "KARPATHY_SPLITS", tiny(KARPATHY_SPLITS))
    monkeypatch.setattr("gridcap.common.download.time.sleep", lambda seconds: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()


def run(*arguments, status=0):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done.output


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wanted(*names):
    return {name: data for archive in names for name, data in MEMBERS[archive].items() if "instances" not in name}


def test_everything_lands_where_pipeline_yaml_looks(mirror, tmp_path):
    output = run("--mirror", mirror[0], "--karpathy")
    everything = wanted("train2014.zip", "val2014.zip", "annotations_trainval2014.zip")
    assert tree(tmp_path / "data/coco") == everything | {"annotations/dataset_coco.json": b"splits"}
    assert "done: data/coco: 11 files unpacked" in output
    shutil.copy(gridcap.extract.coco.__file__.replace("extract/coco.py", "pipeline.yaml"), tmp_path)
    for split in load_config().data.splits.values():
        assert split.images.is_dir()
        assert split.annotations is not None
        assert split.annotations.is_file()


def test_the_same_command_again_fetches_nothing(mirror, tmp_path):
    run("--mirror", mirror[0])
    shutil.rmtree(mirror[1])
    output = run("--mirror", mirror[0])
    assert output.count("there already") == 3
    assert "all was there" in output


def test_what_was_lost_is_fetched_again(mirror, tmp_path):
    run("--mirror", mirror[0])
    gone = tmp_path / "data/coco/train2014/COCO_train2014_000000000003.jpg"
    gone.unlink()
    run("--mirror", mirror[0])
    assert gone.read_bytes() == bytes([3]) * 500


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--splits", "val"], ["val2014.zip", "annotations_trainval2014.zip"]),
        (["--annotations-only"], ["annotations_trainval2014.zip"]),
    ],
)
def test_less_can_be_asked_for(mirror, tmp_path, arguments, expected):
    run("--mirror", mirror[0], "--to", "here", *arguments)
    assert tree(tmp_path / "here") == wanted(*expected)


def test_archives_can_be_kept(mirror, tmp_path):
    run("--mirror", mirror[0], "--splits", "val", "--keep-archives")
    assert (tmp_path / "data/coco/val2014.zip").read_bytes() == (mirror[1] / "zips/val2014.zip").read_bytes()


def test_a_dry_run_says_what_and_how_much_and_writes_nothing(mirror, tmp_path):
    output = run("--mirror", mirror[0], "--dry-run")
    assert f"{mirror[0]}/zips/train2014.zip" in output
    assert not (tmp_path / "data").exists()


def test_a_wrong_file_is_refused_and_what_was_there_stays(mirror, tmp_path):
    run("--mirror", mirror[0], "--annotations-only")
    path = mirror[1] / "zips/val2014.zip"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    output = run("--mirror", mirror[0], "--splits", "val", status=1)
    assert "not the right file" in output
    assert "what to do:" in output
    assert tree(tmp_path / "data/coco") == wanted("annotations_trainval2014.zip")


def test_an_archive_that_reaches_outside_is_refused(mirror, tmp_path, monkeypatch):
    data = zipped({"val2014/../../../evil.jpg": b"x"})
    (mirror[1] / "zips/val2014.zip").write_bytes(data)
    archive = dataclasses.replace(
        gridcap.extract.coco.IMAGES["2014", "val"],
        size=len(data),
        checksum=f"sha256:{hashlib.sha256(data).hexdigest()}",
    )
    monkeypatch.setitem(gridcap.extract.coco.IMAGES, ("2014", "val"), archive)
    assert "lies outside" in run("--mirror", mirror[0], "--splits", "val", status=1)
    assert not list(tmp_path.rglob("evil.jpg"))


def test_too_little_disk_is_told_before_anything_is_fetched(mirror, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(gridcap.extract.coco.shutil, "disk_usage", lambda _: usage._replace(free=100))
    output = run("--mirror", mirror[0], status=1)
    assert "GB are free" in output
    assert not (tmp_path / "data").exists()


def test_the_room_that_is_needed_counts_what_is_there(mirror, tmp_path):
    archives = choose("2014", ("train", "val"), False, False)
    sizes = [archive.size for archive in archives]
    assert space_needed(archives, tmp_path / "x", False) == int(1.02 * (3 * 2000 + max(sizes)))
    assert space_needed(archives, tmp_path / "x", True) == int(1.02 * (3 * 2000 + sum(sizes)))
    run("--mirror", mirror[0], "--to", "x")
    assert space_needed(archives, tmp_path / "x", False) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--splits", "test"], "no 'test' with captions"),
        (["--karpathy", "--year", "2017"], "are of COCO 2014"),
        (["--year", "2015"], "2015"),
    ],
)
def test_wrong_use(mirror, arguments, said):
    assert said in run("--mirror", mirror[0], *arguments, status=2)


def test_the_official_addresses():
    """Sizes and checksums stand in many other projects; the addresses are COCO's and Karpathy's own."""
    archives = [*IMAGES.values(), *ANNOTATIONS.values(), KARPATHY_SPLITS]
    urls = {archive.remote(None).url for archive in archives}
    assert "http://images.cocodataset.org/zips/train2014.zip" in urls
    assert "http://images.cocodataset.org/annotations/annotations_trainval2017.zip" in urls
    assert "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip" in urls
    assert all(len(archive.checksum.partition(":")[2]) in (32, 64) for archive in archives)
