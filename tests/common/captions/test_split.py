"""Splits: subsets, and the limit on invalid items."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gridcap.common.captions.records import ImageRecord
from gridcap.common.captions.split import load_split, split_images
from gridcap.common.config import DataConfig, SplitConfig
from gridcap.common.errors import AnnotationError

Write = Callable[..., SplitConfig]


def subset(split: SplitConfig, skip: int, limit: int | None, seed: int = 0) -> list[ImageRecord]:
    return load_split(split.model_copy(update={"skip": skip, "limit": limit}), "train", seed).records


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cuts_of_one_order_are_disjoint_stable_and_complete(write_coco: Write, data: st.DataObject) -> None:
    images = data.draw(st.integers(1, 25))
    captions = data.draw(st.lists(st.integers(0, 4), min_size=images, max_size=images))
    cuts = sorted({0, *data.draw(st.sets(st.integers(0, images - 1), max_size=3))})
    seed = data.draw(st.integers(0, 5))
    with tempfile.TemporaryDirectory() as folder:
        split = write_coco(Path(folder) / "captions.json", images, captions)
        whole = load_split(split, "train", seed).records
        parts = [
            subset(split, start, None if end is None else end - start, seed)
            for start, end in zip(cuts, [*cuts[1:], None], strict=True)
        ]
        again = subset(split, cuts[-1], None, seed)
        plain = write_coco(Path(folder) / "other.json", images)
        without_captions = subset(plain, cuts[-1], None, seed)
    ids = [[record.image_id for record in part] for part in parts]
    assert sorted(i for part in ids for i in part) == [record.image_id for record in whole]
    assert all(part == sorted(part) for part in ids)  # in file order
    assert again == parts[-1]
    assert [record.image_id for record in without_captions] == ids[-1]  # cut by image, not by caption
    by_id = {record.image_id: record for record in whole}
    assert all(record == by_id[record.image_id] for part in parts for record in part)


def test_the_subset_is_random_and_depends_on_the_seed(tmp_path: Path, write_coco: Write) -> None:
    split = write_coco(tmp_path / "captions.json", 200)
    first = [r.image_id for r in subset(split, 0, 20, seed=0)]
    assert len(first) == 20
    assert first != list(range(20))
    assert first != [r.image_id for r in subset(split, 0, 20, seed=1)]


def test_a_larger_subset_contains_the_smaller(tmp_path: Path, write_coco: Write) -> None:
    """So an experiment on 20 images can be extended to 50."""
    split = write_coco(tmp_path / "captions.json", 100)
    assert {r.image_id for r in subset(split, 0, 20)} < {r.image_id for r in subset(split, 0, 50)}


def test_a_limit_beyond_the_end_takes_all_that_is_left(tmp_path: Path, write_coco: Write) -> None:
    split = write_coco(tmp_path / "captions.json", 5)
    assert len(subset(split, 0, 100)) == 5
    assert len(subset(split, 3, 100)) == 2


def test_an_empty_subset_raises_an_error_with_the_split_name(tmp_path: Path, write_coco: Write) -> None:
    split = write_coco(tmp_path / "captions.json", 5)
    with pytest.raises(AnnotationError, match="'train'") as caught:
        subset(split, 5, 1)
    assert "skip" in caught.value.hint


def test_a_split_without_captions_lists_its_folder(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.jpg"):
        (tmp_path / name).touch()
    loaded = load_split(SplitConfig(images=tmp_path), "photos")
    assert [r.file_name for r in loaded.records] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("limit", [None, 5])
def test_item_17_follow_links_reaches_the_folder_listing(tmp_path: Path, limit: int | None) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jpg").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    split = SplitConfig(images=tmp_path / "photos", limit=limit)
    images, problems = split_images(split, "s", DataConfig())
    assert [image.file_name for image in images] == ["a.jpg"]
    assert "1 linked folder" in problems.lines()[0]
    images, problems = split_images(split, "s", DataConfig(follow_links=True))
    assert [image.file_name for image in images] == ["a.jpg", "more/b.jpg"]
    assert problems.lines() == []


def test_the_name_of_a_split_selects_the_karpathy_part(tmp_path: Path) -> None:
    path = tmp_path / "dataset_coco.json"
    entries = [
        {"cocoid": i, "filename": f"{i}.jpg", "split": part, "sentences": [{"raw": "x"}]}
        for i, part in enumerate(("train", "restval", "val", "train", "test"))
    ]
    path.write_text(json.dumps({"images": entries}))
    loaded = load_split(SplitConfig(images=tmp_path, annotations=path), "karpathy-test")
    assert [r.image_id for r in loaded.records] == [4]


# 10 images with one caption each and 2 empty captions: 2 of 12 items are invalid, 16.7%.
@pytest.mark.parametrize("max_invalid", ["2", "17%", "16.7%", "100%"])
def test_problems_within_the_limit_are_counted(tmp_path: Path, write_coco: Write, max_invalid: str) -> None:
    split = write_coco(tmp_path / "captions.json", 10, [1] * 10, empty=2)
    loaded = load_split(split, "train", max_invalid=max_invalid)
    assert len(loaded.records) == 10
    assert loaded.problems.counts == {"empty caption": 2}


@pytest.mark.parametrize("max_invalid", ["0", "1", "0%", "16.6%"])
def test_problems_over_the_limit_raise_an_error_with_their_counts(
    tmp_path: Path, write_coco: Write, max_invalid: str
) -> None:
    split = write_coco(tmp_path / "captions.json", 10, [1] * 10, empty=2)
    with pytest.raises(AnnotationError) as caught:
        load_split(split, "train", max_invalid=max_invalid)
    message = caught.value.message
    assert "captions.json" in message
    assert "2 of 12" in message
    assert max_invalid in message
    assert "2 x empty caption (annotation 10, annotation 11)" in message
    assert "max_invalid=2" in caught.value.hint


def test_item_23_a_file_that_is_mostly_invalid_does_not_suggest_a_higher_limit(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": [{"name": f"{i}.jpg"} for i in range(5)]}))
    with pytest.raises(AnnotationError, match="5 of 5 items are invalid") as caught:
        load_split(SplitConfig(images=tmp_path, annotations=path), "train")
    assert "max_invalid" not in caught.value.hint
    assert "intended file" in caught.value.hint


def test_the_limit_applies_to_the_whole_file_not_to_the_subset(tmp_path: Path, write_coco: Write) -> None:
    split = write_coco(tmp_path / "captions.json", 10, [1] * 10, empty=2)
    with pytest.raises(AnnotationError):
        load_split(split.model_copy(update={"limit": 1}), "train", max_invalid="1")


def test_only_a_whole_folder_is_streamed(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jpg").touch()
    whole, _ = split_images(SplitConfig(images=tmp_path), "s", DataConfig())
    assert not isinstance(whole, list)
    assert len(list(whole)) == 5
    some, _ = split_images(SplitConfig(images=tmp_path, limit=2), "s", DataConfig())
    assert isinstance(some, list)
    assert len(some) == 2


def test_invalid_names_in_a_folder_are_counted_once_and_limited(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").touch()
    (tmp_path / os.fsdecode(b"bad\xff.jpg")).touch()
    images, problems = split_images(SplitConfig(images=tmp_path), "s", DataConfig(max_invalid="1"))
    for _ in range(2):
        assert [image.file_name for image in images] == ["good.jpg"]
        assert problems.total == 1
    strict, _ = split_images(SplitConfig(images=tmp_path), "s", DataConfig(max_invalid="0"))
    with pytest.raises(AnnotationError, match="1 of 2") as caught:
        list(strict)
    assert "rename" in caught.value.hint
