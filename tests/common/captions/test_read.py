"""Detection of the format and the encoding of a captions file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gridcap.common.captions.read import captions_formats, read_captions
from gridcap.common.captions.records import Problems
from gridcap.common.errors import AnnotationError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [', "not valid JSON: line 1"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"images": [' + b"1" * 5000 + b"]}", "not valid JSON"),
        (b'{"images": "caf\xe9"}', "not UTF-8"),
        (b"\xff\xd8\xff\xe0\0 a JPEG", "not a text file"),
        (b"[1, 2]", "unsupported captions format"),
        (b'{"annotations": []}', "unsupported captions format"),
        (b'{"images": {}}', "unsupported captions format"),
        (b'{"images": [], "annotations": {}}', "annotations is not a list"),
    ],
)
def test_a_file_that_is_not_a_captions_file_raises_an_error_with_its_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=message) as caught:
        read_captions(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_missing_captions_file_raises_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"nowhere\.json: No such file"):
        read_captions(tmp_path / "nowhere.json")


@pytest.mark.parametrize("name", ["captions", "captions.data"])
def test_json_is_recognized_without_its_extension(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}]}))
    assert [record.file_name for record in read_captions(tmp_path / name).records] == ["a.jpg"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.xml", "<captions/>\n<more>\t</more>"),
        ("captions", "1.jpg a dog"),
        ("captions.jsonl", "a dog"),
        ("captions.json", "[1, 2]"),
    ],
)
def test_item_23_an_unsupported_format_shows_its_first_lines_and_the_supported_ones(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(AnnotationError, match="unsupported captions format") as caught:
        read_captions(tmp_path / name)
    assert name in caught.value.message
    assert text.partition("\n")[0] in caught.value.message
    assert "\t" not in caught.value.message
    assert "download" not in caught.value.hint
    for captions_format in captions_formats():
        assert captions_format.name in caught.value.hint


@pytest.mark.parametrize("name", ["captions.csv", "captions.json", "captions.txt"])
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-16-le", "utf-16-be"])
def test_item_23_another_encoding_is_named_with_its_remedy(tmp_path: Path, name: str, encoding: str) -> None:
    table = "image,caption\ncafé.jpg,un café\n"
    tree = json.dumps({"images": [{"id": 1, "file_name": "café.jpg"}]}, ensure_ascii=False)
    (tmp_path / name).write_bytes((tree if name.endswith("json") else table).encode(encoding))
    with pytest.raises(AnnotationError, match="not UTF-8 text") as caught:
        read_captions(tmp_path / name)
    assert ("UTF-16" if "16" in encoding else "CP1252") in caught.value.message
    assert "iconv -f" in caught.value.hint


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_item_23_utf_16_is_named_even_if_its_bytes_are_valid_utf_8(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "captions.csv").write_bytes("image,caption\na.jpg,a cat\n".encode(encoding))
    with pytest.raises(AnnotationError, match="not UTF-8 text; the encoding is UTF-16"):
        read_captions(tmp_path / "captions.csv")


def test_an_entry_too_deep_to_print_is_counted() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    problems = Problems()
    problems.add("image without sentences", deep)
    assert problems.lines() == ["1 x image without sentences (value too large to show)"]


def test_problems_show_their_first_three_examples() -> None:
    problems = Problems()
    for number in range(5):
        problems.add("empty caption", f"annotation {number}")
    problems.add("duplicate image id", "x" * 500)
    many, one = problems.lines()
    assert many == "5 x empty caption (annotation 0, annotation 1, annotation 2, ...)"
    assert one.startswith("1 x duplicate image id (xxx")
    assert len(one) < 200


def test_item_26_problems_with_line_breaks_stay_on_one_line() -> None:
    problems = Problems()
    problems.add("duplicate image id", "7 a\tb\nc.jpg")
    problems.skipped[".he\nic"] += 1
    assert problems.lines() == [
        r"1 x duplicate image id (7 a\tb\nc.jpg)",
        r"skipped, not a supported image file: 1 .he\nic",
    ]
