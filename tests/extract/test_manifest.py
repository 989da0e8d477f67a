"""The image list: any names come back, shard by shard, and a damaged list is never read as another."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridcap.common.errors import StoreError, UserError
from gridcap.extract.manifest import ImageList

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    images=st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), NAMES), min_size=1, max_size=20),
    shard_size=st.integers(1, 7),
)
def test_any_images_come_back_shard_by_shard(images: list[tuple[int, str]], shard_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = ImageList.from_images(iter(images), shard_size, Path(folder))
        assert made == ImageList.from_images(images, shard_size), "writing changes nothing"
        parts = [made.images_of(shard, Path(folder)) for shard in range(len(made.crc32))]
        assert [len(part) for part in parts[:-1]] == [shard_size] * (len(parts) - 1)
        assert [image for part in parts for image in part] == images
        assert made.name_bytes == max(len(name.encode()) for _, name in images)
        lines = (Path(folder) / made.file).read_bytes().split(b"\n")[:-1]
        assert [tuple(json.loads(line)) for line in lines] == images


@pytest.mark.parametrize("position", [0, 5, 12, 30, -1])
def test_a_damaged_list_is_refused(tmp_path: Path, position: int) -> None:
    made = ImageList.from_images([(1, "a.jpg"), (2, "b.jpg"), (3, "c.jpg")], 8, tmp_path)
    content = bytearray((tmp_path / made.file).read_bytes())
    content[position] ^= 1
    (tmp_path / made.file).write_bytes(content)
    with pytest.raises(StoreError, match=made.file):
        made.images_of(0, tmp_path)


def test_a_missing_list_is_refused(tmp_path: Path) -> None:
    made = ImageList.from_images([(1, "a.jpg")], 8)
    with pytest.raises(StoreError, match="no such file"):
        made.images_of(0, tmp_path)


def test_a_list_that_cannot_be_gone_through_leaves_no_file(tmp_path: Path) -> None:
    def broken():
        yield 1, "a.jpg"
        raise OSError("the folder is gone")

    with pytest.raises(OSError, match="gone"):
        ImageList.from_images(broken(), 8, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="gone"):
        ImageList.from_images(broken(), 8, tmp_path / "new")
    assert list(tmp_path.iterdir()) == [], "an empty folder looks like a store that was begun"


@pytest.mark.parametrize("write", [False, True])
def test_a_name_longer_than_any_path_is_refused(tmp_path: Path, write: bool) -> None:
    """The column of names is as wide as the longest: one of a megabyte would take one for every image."""
    assert ImageList.from_images([(1, "a" * 4096)], 10).name_bytes == 4096
    with pytest.raises(UserError, match=r"image 7: its file name 'äääää.* has 4098 bytes"):
        ImageList.from_images([(1, "a.jpg"), (7, "ä" * 2049)], 10, tmp_path if write else None)
    assert not list(tmp_path.iterdir())
