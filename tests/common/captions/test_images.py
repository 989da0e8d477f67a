"""Listing the images of a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gridcap.common.captions.images import SourceImages, list_images
from gridcap.common.captions.records import CaptionSet, id_from_name
from gridcap.common.errors import AnnotationError, PathError
from gridcap.common.sources.folder import LOOP, NOT_FOLLOWED
from gridcap.common.sources.registry import NO_EXTENSION


def create(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names_in(listed: CaptionSet) -> list[str]:
    return [record.file_name for record in listed.records]


def test_a_folder_lists_its_images_sorted_and_without_captions(tmp_path: Path) -> None:
    create(tmp_path / "photos", "z.jpg", "a.PNG", "sub/deep/m.webp", "notes.txt", "noimage")
    listed = list_images(tmp_path / "photos")
    assert names_in(listed) == ["a.PNG", "sub/deep/m.webp", "z.jpg"]
    assert all(r.captions == () and r.image_id == id_from_name(r.file_name) for r in listed.records)


@pytest.mark.parametrize("exists", [False, True])
def test_a_missing_or_empty_folder_raises_an_error_with_its_name(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "photos").mkdir()
    with pytest.raises(AnnotationError if exists else PathError, match="photos"):
        list_images(tmp_path / "photos")


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    assert names_in(list_images(create(tmp_path, "album.jpg/a.png"))) == ["album.jpg/a.png"]


def test_a_file_name_that_is_not_utf8_is_counted(tmp_path: Path) -> None:
    """Old archives unpack to Latin-1 names; HDF5 and JSON require UTF-8."""
    create(tmp_path, "a.jpg")
    try:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
            pass
    except OSError:
        pytest.skip("this file system supports UTF-8 names only")
    listed = list_images(tmp_path)
    assert names_in(listed) == ["a.jpg"]
    assert listed.problems.total == 1


def test_names_are_sorted_by_full_path_and_can_be_iterated_again(tmp_path: Path) -> None:
    names = ["a/x.jpg", "a-b/x.jpg", "a.jpg", "b.PNG", "a/y/z.gif", "é.webp", "A.bmp"]
    images = SourceImages(create(tmp_path, *names, "notes.txt", ".jpg", "a/nothing"))
    assert [image.file_name for image in images] == sorted(names)
    skipped = dict(images.problems.skipped)
    assert list(images) == list(images)
    assert dict(images.problems.skipped) == skipped == {".txt": 1, NO_EXTENSION: 2}


def test_item_18_skipped_files_are_counted_by_format(tmp_path: Path) -> None:
    folder = create(tmp_path, "a.jpg", "b.jfif", "1.svg", "2.SVG", "x.eps", "sub/notes.txt", "._a.jpg")
    listed = list_images(folder)
    assert names_in(listed) == ["a.jpg", "b.jfif"]
    assert listed.problems.lines() == ["skipped, not a supported image file: 2 .svg, 1 .eps, 1 .txt"]
    assert listed.problems.total == 0, "skipped files do not count towards max_invalid"


def test_item_18_skipped_files_of_many_types_are_all_counted(tmp_path: Path) -> None:
    folder = create(tmp_path, "a.jpg", "README", "LICENSE", *(f"{n}.x{n}" for n in range(9)))
    (line,) = list_images(folder).problems.lines()
    assert line.startswith("skipped, not a supported image file: 2 without an extension, 1 .x")
    assert line.endswith(", 2 of other types")


def test_item_18_a_folder_without_supported_images_says_what_it_contains(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"contains no images.*2 \.svg"):
        list_images(create(tmp_path, "1.svg", "2.svg"))


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder with a linked subfolder, a loop, a link to itself, and broken links."""
    create(tmp_path / "elsewhere", "b.jpg", "deep/c.jpg")
    folder = create(tmp_path / "photos", "a.jpg", "sub/d.jpg")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "broken").symlink_to("nowhere")
    return folder


def test_item_17_linked_folders_are_reported_when_not_followed(linked: Path) -> None:
    listed = list_images(linked)
    assert names_in(listed) == ["a.jpg", "gone.png", "self.jpg", "sub/d.jpg"]
    assert listed.problems.skipped == {NO_EXTENSION: 1}
    assert listed.problems.skipped_folders == {NOT_FOLLOWED: 2}
    assert listed.problems.lines()[1] == "skipped: 2 linked folders (set data.follow_links=true to include them)"


def test_item_17_linked_folders_are_followed_when_asked_and_loops_are_not(linked: Path) -> None:
    listed = list_images(linked, follow_links=True)
    assert names_in(listed) == ["a.jpg", "gone.png", "more/b.jpg", "more/deep/c.jpg", "self.jpg", "sub/d.jpg"]
    assert listed.problems.skipped == {NO_EXTENSION: 1}
    assert listed.problems.skipped_folders == {LOOP: 2}


def test_item_17_two_links_to_one_folder_are_not_a_loop(tmp_path: Path) -> None:
    create(tmp_path / "elsewhere", "b.jpg")
    folder = create(tmp_path / "photos", "a.jpg")
    for name in ("x", "y"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    assert names_in(list_images(folder, follow_links=True)) == ["a.jpg", "x/b.jpg", "y/b.jpg"]
