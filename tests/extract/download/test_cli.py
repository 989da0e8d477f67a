"""`gridcap download` against a local server with the same layout and tiny archives."""

import dataclasses
import hashlib
import io
import shutil
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from gridcap.common.config import load_config
from gridcap.extract.download import datasets
from gridcap.extract.download.archives import Archive, space_needed
from gridcap.extract.download.cli import main
from gridcap.extract.download.datasets import OTHERS, coco

MEMBERS = {
    "train2014.zip": {f"train2014/COCO_train2014_{i:012}.jpg": bytes([i]) * 500 for i in range(5)},
    "val2014.zip": {f"val2014/COCO_val2014_{i:012}.jpg": bytes([i]) * 400 for i in range(3)},
    "annotations_trainval2014.zip": {
        f"annotations/{kind}_{split}2014.json": f"{kind} {split}".encode()
        for kind in ("captions", "instances")
        for split in ("train", "val")
    },
    "caption_datasets.zip": {
        "dataset_coco.json": b"splits",
        "dataset_flickr8k.json": b"8k",
        "dataset_flickr30k.json": b"30k",
    },
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
    """A server with tiny archives and a matching catalog; yields its address and its folder."""
    folder = tmp_path / "served"

    def serve(path):
        data = zipped(MEMBERS[Path(path).name])
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
        return len(data), f"sha256:{hashlib.sha256(data).hexdigest()}"

    images = {("2014", part): (*serve(f"zips/{part}2014.zip"), n, 2000) for part, n in (("train", 5), ("val", 3))}
    monkeypatch.setattr(datasets, "COCO_IMAGES", images)
    annotations = serve("annotations/annotations_trainval2014.zip")
    monkeypatch.setattr(datasets, "COCO_ANNOTATIONS", {"2014": annotations})
    monkeypatch.setattr(datasets, "KARPATHY_ZIP", ("server", "caption_datasets.zip", *serve("caption_datasets.zip")))
    monkeypatch.setattr("gridcap.common.download.time.sleep", lambda seconds: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()


def run(*arguments, status=0):
    done = CliRunner().invoke(main, ["coco", *map(str, arguments)])
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done.output


def tree(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "pipeline.yaml"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def expected_files(*names):
    return {name: data for archive in names for name, data in MEMBERS[archive].items() if "instances" not in name}


def test_files_are_unpacked_to_the_folders_in_pipeline_yaml(mirror, tmp_path):
    output = run("--mirror", mirror[0], "--karpathy")
    everything = expected_files("train2014.zip", "val2014.zip", "annotations_trainval2014.zip")
    assert tree(tmp_path / "data/coco") == everything | {"annotations/dataset_coco.json": b"splits"}
    assert "done: data/coco: 11 files written" in output
    for config in (Path(__file__).parents[3] / "pipeline.yaml", tmp_path / "data/coco/pipeline.yaml"):
        for split in load_config(config).data.splits.values():
            assert split.images.is_dir()
            assert split.annotations is not None
            assert split.annotations.is_file()


def test_a_rerun_downloads_nothing(mirror, tmp_path):
    run("--mirror", mirror[0])
    shutil.rmtree(mirror[1])
    output = run("--mirror", mirror[0])
    assert output.count("already unpacked") == 3
    assert "already complete" in output


def test_a_deleted_file_is_restored(mirror, tmp_path):
    run("--mirror", mirror[0])
    deleted = tmp_path / "data/coco/train2014/COCO_train2014_000000000003.jpg"
    deleted.unlink()
    run("--mirror", mirror[0])
    assert deleted.read_bytes() == bytes([3]) * 500


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--splits", "val"], ["val2014.zip", "annotations_trainval2014.zip"]),
        (["--annotations-only"], ["annotations_trainval2014.zip"]),
    ],
)
def test_splits_and_annotations_can_be_selected(mirror, tmp_path, arguments, expected):
    run("--mirror", mirror[0], "--output", "here", *arguments)
    assert tree(tmp_path / "here") == expected_files(*expected)


def test_archives_are_kept_on_request(mirror, tmp_path):
    run("--mirror", mirror[0], "--splits", "val", "--keep-archives")
    assert (tmp_path / "data/coco/val2014.zip").read_bytes() == (mirror[1] / "zips/val2014.zip").read_bytes()


def test_a_dry_run_prints_the_plan_and_writes_nothing(mirror, tmp_path):
    output = run("--mirror", mirror[0], "--dry-run")
    assert f"{mirror[0]}/zips/train2014.zip" in output
    assert not (tmp_path / "data").exists()


def test_a_wrong_checksum_is_an_error_and_keeps_existing_files(mirror, tmp_path):
    run("--mirror", mirror[0], "--annotations-only")
    path = mirror[1] / "zips/val2014.zip"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    output = run("--mirror", mirror[0], "--splits", "val", status=1)
    assert "wrong content" in output
    assert "what to do:" in output
    assert tree(tmp_path / "data/coco") == expected_files("annotations_trainval2014.zip")


def test_a_member_outside_the_folder_is_an_error(mirror, tmp_path, monkeypatch):
    data = zipped({"val2014/../../../evil.jpg": b"x"})
    (mirror[1] / "zips/val2014.zip").write_bytes(data)
    changed = (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}", 1, 2000)
    monkeypatch.setitem(datasets.COCO_IMAGES, ("2014", "val"), changed)
    assert "leaves the folder" in run("--mirror", mirror[0], "--splits", "val", status=1)
    assert not list(tmp_path.rglob("evil.jpg"))


def test_disk_space_is_checked_before_the_download(mirror, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("gridcap.extract.download.archives.shutil.disk_usage", lambda _: usage._replace(free=100))
    output = run("--mirror", mirror[0], status=1)
    assert "GB free" in output
    assert not (tmp_path / "data").exists()


def test_required_disk_space_excludes_existing_files(mirror, tmp_path):
    dataset = coco("2014", ("train", "val"), False, None)
    archives = [dataclasses.replace(a, unpacked=2000) for a in (*dataset.annotations, *dataset.images)]
    sizes = [archive.size for archive in archives]
    assert space_needed(archives, tmp_path / "x", False) == int(1.02 * (3 * 2000 + max(sizes)))
    assert space_needed(archives, tmp_path / "x", True) == int(1.02 * (3 * 2000 + sum(sizes)))
    run("--mirror", mirror[0], "--output", "x")
    assert space_needed(archives, tmp_path / "x", False) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--splits", "test"], "no captions for 'test'"),
        (["--karpathy", "--year", "2017"], "all images of COCO 2014"),
        (["--year", "2015"], "2015"),
    ],
)
def test_usage_errors(mirror, arguments, message):
    assert message in run("--mirror", mirror[0], *arguments, status=2)


def test_official_addresses():
    """The addresses, sizes, and checksums agree with other projects."""
    catalog = [coco("2014", ("train", "val"), True, None), coco("2017", ("train",), False, None)]
    catalog += [build() for build in OTHERS.values()]
    archives = [archive for dataset in catalog for archive in (*dataset.annotations, *dataset.images)]
    urls = {archive.url(None) for archive in archives}
    assert "http://images.cocodataset.org/zips/train2014.zip" in urls
    assert "http://images.cocodataset.org/annotations/annotations_trainval2017.zip" in urls
    assert "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip" in urls
    assert "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_Dataset.zip" in urls
    assert all(len(archive.checksum.partition(":")[2]) in (32, 64) for archive in archives)
    assert all(dataset.terms for dataset in catalog)


def test_options_of_coco_are_rejected_for_other_datasets():
    for arguments in (["flickr8k", "--limit", "5"], ["nocaps", "--year", "2014"], ["flickr30k", "--karpathy"]):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2
        assert f"{arguments[1]} cannot be used with {arguments[0]}" in done.output


def test_flickr_archives_are_unpacked_next_to_their_captions(mirror, tmp_path, monkeypatch):
    """Flickr8k is a zip, Flickr30k a .tar.gz of unknown size; both use Karpathy's captions."""
    url, folder = mirror
    (folder / "8k.zip").write_bytes(zipped({"Flicker8k_Dataset/1.jpg": b"one", "__MACOSX/x": b"x"}))
    with tarfile.open(folder / "30k.gz", "w:gz") as tar:
        (tmp_path / "2.jpg").write_bytes(b"two")
        tar.add(tmp_path / "2.jpg", "flickr30k-images/2.jpg")
    for name, file, member in (
        ("flickr8k", "8k.zip", "Flicker8k_Dataset/1.jpg"),
        ("flickr30k", "30k.gz", "flickr30k-images/2.jpg"),
    ):
        checksum = f"md5:{hashlib.md5((folder / file).read_bytes()).hexdigest()}"
        archive = Archive("server", file, None, checksum, (f"{Path(member).parent}/",), 1, 100)
        dataset = dataclasses.replace(OTHERS[name](), images=(archive,))
        monkeypatch.setitem(OTHERS, name, lambda dataset=dataset: dataset)
        done = CliRunner().invoke(main, [name, "--mirror", url])
        assert done.exit_code == 0, done.output
        assert "non-commercial" in done.output
        assert f"next: extract-features --config data/{name}/pipeline.yaml --split train" in done.output
        assert sorted(tree(tmp_path / "data" / name)) == sorted([member, f"dataset_{name}.json"])
        split = load_config(tmp_path / "data" / name / "pipeline.yaml").data.splits["test"]
        assert (split.images / Path(member).name).is_file()
