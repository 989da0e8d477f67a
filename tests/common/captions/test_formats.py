"""One tiny file per captions format: the images, captions, and ids that are read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from gridcap.common.captions.read import captions_formats, read_captions
from gridcap.common.captions.records import id_from_name
from gridcap.common.errors import AnnotationError

BIG = 2**31 + 7


def _coco(**more: Any) -> str:
    images = [{"id": BIG, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
    annotations = [{"id": 1, "image_id": BIG, "caption": "a cat", **more}, {"id": 2, "image_id": 2, "caption": "b"}]
    return json.dumps({"images": images, "annotations": annotations})


def _karpathy() -> str:
    entry = {"filename": "a.jpg", "filepath": "val2014", "cocoid": 7, "split": "train", "sentences": [{"raw": "a cat"}]}
    return json.dumps({"images": [entry, {**entry, "split": "test", "cocoid": 8}]})


TEXT_IDS = {"images": [{"id": "x7", "file_name": "a.jpg"}], "annotations": [{"image_id": "x7", "caption": "a cat"}]}
FLOAT_IDS = {"images": [{"id": 7.0, "file_name": "a.jpg"}], "annotations": [{"image_id": "7", "caption": "a cat"}]}
TEXTCAPS = {"data": [{"image_id": "0a", "image_path": "train/0a.jpg", "caption_str": "a cat", "set_name": "train"}]}
AI_CHALLENGER = [{"url": "http://x.com/1", "image_id": "8f.jpg", "caption": ["一只猫", "猫"]}]
LINES = '{"image": "a.jpg", "caption": "a cat"}\n\n{"image": "a.jpg", "caption": ["x", "y"]}\n'
Row = tuple[int | None, str, tuple[str, ...]]  # id (None: derived from the name), file name, captions

CASES: list[tuple[str, str, str, list[Row]]] = [
    ("coco.json", _coco(), "COCO", [(BIG, "a.jpg", ("a cat",)), (2, "b.jpg", ("b",))]),
    ("vizwiz.json", _coco(is_rejected=True), "COCO", [(BIG, "a.jpg", ()), (2, "b.jpg", ("b",))]),
    ("stair.json", _coco(tokenized_caption="a"), "COCO", [(BIG, "a.jpg", ("a cat",)), (2, "b.jpg", ("b",))]),
    ("text.json", json.dumps(TEXT_IDS), "COCO", [(id_from_name("x7"), "a.jpg", ("a cat",))]),
    ("float.json", json.dumps(FLOAT_IDS), "COCO", [(7, "a.jpg", ("a cat",))]),
    ("dataset_coco.json", _karpathy(), "Karpathy", [(7, "val2014/a.jpg", ("a cat",))]),
    ("textcaps.json", json.dumps(TEXTCAPS), "JSON list", [(None, "train/0a.jpg", ("a cat",))]),
    ("caption_train.json", json.dumps(AI_CHALLENGER), "JSON list", [(None, "8f.jpg", ("一只猫", "猫"))]),
    ("list.json", '[{"image_id": 7.0, "caption": "a cat"}]', "JSON list", [(7, "7", ("a cat",))]),
    ("lines.jsonl", LINES, "JSON Lines", [(None, "a.jpg", ("a cat", "x", "y"))]),
    ("ids.csv", f"image_id,caption\n{BIG}.0,a cat\n{BIG},b\n", "table", [(BIG, str(BIG), ("a cat", "b"))]),
    ("ids.tsv", "caption\timage_id\na cat\tx7\n", "table", [(None, "x7", ("a cat",))]),
    (
        "results.csv",
        'image_name| comment_number| comment\na.jpg| 0| A "big" cat , asleep .\na.jpg| 1| x\n',
        "table",
        [(None, "a.jpg", ('A "big" cat , asleep .', "x"))],
    ),
    ("Flickr8k.token.txt", "a.jpg#0\ta cat\r\na.jpg#1\tx, y\r\n", "Flickr8k", [(None, "a.jpg", ("a cat", "x, y"))]),
    (
        "Train_GCC.tsv",
        "a cat\thttp://x.com/y/a.jpg?w=9\na dog\thttps://x.com/b\n",
        "Conceptual",
        [(None, "x.com/y/a.jpg", ("a cat",)), (None, "x.com/b", ("a dog",))],
    ),
    ("reversed.tsv", "http://x.com/a.jpg\ta cat\n", "Conceptual", [(None, "x.com/a.jpg", ("a cat",))]),
]


def _read(path: Path, part: str = "train") -> list[Row]:
    return [(record.image_id, record.file_name, record.captions) for record in read_captions(path, part).records]


def _with_ids(rows: list[Row]) -> list[Row]:
    return [(id_from_name(name) if image_id is None else image_id, name, captions) for image_id, name, captions in rows]


@pytest.mark.parametrize(("name", "text", "format_name", "expected"), CASES, ids=[case[0] for case in CASES])
def test_images_captions_and_ids_of_every_text_format(
    tmp_path: Path, name: str, text: str, format_name: str, expected: list[Row]
) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert _read(path) == _with_ids(expected)
    loaded = read_captions(path)
    assert loaded.format.startswith(format_name)
    assert loaded.problems.total == 0


def test_every_format_has_a_distinct_name_and_an_example() -> None:
    formats = captions_formats()
    assert len({captions_format.name for captions_format in formats}) == len(formats) == 9
    assert all(captions_format.example for captions_format in formats)


def test_the_lists_next_to_a_token_file_are_its_parts(tmp_path: Path) -> None:
    (tmp_path / "Flickr8k.token.txt").write_text("a.jpg#0\tx\nb.jpg#0\ty\nc.jpg#0\tz\na.jpg\n")
    for part, name in {"train": "a", "dev": "b", "test": "c"}.items():
        (tmp_path / f"Flickr_8k.{part}Images.txt").write_text(f"{name}.jpg\n")
    for part, name in {"train": "a.jpg", "val": "b.jpg", "test": "c.jpg"}.items():
        loaded = read_captions(tmp_path / "Flickr8k.token.txt", part)
        assert [record.file_name for record in loaded.records] == [name]
        assert loaded.problems.counts == {"line that is not name#number, tab, caption": 1}
    (tmp_path / "Flickr_8k.testImages.txt").write_text("a.jpg\n")
    with pytest.raises(AnnotationError, match=r"a\.jpg is also in the list of train"):
        read_captions(tmp_path / "Flickr8k.token.txt", "train")


def test_invalid_json_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"image": "a.jpg", "caption": "x"}\n{"image": \n[3]\n')
    loaded = read_captions(tmp_path / "c.jsonl")
    assert [record.captions for record in loaded.records] == [("x",)]
    assert loaded.problems.counts == {"line that is not valid JSON": 1, "entry that is not an object": 1}


@pytest.mark.parametrize("in_folder", [False, True])
def test_parquet_of_a_hugging_face_dataset(tmp_path: Path, in_folder: bool) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": b"x", "path": "a.jpg"}, {"bytes": b"y", "path": "b.jpg"}, {"bytes": b"z", "path": None}]
    table = arrow.table(
        {"image": images, "caption": [["a cat", "x"], ["b"], ["c"]], "split": ["train", "test", "train"]}
    )
    parquet.write_table(table, tmp_path / "0.parquet")
    path = tmp_path if in_folder else tmp_path / "0.parquet"
    assert _read(path) == _with_ids([(None, "a.jpg", ("a cat", "x"))])
    assert read_captions(path).problems.counts == {"row without an image": 1}
    assert _read(path, "test") == _with_ids([(None, "b.jpg", ("b",))])


def test_a_corrupted_parquet_file_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 truncated")
    with pytest.raises(AnnotationError, match="cannot be read as Parquet"):
        read_captions(tmp_path / "c.parquet")


def test_members_of_a_webdataset_tar(tmp_path: Path) -> None:
    members = {
        "d/01.jpg": b"pixels",
        "d/01.json": b'{"caption": "not this one"}',
        "d/01.txt": b"a cat\nx\n",
        "02.json": b'{"caption": "a dog"}',
        "02.png": b"pixels",
        "03.jpg": b"pixels",
    }
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    expected: list[Row] = [(None, "d/01.jpg", ("a cat", "x")), (None, "02.png", ("a dog",)), (None, "03.jpg", ())]
    assert _read(tmp_path / "00000.tar") == _with_ids(expected)
    assert read_captions(tmp_path / "00000.tar").problems.counts == {"empty caption": 1}
