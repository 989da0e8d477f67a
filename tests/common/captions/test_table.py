"""Tables: columns by name, separators, quotes, and errors that name the columns."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gridcap.common.captions.read import read_captions
from gridcap.common.captions.records import CaptionSet, Problems, id_from_name
from gridcap.common.captions.source import Columns
from gridcap.common.errors import AnnotationError

Load = Callable[[str], CaptionSet]


@pytest.mark.parametrize("header", ["", "image,caption\n", "Image,Caption\n", "file_name,caption\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_header_byte_order_mark_and_line_ends_are_optional(
    load_csv: Load, captions_by_name: Any, header: str, mark: str, line_end: str
) -> None:
    text = mark + header + "b.jpg,a dog\na.jpg,a cat\n\nb.jpg,the dog again\n"
    loaded = load_csv(text.replace("\n", line_end))
    assert captions_by_name(loaded) == {"b.jpg": ("a dog", "the dog again"), "a.jpg": ("a cat",)}
    assert [record.file_name for record in loaded.records] == ["b.jpg", "a.jpg"]
    assert loaded.problems == Problems()


def test_flickr8k_captions_txt_is_read(tmp_path: Path, captions_by_name: Any) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("image,caption\n1000268201_693b08cb0e.jpg,A child in a pink dress .\n")
    assert captions_by_name(read_captions(path)) == {"1000268201_693b08cb0e.jpg": ("A child in a pink dress .",)}


def test_commas_and_quotes_in_a_quoted_caption_are_kept(load_csv: Load) -> None:
    loaded = load_csv('a.jpg,"a man, a ""big"" dog, and a cat"\n')
    assert loaded.records[0].captions == ('a man, a "big" dog, and a cat',)


def test_unquoted_commas_are_part_of_the_last_column_and_reported(load_csv: Load) -> None:
    loaded = load_csv("image,caption\na.jpg,a man,a dog,and a cat\nb.jpg, a man, a dog\nc.jpg,a cow\n")
    assert [record.captions for record in loaded.records] == [
        ("a man,a dog,and a cat",),
        ("a man, a dog",),
        ("a cow",),
    ]
    (note,) = loaded.problems.lines()
    assert note.startswith("2 x caption with unquoted ','")
    assert loaded.problems.total == 0


def test_unquoted_commas_before_other_columns_are_invalid(load_csv: Load, count_problems: Any) -> None:
    loaded = load_csv("image,caption,split\na.jpg,a man,a dog,train\nb.jpg,a cow,train\n")
    assert [record.captions for record in loaded.records] == [("a cow",)]
    assert count_problems(loaded, "more cells than the header") == 1


@pytest.mark.parametrize(
    "text",
    [
        "image,caption,split\na.jpg,a ring,train\nb.jpg,a cat,val\n",  # reproduced: read as "a ring,train"
        "caption,image\na ring,a.jpg\n",
        "id,image,caption\n7,a.jpg,a ring\n",
        "image,caption_number,caption\na.jpg,0,a ring\n",
        "image,text\na.jpg,a ring\n",
        "image\tcaption\na.jpg\ta ring\n",
        "image_name| comment_number| comment\na.jpg| 0| a ring\n",
        "FileName;Sentence\na.jpg;a ring\n",
        "image_path,width,caption_str\na.jpg,3,a ring\n",
        "filename,caption_1,caption_2\na.jpg,a ring,\n",
        'image,captions\na.jpg,"[""a ring""]"\n',
    ],
)
def test_columns_are_found_by_name_in_any_order(load_csv: Load, captions_by_name: Any, text: str) -> None:
    loaded = load_csv(text)
    assert captions_by_name(loaded) == {"a.jpg": ("a ring",)}
    assert loaded.problems == Problems()


@pytest.mark.parametrize(("part", "name"), [("train", "a"), ("karpathy-train", "a"), ("val", "b"), ("extra", "c")])
def test_split_selects_the_rows_of_a_split_column(tmp_path: Path, part: str, name: str) -> None:
    (tmp_path / "c.csv").write_text("image,caption,split\na,x,train\nb,y,validation\nc,z,extra\n")
    assert [record.file_name for record in read_captions(tmp_path / "c.csv", part).records] == [name]


def test_a_missing_part_is_an_error_and_another_name_selects_all_rows_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("image,caption,split\na,x,train\nb,y,val\n")
    with pytest.raises(AnnotationError, match=r"no rows with split = test \(values: train, val\)"):
        read_captions(tmp_path / "c.csv", "test")
    loaded = read_captions(tmp_path / "c.csv", "photos")
    assert len(loaded.records) == 2
    assert "'split' ignored" in loaded.problems.lines()[0]


def test_chosen_columns_override_the_names(tmp_path: Path, captions_by_name: Any) -> None:
    (tmp_path / "c.csv").write_text("image,caption,photo,beschreibung,photographer\nx,y,a.jpg,ein Ring,me\n")
    loaded = read_captions(tmp_path / "c.csv", columns=Columns("photo", "Beschreibung", "photographer"))
    assert captions_by_name(loaded) == {"a.jpg": ("ein Ring",)}
    assert loaded.records[0].group == "me"
    assert loaded.columns == {"image": "photo", "caption": "beschreibung", "group": "photographer"}
    with pytest.raises(AnnotationError, match="no column 'foto'; columns: image, caption, photo"):
        read_captions(tmp_path / "c.csv", columns=Columns("foto"))


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("image\n1.jpg\n", "image"),
        ("photo,words\n1.jpg,x\n", "photo, words"),
        ("1.jpg,0,a board\n", "1.jpg | 0 | a board"),
        ("1.jpg,a cat\n2.jpg,a man, a dog\n", "2.jpg | a man | a dog"),
        ("17,a.jpg,a cat\n", "17, a.jpg, a cat"),
    ],
)
def test_item_04_other_columns_raise_an_error_that_names_them(load_csv: Load, text: str, columns: str) -> None:
    with pytest.raises(AnnotationError, match=r"captions\.csv") as caught:
        load_csv(text)
    assert columns in caught.value.message
    assert "image,caption" in caught.value.hint


@pytest.mark.parametrize("delimiter", [",", "\t", "|", ";"])
@pytest.mark.parametrize("columns", [("image", "caption"), ("caption", "image"), ("caption", "split", "image")])
def test_tables_written_by_the_csv_module_are_read_back(
    tmp_path: Path, captions_by_name: Any, delimiter: str, columns: tuple[str, ...]
) -> None:
    """Random captions with separators, quotes, and line breaks: the caption is read with its white space collapsed."""
    rng = random.Random(f"{delimiter}{columns}")
    expected: dict[str, list[str]] = {}
    path = tmp_path / "c.csv"
    with path.open("w", newline="", encoding=rng.choice(["utf-8", "utf-8-sig"])) as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=rng.choice(["\n", "\r\n"]))
        writer.writerow(columns)
        for _ in range(100):
            name = f"{rng.randrange(40)}.jpg"
            caption = "x" + "".join(rng.choices('ab é猫,;|\t"\n', k=rng.randrange(12)))
            values = {"image": name, "caption": caption, "split": "train"}
            writer.writerow([values[column] for column in columns])
            expected.setdefault(name, []).append(" ".join(caption.split()))
    loaded = read_captions(path)
    assert captions_by_name(loaded) == {name: tuple(captions) for name, captions in expected.items()}
    assert loaded.problems == Problems()


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_item_04_a_quoted_caption_with_line_breaks_is_read_whole(
    load_csv: Load, captions_by_name: Any, line_end: str
) -> None:
    text = 'image,caption\na.jpg,"a dog\non a bench,\n\nasleep"\nb.jpg,a cat\nb.jpg,"two ""big""\ncats"\n'
    loaded = load_csv(text.replace("\n", line_end))
    assert captions_by_name(loaded) == {"a.jpg": ("a dog on a bench, asleep",), "b.jpg": ("a cat", 'two "big" cats')}
    assert loaded.problems == Problems()


@pytest.mark.parametrize(
    "text", ['a.jpg,"a dog\nb.jpg,a cat\nc.jpg,a cow\n', 'b.jpg,a cat\nc.jpg,a cow\na.jpg,"a dog\n']
)
def test_an_unclosed_quote_is_counted_and_does_not_swallow_the_next_rows(
    load_csv: Load, captions_by_name: Any, count_problems: Any, text: str
) -> None:
    loaded = load_csv(text)
    assert captions_by_name(loaded) == {"b.jpg": ("a cat",), "c.jpg": ("a cow",)}
    assert count_problems(loaded, "never closed") == 1


@pytest.mark.parametrize("line", ["a.jpg", "a.jpg,", "a.jpg,  ", 'a.jpg,""'])
def test_a_row_without_a_caption_is_counted_and_its_image_kept(
    load_csv: Load, count_problems: Any, captions_by_name: Any, line: str
) -> None:
    loaded = load_csv(f"b.jpg,a dog\n{line}\n")
    assert count_problems(loaded, "empty caption") == 1
    assert captions_by_name(loaded) == {"b.jpg": ("a dog",), "a.jpg": ()}


def test_a_row_whose_first_column_is_not_an_image_is_counted(
    load_csv: Load, count_problems: Any, captions_by_name: Any
) -> None:
    loaded = load_csv("b.jpg,a dog\nnotes,read me\n17,a.jpg,a cat\n")
    assert count_problems(loaded, "not an image file name") == 2
    assert captions_by_name(loaded) == {"b.jpg": ("a dog",)}


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg"])
def test_a_file_name_outside_the_image_folder_raises_an_error(load_csv: Load, name: str) -> None:
    with pytest.raises(AnnotationError, match="leaves the image folder"):
        load_csv(f"b.jpg,a dog\n{name},a cat\n")


def test_a_field_over_the_csv_size_limit_is_counted(load_csv: Load, count_problems: Any, captions_by_name: Any) -> None:
    loaded = load_csv("a.jpg,a dog\nb.jpg," + "x" * 200_000 + "\nc.jpg,a cow\n")
    assert count_problems(loaded, "not CSV") == 1
    assert captions_by_name(loaded) == {"a.jpg": ("a dog",), "c.jpg": ("a cow",)}


def test_a_caption_that_starts_with_a_quoted_word_is_read(load_csv: Load, captions_by_name: Any) -> None:
    loaded = load_csv('a.jpg,"Stop" sign on a wall\nb.jpg,a 5" pipe\n')
    assert captions_by_name(loaded) == {"a.jpg": ("Stop sign on a wall",), "b.jpg": ('a 5" pipe',)}
    assert loaded.problems == Problems()


def test_ids_depend_only_on_the_file_name(load_csv: Load) -> None:
    """So a photo has the same id in every subset of the file and in a folder listing."""
    whole = {r.file_name: r.image_id for r in load_csv("a.jpg,x\nb.jpg,y\nsub/a.jpg,z\n").records}
    part = {r.file_name: r.image_id for r in load_csv("b.jpg,another caption\n").records}
    assert len(set(whole.values())) == 3
    assert part == {"b.jpg": whole["b.jpg"]}
    assert id_from_name("b.jpg") == whole["b.jpg"]
    assert all(0 <= image_id < 2**63 for image_id in whole.values())  # fits int64
