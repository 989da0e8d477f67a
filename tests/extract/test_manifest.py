"""The image manifest: any names survive a round trip, and a corrupted file is never read."""

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
def test_images_survive_a_round_trip_shard_by_shard(images: list[tuple[int, str]], shard_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image_list = ImageList.from_images(iter(images), shard_size, Path(folder))
        assert image_list == ImageList.from_images(images, shard_size), "writing does not change the list"
        parts = [image_list.images_of(shard, Path(folder)) for shard in range(len(image_list.crc32))]
        assert [len(part) for part in parts[:-1]] == [shard_size] * (len(parts) - 1)
        assert [image for part in parts for image in part] == images
        assert image_list.name_bytes == max(len(name.encode()) for _, name in images)
        lines = (Path(folder) / image_list.file).read_bytes().split(b"\n")[:-1]
        assert [tuple(json.loads(line)) for line in lines] == images


@pytest.mark.parametrize("position", [0, 5, 12, 30, -1])
def test_a_corrupted_file_is_an_error(tmp_path: Path, position: int) -> None:
    image_list = ImageList.from_images([(1, "a.jpg"), (2, "b.jpg"), (3, "c.jpg")], 8, tmp_path)
    content = bytearray((tmp_path / image_list.file).read_bytes())
    content[position] ^= 1
    (tmp_path / image_list.file).write_bytes(content)
    with pytest.raises(StoreError, match=image_list.file):
        image_list.images_of(0, tmp_path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    image_list = ImageList.from_images([(1, "a.jpg")], 8)
    with pytest.raises(StoreError, match="no such file"):
        image_list.images_of(0, tmp_path)


def test_a_failed_iteration_leaves_no_file(tmp_path: Path) -> None:
    def broken():
        yield 1, "a.jpg"
        raise OSError("the folder is gone")

    with pytest.raises(OSError, match="gone"):
        ImageList.from_images(broken(), 8, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="gone"):
        ImageList.from_images(broken(), 8, tmp_path / "new")
    assert list(tmp_path.iterdir()) == [], "an empty folder would look like a started store"


@pytest.mark.parametrize("write", [False, True])
def test_a_file_name_longer_than_path_max_is_an_error(tmp_path: Path, write: bool) -> None:
    """The name column is as wide as the longest name: one name of 1 MB would need 1 MB per image."""
    assert ImageList.from_images([(1, "a" * 4096)], 10).name_bytes == 4096
    with pytest.raises(UserError, match=r"image 7: file name 'äääää.* has 4098 bytes"):
        ImageList.from_images([(1, "a.jpg"), (7, "ä" * 2049)], 10, tmp_path if write else None)
    assert not list(tmp_path.iterdir())
