"""The summary of a captions file."""

from __future__ import annotations

from pathlib import Path

import pytest

from gridcap.common.captions.describe import describe_captions, script_of
from gridcap.common.captions.source import Columns


def describe(tmp_path: Path, text: str, columns: Columns | None = None) -> list[str]:
    (tmp_path / "c.csv").write_text(text, encoding="utf-8")
    return describe_captions(tmp_path / "c.csv", "train", columns)


def test_a_table_is_described(tmp_path: Path) -> None:
    rows = ["a.jpg,a cat,train", "a.jpg,a cat,train", "b.jpg,a cat,train", "c.jpg,A dog's bed,train", "d.jpg,x,val"]
    lines = describe(tmp_path, "\n".join(["image,caption,split", *rows, "e.jpg,,train"]))
    text = "\n".join(" ".join(line.split()) for line in lines)
    for expected in (
        "format table",
        "columns image = image, caption = caption, split = split",
        "part train: 4 images, 4 captions",
        "per image 0: 1 image, 1: 2 images, 2: 1 image",
        "script Latin (English, Spanish, German, Vietnamese, ...) 100%",
        "lengths 2 to 3 words, median 2, 95% have at most 2",
        "vocabulary min_count 1: 4 distinct words, 100.00% of all words",
        "vocabulary min_count 2: 2 distinct words, 77.78% of all words",
        "duplicates 1 caption repeated for one image; 1 text used for several images (most: 2 x a cat)",
        "note 1 x empty caption (line 7)",
        "(and 1 more)",
    ):
        assert expected in text, (expected, text)


def test_a_language_without_spaces_is_counted_by_character(tmp_path: Path) -> None:
    text = "\n".join(describe(tmp_path, "image,caption\na.jpg,一只猫。\nb.jpg,一只狗。\n"))
    assert "Han (Chinese, Japanese) 100%" in text
    assert "4 distinct characters, 100.00%" in text


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("ein Ring", "LATIN"),
        ("кот", "CYRILLIC"),
        ("猫がいる", "HIRAGANA"),
        ("แมว", "THAI"),
        ("고양이", "HANGUL"),
        ("17 !", None),
    ],
)
def test_the_script_of_a_caption(text: str, script: str | None) -> None:
    assert script_of(text) == script
