"""Matching the images of a captions file with the files of an image folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gridcap.common.captions.match_files import EXACT, MISSING, RELATIVE, STEM, match_files
from gridcap.common.captions.records import ImageRecord, id_from_name
from gridcap.common.captions.split import split_images
from gridcap.common.config import DataConfig, SplitConfig
from gridcap.common.errors import AnnotationError

Make = Callable[[Sequence[str]], Path]


@pytest.fixture
def folder_of(tmp_path: Path) -> Make:
    def make(files: Sequence[str]) -> Path:
        for file in files:
            path = tmp_path / "data" / "photos" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "data" / "photos"

    return make


def named(name: str) -> ImageRecord:
    return ImageRecord(int(name) if name.isdigit() else id_from_name(name), name)


@pytest.mark.parametrize(
    ("files", "name", "expected", "kind"),
    [
        (["a.jpg", "sub/a.jpg"], "a.jpg", "a.jpg", EXACT),
        (["photos/a.jpg", "a.jpg"], "photos/a.jpg", "photos/a.jpg", EXACT),
        (["sub/a.jpg"], "photos/sub/a.jpg", "sub/a.jpg", RELATIVE),
        (["sub/a.jpg"], "data/photos/sub/a.jpg", "sub/a.jpg", RELATIVE),
        (["a.jpg"], "a", "a.jpg", STEM),
        (["sub/a.png"], "a.jpg", "sub/a.png", STEM),
        (["a.b.jpg"], "a.b", "a.b.jpg", STEM),
        (["0017.jpg"], "17", "0017.jpg", STEM),
        (["COCO_val2014_000000000042.jpg"], "42", "COCO_val2014_000000000042.jpg", STEM),
        (["001.jpg", "cat/001.jpg"], "dog/001.jpg", "dog/001.jpg", MISSING),  # another folder is another image
        (["a.jpg"], "b", "b", MISSING),
    ],
)
def test_the_file_and_the_kind_of_a_match(
    folder_of: Make, files: list[str], name: str, expected: str, kind: str
) -> None:
    (record,), kinds = match_files([named(name)], folder_of(files))
    assert (record.file_name, kinds) == (expected, {kind: 1})
    assert record.image_id == (int(name) if name.isdigit() else id_from_name(expected))


@pytest.mark.parametrize(("files", "name"), [(["x/a.jpg", "y/a.jpg"], "a"), (["a.jpg", "a.png"], "a")])
def test_a_name_of_two_files_is_an_error_that_names_both(folder_of: Make, files: list[str], name: str) -> None:
    with pytest.raises(AnnotationError, match=f"{name}: both {files[0]} and {files[1]}"):
        match_files([named(name)], folder_of(files))


def test_two_names_of_one_file_are_an_error_that_names_both(folder_of: Make) -> None:
    with pytest.raises(AnnotationError, match=r"matches both a\.jpg and a"):
        match_files([named("a.jpg"), named("a")], folder_of(["a.jpg"]))


def test_the_images_of_a_table_are_matched_for_extraction(folder_of: Make, tmp_path: Path) -> None:
    folder = folder_of(["a.jpg", "b.jpg"])
    (tmp_path / "c.csv").write_text("foto,caption\nphotos/a.jpg,x\nb.png,y\n")
    data = DataConfig(image_column="foto")
    records, problems = split_images(SplitConfig(images=folder, annotations=tmp_path / "c.csv"), "train", data)
    assert [record.file_name for record in records] == ["a.jpg", "b.jpg"]
    assert problems.lines() == [f"1 x {RELATIVE}", f"1 x {STEM}"]
