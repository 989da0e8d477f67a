"""The path of an image inside its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from gridcap.common.image import InvalidImageError, image_path


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "b/../../a.png"])
def test_a_name_that_leads_out_of_the_folder_is_always_invalid(tmp_path: Path, name: str, follow: bool) -> None:
    with pytest.raises(InvalidImageError, match="file name leads out"):
        image_path(tmp_path, name, follow)


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png"])
def test_a_name_that_no_file_can_have_is_invalid(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidImageError, match="invalid file name"):
        image_path(tmp_path, name, False)


def test_links_out_of_the_folder_are_followed_only_if_requested(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    for place in (folder / "sub", elsewhere):
        (place / "a.png").touch()
    (folder / "in.png").symlink_to("sub/a.png")
    (folder / "out.png").symlink_to(elsewhere / "a.png")
    (folder / "back.png").symlink_to("../elsewhere/a.png")
    (folder / "other").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(folder)
    for root in (folder, tmp_path / "link"):
        for name in ("sub/a.png", "in.png"):
            assert image_path(root, name, False) == root / name
        for name in ("out.png", "back.png", "other/a.png"):
            assert image_path(root, name, True) == root / name
            with pytest.raises(InvalidImageError, match=r"leads out of the image folder.*follow_links"):
                image_path(root, name, False)
